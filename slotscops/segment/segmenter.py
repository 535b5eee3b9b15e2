"""A trained model that takes photos: `slotscops.load(...)`, `model.segment(photo)`, `parts.overlay()`.

The network was trained on square crops around one object. A photo is therefore padded to a square and resized, as
sharding does it (`core/pixels.py`), and the maps are brought back to the photo's own size.

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

from slotscops.config import suggest
from slotscops.core import console
from slotscops.core.errors import UserError
from slotscops.core.photos import read_photo, to_rgb
from slotscops.core.pictures import overlay
from slotscops.core.pixels import crop_photo, whole_square
from slotscops.features.teacher import Teacher, compute_features
from slotscops.model.maps import interpolation_matrix
from slotscops.model.network import ModelOutput
from slotscops.segment.hub import HubModel, fetch
from slotscops.train.build import Trained, load_model

_EPSILON = 1e-8  # keeps the log of a share that is 0 finite
_STRIP_PIXELS = 1_000_000  # maps are upsampled so many pixels at a time: labels of a huge photo need no huge maps


@dataclass(frozen=True)
class Parts:
    """What was found in one photo. The arrays are made when they are first asked for, and kept."""

    photo: NDArray[np.uint8]  # (H, W, 3) RGB, upright
    logits: NDArray[np.float32]  # (S, h, w) of the square around the photo, before they are upsampled
    class_name: str | None = None  # whose parts they are, where each class has its own

    @cached_property
    def maps(self) -> NDArray[np.float32]:
        """(S, H, W) share of each slot in each pixel, 0..1, sums to 1 over slots; slot 0 is the background."""
        return np.concatenate(list(self._strips()), axis=1)

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) the slot with the largest share; 0 = background, k = part k."""
        return np.concatenate([strip.argmax(axis=0).astype(np.uint8) for strip in self._strips()])

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The photo with its parts in PASCAL VOC's colours; the background stays as it is."""
        return overlay(self.photo, self.labels, opacity)

    def _strips(self) -> Iterator[NDArray[np.float32]]:
        """(S, rows, W) soft maps from top to bottom."""
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
        Raises:
            UserError: other teacher weights than those of the training; see `load`.
        """
        self.trained = trained
        self.network = trained.network.to("cuda" if torch.cuda.is_available() else "cpu")
        self.size = trained.config.data.size  # pixels, side of the crops the network was trained on
        self.teacher = None  # where the network's input is the teacher's features
        if self.network.takes_features:
            self.teacher = _load_teacher(trained, teacher_weights).to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Classes that have parts of their own; empty where all share theirs."""
        return [] if self.network.num_classes is None else self.trained.state.class_names

    def segment(self, photo: str | Path | Image.Image, class_name: str | None = None) -> Parts:
        """Finds the parts in one photo, of any size and mode.

        Args:
            class_name: what it shows, where each class has parts of its own; guessed from the photo if not given.

        Raises:
            UserError: no such file, not an image, more than 100 million pixels, or a class the model does not know.
        """
        return self.segment_batch([photo], class_name)[0]

    def segment_batch(self, photos: Sequence[str | Path | Image.Image], class_name: str | None = None) -> list[Parts]:
        """Finds the parts in several photos at once, of whatever sizes; of one class, or of any."""
        images = [to_rgb(p) if isinstance(p, Image.Image) else read_photo(Path(p)) for p in photos]
        crops = torch.stack([self.crop(image) for image in images]).to(self.device)
        class_ids = None if class_name is None else torch.full((len(images),), self._class_id(class_name))
        output = self.forward(crops, class_ids)
        logits = self._sharp_logits(output, crops).cpu().numpy()
        names: list[str | None] = [class_name] * len(images)
        if output.class_logits is not None and class_name is None:
            names = [self.class_names[guess] for guess in output.class_logits.argmax(dim=1).tolist()]
        return [Parts(np.asarray(image), logits[number], names[number]) for number, image in enumerate(images)]

    def _class_id(self, name: str) -> int:
        if name not in self.class_names:
            known = f"known are {', '.join(self.class_names)}" if self.class_names else "its classes share their parts"
            raise UserError(f"{self.trained.path}: class '{name}'{suggest(name, self.class_names) or f'; {known}'}")
        return self.class_names.index(name)

    @torch.inference_mode()
    def forward(self, crops: Tensor, class_ids: Tensor | None = None) -> ModelOutput:
        """All that the network says of (B, 3, size, size) uint8 RGB crops."""
        inputs = crops
        if self.teacher is not None:
            inputs = compute_features(self.teacher, crops, self.trained.config.teacher_size)
        output: ModelOutput = self.network(inputs, class_ids=None if class_ids is None else class_ids.to(self.device))
        return output

    @torch.inference_mode()
    def _sharp_logits(self, output: ModelOutput, crops: Tensor) -> Tensor:
        """(B, S, h, w) float32, on the crop's own grid where maps are refined."""
        if self.network.refinement == "none":
            return output.logits.float()
        return self.network.segment_maps(output, crops).clamp_min(_EPSILON).log()

    def crop(self, image: Image.Image) -> Tensor:
        """(3, size, size) uint8, what the network sees of an RGB photo: the same as `shard --images` crops."""
        pixels = crop_photo(image, whole_square(image.size), self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def load(run_or_checkpoint: str | Path, teacher_weights: str | None = None) -> Segmenter:
    """A trained model, on the GPU where there is one.

    Args:
        run_or_checkpoint: a run's folder, one of its checkpoints, a folder written by `save_pretrained`, or the id of a
            model on the Hugging Face hub (OWNER/MODEL). A path that exists wins over an id.
        teacher_weights: needed only by a model that was trained on cached features: `imagenet`, a
            .safetensors or .pth file, or random:SEED; default: those it was trained with, unless they were a file.

    Raises:
        UserError: nothing there, damaged, or other teacher weights than those of the training.
    """
    path = Path(run_or_checkpoint)
    if path.exists():
        return Segmenter(load_model(path), teacher_weights)
    return Segmenter.from_pretrained(fetch(str(run_or_checkpoint)), teacher_weights=teacher_weights)


def _load_teacher(trained: Trained, weights: str | None) -> Teacher:
    original, wanted = trained.state.teacher_weights, trained.config.teacher
    if weights is None and original != "imagenet" and not original.startswith("random:"):
        whence = f"weights from {original}" if original else "weights that nobody noted"
        raise UserError(
            f"{trained.path}: was trained on features of {wanted.network} with {whence}; "
            "give that file with --teacher-weights (in Python: teacher_weights=)"
        )
    teacher = Teacher(wanted.layer, weights or original, wanted.network)
    if not trained.state.teacher_sha256:
        console.warn(f"{trained.path}: does not say which teacher it was trained with; {teacher.weights_name} is taken")
    elif teacher.fingerprint != trained.state.teacher_sha256:
        raise UserError(
            f"{trained.path}: was trained with teacher {original} (sha256 {trained.state.teacher_sha256[:12]}), "
            f"came {teacher.weights_name} ({teacher.fingerprint[:12]}); give the ones of the training"
        )
    return teacher
