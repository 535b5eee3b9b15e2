"""A trained model for photos: `slotscops.load(...)`, `model.segment(photo)`, `parts.overlay()`.

The network was trained on square crops around one object. A photo is therefore padded to a square and resized, with
the same code as for shards (`core/pixels.py`). The maps are then resized to the photo's own size.

Shapes: B photos; S slots, h x w cells of the network's logits, H x W pixels of the photo.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slotscops.core import console, pretrained
from slotscops.core.errors import RunError, UserError, suggest
from slotscops.core.photos import read_photo, to_array, to_rgb
from slotscops.core.pictures import overlay
from slotscops.core.pixels import crop_photo, whole_square
from slotscops.features.teacher import Teacher, compute_features
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.maps import interpolation_matrix
from slotscops.model.network import ModelOutput, SlotScops
from slotscops.segment.hub import HubModel, fetch
from slotscops.train.build import Trained, load_model

_EPSILON = 1e-8  # keeps the log of a share of 0 finite
_STRIP_PIXELS = 1_000_000  # pixels to upsample at a time, so that the labels of a huge photo need no huge maps


@dataclass(frozen=True)
class FoundParts:
    """The parts found in one photo. `maps` and `labels` are computed on first use and then kept."""

    photo: NDArray[np.uint8]  # (H, W, 3) RGB, upright
    logits: NDArray[np.float32]  # (S, h, w) for the padded square around the photo, before upsampling
    class_name: str | None = None  # class of the parts, if each class has parts of its own

    @cached_property
    def maps(self) -> NDArray[np.float32]:
        """(S, H, W) float32 share of each slot in each pixel, in 0..1, summing to 1 over slots. Slot 0: background."""
        return np.concatenate(list(self._strips()), axis=1)

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) uint8 slot with the largest share of each pixel: 0 = background, k = part k."""
        labels = np.empty(self.photo.shape[:2], np.uint8)
        first = 0
        for strip in self._strips():
            rows = strip.argmax(axis=0)
            labels[first : first + len(rows)] = rows
            first += len(rows)
        return labels

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The photo with its parts painted in PASCAL VOC's colours. The background is unchanged.

        Args:
            opacity: of the colours, 0..1.
        """
        return overlay(self.photo, self.labels, opacity)

    def _strips(self) -> Iterator[NDArray[np.float32]]:
        """Yields (S, rows, W) strips of the soft maps, from top to bottom."""
        height, width = self.photo.shape[:2]
        square = whole_square((width, height))
        side, top, left = max(height, width), -square[1], -square[0]
        down = interpolation_matrix(self.logits.shape[1], side, align_corners=True)[top : top + height]
        across = interpolation_matrix(self.logits.shape[2], side, align_corners=True)[left : left + width]
        widened = torch.from_numpy(self.logits) @ across.T  # (S, h, W)
        num_rows = max(1, _STRIP_PIXELS // width)
        for first in range(0, height, num_rows):
            yield (down[first : first + num_rows] @ widened).softmax(dim=0).numpy()


class Segmenter(HubModel):
    """A trained network that takes photos. Made by `slotscops.load` or `Segmenter.from_pretrained`."""

    def __init__(self, trained: Trained, teacher_weights: str | None = None) -> None:
        """
        Args:
            teacher_weights: see `load`.

        Raises:
            UserError: if these are not the teacher weights of the training; see `load`.
        """
        self.trained = trained
        self.network = trained.network.to("cuda" if torch.cuda.is_available() else "cpu")
        self.size = trained.config.data.size  # pixels, side of the crops that the network was trained on
        self.teacher = None  # a teacher, if the network reads its features
        if self.network.takes_features:
            self.teacher = _load_teacher(trained, teacher_weights).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that have parts of their own. Empty if all classes share their parts."""
        return [] if self.network.num_classes is None else self.trained.state.class_names

    def segment(self, photo: str | Path | Image.Image, class_name: str | None = None) -> FoundParts:
        """Finds the parts in one photo, of any size and mode.

        Args:
            photo: a file, or a PIL image.
            class_name: class of the object, if each class has parts of its own. It is guessed from the photo if not
                given.

        Raises:
            UserError: if there is no such file, it is not an image, it has more than 100 million pixels, or the model
                does not know the class.
        """
        return self.segment_batch([photo], class_name)[0]

    def segment_batch(
        self, photos: Sequence[str | Path | Image.Image], class_name: str | None = None
    ) -> list[FoundParts]:
        """Finds the parts in several photos at once. They may have different sizes.

        Args:
            photos: files or PIL images.
            class_name: class of all photos, see `segment`. If not given, it is guessed for each photo.

        Raises:
            UserError: as in `segment`.
            RunError: if the network's output is not finite.
        """
        images = [to_rgb(p) if isinstance(p, Image.Image) else read_photo(Path(p)) for p in photos]
        crops = torch.stack([self.crop(image) for image in images]).to(self.device)
        class_ids = None if class_name is None else torch.full((len(images),), self._class_id(class_name))
        output = self.forward(crops, class_ids)
        logits = self._sharp_logits(output, crops).cpu().numpy()
        if not np.isfinite(logits).all():
            raise RunError(
                f"{self.trained.path}: its part maps are not finite; its weights, or the teacher's, are too large or "
                "damaged"
            )
        names: list[str | None] = [class_name] * len(images)
        if output.class_logits is not None and class_name is None:
            names = [self.class_names[guess] for guess in output.class_logits.argmax(dim=1).tolist()]
        return [FoundParts(to_array(image), logits[number], names[number]) for number, image in enumerate(images)]

    def _class_id(self, name: str) -> int:
        if name not in self.class_names:
            known = f"known are {', '.join(self.class_names)}" if self.class_names else "its classes share their parts"
            raise UserError(f"{self.trained.path}: class '{name}'{suggest(name, self.class_names) or f'; {known}'}")
        return self.class_names.index(name)

    @torch.inference_mode()
    def forward(self, crops: Tensor, class_ids: Tensor | None = None) -> ModelOutput:
        """The network's output for (B, 3, size, size) uint8 RGB crops; class_ids (B,) are guessed if not given."""
        inputs = network_inputs(self.network, self.teacher, crops, self.trained.config.teacher_size)
        output: ModelOutput = self.network(inputs, class_ids=None if class_ids is None else class_ids.to(self.device))
        return output

    @torch.inference_mode()
    def _sharp_logits(self, output: ModelOutput, crops: Tensor) -> Tensor:
        """(B, S, h, w) float32 logits, or (B, S, size, size) logs of the refined maps if maps are refined."""
        if self.network.refinement == "none":
            return output.logits.float()
        return self.network.segment_maps(output, crops).clamp_min(_EPSILON).log()

    def crop(self, image: Image.Image) -> Tensor:
        """(3, size, size) uint8 crop of an RGB photo for the network, the same as `shard --images` makes."""
        pixels = crop_photo(image, whole_square(image.size), self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def network_inputs(network: SlotScops, teacher: Teacher | None, crops: Tensor, teacher_size: int) -> Tensor:
    """What the network reads: the crops, or the teacher's features of them in the form of the cache of its training.

    Args:
        teacher: None for a network that reads photos.
        crops: (B, 3, size, size) uint8 RGB.
        teacher_size: side to which crops are resized for the teacher, pixels.

    Returns:
        The crops, or (B, C, h, w) float32 features. The cache's rounding to float16 or 8 bits is not repeated.
    """
    if teacher is None:
        return crops
    assert isinstance(network.encoder, FeatureEncoder)
    return network.encoder.project(compute_features(teacher, crops, teacher_size))


def load(run_or_checkpoint: str | Path, teacher_weights: str | None = None) -> Segmenter:
    """Loads a trained model, onto the GPU if there is one.

    Args:
        run_or_checkpoint: a run's folder, one of its checkpoints, a folder written by `save_pretrained`, or the id of a
            model on the Hugging Face hub (OWNER/MODEL). An existing path takes precedence over an id.
        teacher_weights: `imagenet`, a .safetensors or .pth file, or random:SEED. Only a model that was trained on
            cached features uses them. By default they are those of the training. If those came from a file, the file
            must be given here.

    Raises:
        UserError: if there is no such model, it is damaged, or these are not the teacher weights of the training.
    """
    path = Path(run_or_checkpoint)
    if path.exists():
        return Segmenter(load_model(path), teacher_weights)
    return Segmenter.from_pretrained(fetch(str(run_or_checkpoint)), teacher_weights=teacher_weights)


def _load_teacher(trained: Trained, weights: str | None) -> Teacher:
    original, wanted = trained.state.teacher_weights, trained.config.teacher
    if weights is None and not pretrained.is_found_by_name(original):
        whence = f"weights from {original}" if original else "weights that were not recorded"
        raise UserError(
            f"{trained.path}: was trained on features of {wanted.network} with {whence}; "
            "give that file with --teacher-weights (in Python: teacher_weights=)"
        )
    teacher = Teacher(wanted.layer, weights or original, wanted.network)
    if not trained.state.teacher_sha256:
        console.warn(f"{trained.path}: does not say which teacher it was trained with; using {teacher.weights_name}")
    elif teacher.fingerprint != trained.state.teacher_sha256:
        raise UserError(
            f"{trained.path}: was trained with teacher {original} (sha256 {trained.state.teacher_sha256[:12]}), "
            f"came {teacher.weights_name} ({teacher.fingerprint[:12]}); give the ones of the training"
        )
    return teacher
