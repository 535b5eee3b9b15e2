"""A trained model for photos: `slotscops.load(...)`, `model.segment(photo)`, `parts.overlay()`.

The network was trained on square crops around one object. A photo is therefore padded to a square and resized, with
the same code as for shards (`core/pixels.py`). The maps are then resized to the photo's own size.

Shapes: B photos; S slots, h x w cells of the network's logits, H x W pixels of the photo; C channels of the features on
g x f cells.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

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
from slotscops.segment.names import PartNames, read_names
from slotscops.segment.pruning import without_dead
from slotscops.train.build import Trained, load_model

_EPSILON = 1e-8  # keeps the log of a share of 0 finite
_STRIP_PIXELS = 1_000_000  # pixels to upsample at a time, so that the labels of a huge photo need no huge maps


@dataclass(frozen=True)
class FoundParts:
    """The parts found in one photo. What is derived from the fields is computed on first use and then kept.

    The rows of maps, areas, boxes and so on are the slots of the model, whose numbers stand in `numbers`. They are 0 to
    S - 1, unless dead parts were left out of a published model: then the others keep their numbers.

    A slot is present if it has the largest share of at least one pixel. The rows of `features`, `boxes`, `centres` and
    `scores` of a slot that is not present are NaN. Coordinates count from the photo's top left corner, so the centre of
    its first pixel is (0.5, 0.5).
    """

    photo: NDArray[np.uint8]  # (H, W, 3) RGB, upright
    logits: NDArray[np.float32]  # (S, h, w) for the padded square around the photo, before upsampling
    class_name: str | None = None  # class of the parts, if each class has parts of its own
    encoded: NDArray[np.float32] | None = None  # (C, g, f) the encoder's or teacher's features of the padded square
    slot_numbers: tuple[int, ...] | None = None  # None: 0 to S - 1
    # Which of two ways the object faces, 1 or -1, if the model was trained with decoder.places=facing. No label says
    # which of them is the left: look at one photo to see.
    facing: int | None = None

    @property
    def numbers(self) -> NDArray[np.uint8]:
        """(S,) uint8 number of each row's slot, as it stands in `labels`: 0 = background, k = part k."""
        return np.array(self.slot_numbers or range(len(self.logits)), np.uint8)

    @cached_property
    def maps(self) -> NDArray[np.float32]:
        """(S, H, W) float32 share of each slot in each pixel, in 0..1, summing to 1 over slots. Slot 0: background."""
        return np.concatenate(list(self.strips()), axis=1)

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) uint8 slot with the largest share of each pixel: 0 = background, k = part k."""
        return self.winners if self.slot_numbers is None else self.numbers[self.winners]

    @cached_property
    def winners(self) -> NDArray[np.uint8]:
        """(H, W) uint8 row of the slot with the largest share of each pixel, from 0 to S - 1."""
        winners = np.empty(self.photo.shape[:2], np.uint8)
        first = 0
        for strip in self.strips():
            rows = strip.argmax(axis=0)
            winners[first : first + len(rows)] = rows
            first += len(rows)
        return winners

    @property
    def areas(self) -> NDArray[np.int64]:
        """(S,) number of pixels of each slot in `labels`."""
        return self._measures.areas

    @property
    def present(self) -> NDArray[np.bool_]:
        """(S,) whether the slot has any pixel in `labels`."""
        return self.areas > 0

    @property
    def scores(self) -> NDArray[np.float32]:
        """(S,) mean share of each slot in its own pixels, in 0..1. NaN for a slot that is not present."""
        return self._measures.scores

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(S, 4) smallest box around each slot's pixels: left, top, right, bottom in pixels, the last two exclusive.

        NaN for a slot that is not present.
        """
        return self._measures.boxes

    @property
    def centres(self) -> NDArray[np.float32]:
        """(S, 2) x and y of each slot's centre of mass, in pixels, weighted by its soft map over the photo.

            c_s = sum_yx p_s(y,x) (x, y) / sum_yx p_s(y,x)

        NaN for a slot that is not present.

        Source: SCOPS (arXiv:1905.01298), the part centres of the geometric concentration loss.
        """
        return self._measures.centres

    @property
    def features(self) -> NDArray[np.float32]:
        """(S, C) mean feature of each slot, weighted by its soft map over the photo.

            v_s = sum_yx p_s(y,x) (U f)(y,x) / sum_yx p_s(y,x)

        f are the features that the network read (the teacher's, for a model that was trained on cached features) or
        made of the photo (the encoder's). U upsamples them bilinearly to the pixels. Because U is linear, v_s is
        computed from U^T p_s, without upsampled features. NaN for a slot that is not present.

        Raises:
            ValueError: if `encoded` is None.
        """
        if self._measures.features is None:
            raise ValueError("these parts were made without the features of the photo")
        return self._measures.features

    @cached_property
    def _measures(self) -> "_Measures":
        num_slots, (height, width) = len(self.logits), self.photo.shape[:2]
        sums = _Sums(num_slots, height, width)
        grid = (1, 1) if self.encoded is None else self.encoded.shape[1:]
        down, across = self._matrices(grid)
        pulled = torch.zeros(num_slots, *grid, dtype=torch.float64)  # U^T p
        first = 0
        for strip in self.strips():
            sums.add(strip, first)
            last = first + strip.shape[1]
            pulled += (down[first:last].T @ (torch.from_numpy(strip) @ across)).double()
            first = last
        features = None
        if self.encoded is not None:
            cells = torch.from_numpy(self.encoded).double().flatten(1)  # (C, g * f)
            features = sums.per_mass((pulled.flatten(1) @ cells.T).numpy())
        return _Measures(sums.areas, sums.scores(), sums.boxes(), sums.per_mass(sums.moments), features)

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The photo with its parts painted in PASCAL VOC's colours. The background is unchanged.

        Args:
            opacity: of the colours, 0..1.
        """
        return overlay(self.photo, self.labels, opacity)

    def strips(self) -> Iterator[NDArray[np.float32]]:
        """Yields (S, rows, W) strips of the soft maps, from top to bottom."""
        height, width = self.photo.shape[:2]
        down, across = self._matrices(self.logits.shape[1:])
        widened = torch.from_numpy(self.logits) @ across.T  # (S, h, W)
        num_rows = max(1, _STRIP_PIXELS // width)
        for first in range(0, height, num_rows):
            yield (down[first : first + num_rows] @ widened).softmax(dim=0).numpy()

    def _matrices(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(H, h) and (W, w) interpolation from a grid (h, w) of the padded square to the rows and columns of photo."""
        height, width = self.photo.shape[:2]
        square = whole_square((width, height))
        side, top, left = max(height, width), -square[1], -square[0]
        down = interpolation_matrix(grid[0], side, align_corners=True)[top : top + height]
        across = interpolation_matrix(grid[1], side, align_corners=True)[left : left + width]
        return down, across


@dataclass(frozen=True)
class _Measures:
    """What one pass over the soft maps of a photo measures. See the properties of `FoundParts`."""

    areas: NDArray[np.int64]  # (S,)
    scores: NDArray[np.float32]  # (S,)
    boxes: NDArray[np.float32]  # (S, 4)
    centres: NDArray[np.float32]  # (S, 2)
    features: NDArray[np.float32] | None  # (S, C)


class _Sums:
    """Sums over the pixels of a photo, to which strips of its soft maps are added from top to bottom."""

    def __init__(self, num_slots: int, height: int, width: int) -> None:
        self.areas = np.zeros(num_slots, np.int64)
        self.moments = np.zeros((num_slots, 2))  # sum of p_s(y,x) (x, y)
        self._mass = np.zeros(num_slots)  # sum of p_s
        self._own = np.zeros(num_slots)  # sum of p_s in the slot's own pixels
        self._rows = np.zeros((num_slots, height), np.bool_)  # whether the slot has a pixel in the row
        self._columns = np.zeros((num_slots, width), np.bool_)

    def add(self, strip: NDArray[np.float32], first: int) -> None:
        """Adds (S, rows, W) soft maps, of which the first row is row `first` of the photo."""
        _, num_rows, width = strip.shape
        of_rows, of_columns = strip.sum(axis=2, dtype=np.float64), strip.sum(axis=1, dtype=np.float64)
        self._mass += of_rows.sum(axis=1)
        self.moments[:, 0] += of_columns @ (np.arange(width) + 0.5)
        self.moments[:, 1] += of_rows @ (np.arange(first, first + num_rows) + 0.5)
        winner = strip.argmax(axis=0)
        for slot, shares in enumerate(strip):
            mask = winner == slot
            self.areas[slot] += np.count_nonzero(mask)
            self._own[slot] += shares.sum(where=mask, dtype=np.float64)
            self._rows[slot, first : first + num_rows] = mask.any(axis=1)
            self._columns[slot] |= mask.any(axis=0)

    def per_mass(self, sums: NDArray[np.float64]) -> NDArray[np.float32]:
        """(S, ...) weighted sums over weights; NaN for slots without a pixel."""
        return self._ratio(sums, self._mass[:, None])

    def scores(self) -> NDArray[np.float32]:
        return self._ratio(self._own, self.areas)

    def boxes(self) -> NDArray[np.float32]:
        boxes = np.full((len(self.areas), 4), np.nan, np.float32)
        for slot in np.flatnonzero(self.areas):
            rows, columns = np.flatnonzero(self._rows[slot]), np.flatnonzero(self._columns[slot])
            boxes[slot] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    def _ratio(self, sums: NDArray[np.float64], weights: NDArray[Any]) -> NDArray[np.float32]:
        ratio = np.full(sums.shape, np.nan, np.float32)
        seen = self.areas > 0
        ratio[seen] = sums[seen] / weights[seen]
        return ratio


class Segmenter(HubModel):
    """A trained network that takes photos. Made by `slotscops.load` or `Segmenter.from_pretrained`."""

    def __init__(
        self,
        trained: Trained,
        teacher_weights: str | None = None,
        device: torch.device | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """
        Args:
            teacher_weights: see `load`.
            device: where network and teacher compute. By default it is the GPU if there is one.
            teacher: that of the training, if it is loaded already; `teacher_weights` is then not used.

        Raises:
            UserError: if these are not the teacher weights of the training; see `load`.
        """
        self.trained = trained
        self.network = trained.network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = trained.config.data.size  # pixels, side of the crops that the network was trained on
        self.teacher = None  # a teacher, if the network reads its features
        if self.network.takes_features:
            self.teacher = (teacher or _load_teacher(trained, teacher_weights)).to(self.device)
        self.names = read_names(trained.path, self.class_names, self.network.num_slots - 1)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that have parts of their own. Empty if all classes share their parts."""
        return [] if self.network.num_classes is None else self.trained.state.class_names

    @property
    def part_numbers(self) -> list[int]:
        """Numbers of the parts: 1 to K, without those of dead parts that a published model leaves out."""
        return list(self.network.slot_numbers[1:])

    def without_dead(self) -> Self:
        """This model without the parts that are dead, see `pruning`; itself if there are none. Tensors are shared."""
        trained = without_dead(self.trained)
        if trained is self.trained:
            return self
        model = copy.copy(self)
        model.trained, model.network = trained, trained.network
        if self.names is not None:
            kept = [self.part_numbers.index(number) for number in model.part_numbers]
            by_class = {key: [names[place] for place in kept] for key, names in self.names.by_class.items()}
            model.names = replace(self.names, by_class=by_class)
        return model

    @property
    def names(self) -> PartNames | None:
        """Names of the parts, if they were given, as by `segment --name-from`. `save_pretrained` saves them."""
        return self._names

    @names.setter
    def names(self, names: PartNames | None) -> None:
        if names is not None:
            names.check_fit(self.class_names, self.network.num_slots - 1)
        self._names = names

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
            MemoryError: if the photos do not fit into the memory, of the host or of the GPU.
        """
        images = [to_rgb(p) if isinstance(p, Image.Image) else read_photo(Path(p)) for p in photos]
        try:
            return self._segment_images(images, class_name)
        except torch.OutOfMemoryError:
            pass
        # Raised here, where PyTorch's error and all tensors that its traceback holds are gone: fewer photos may fit.
        raise MemoryError("the GPU has too little memory free for these photos")

    def _segment_images(self, images: list[Image.Image], class_name: str | None) -> list[FoundParts]:
        crops = torch.stack([self.crop(image) for image in images]).to(self.device)
        class_ids = None if class_name is None else torch.full((len(images),), self.class_id(class_name))
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
        encoded = output.encoded.float().cpu().numpy()
        is_pruned = self.part_numbers != list(range(1, self.network.num_slots))
        slot_numbers = self.network.slot_numbers if is_pruned else None
        facings: list[int | None] = [None] * len(images)
        if output.placed is not None and self.network.places == "facing":
            facings = [int(facing) for facing in output.placed.frame.facing.tolist()]
        return [
            FoundParts(to_array(image), logits[number], names[number], encoded[number], slot_numbers, facings[number])
            for number, image in enumerate(images)
        ]

    def class_id(self, name: str) -> int:
        """The number of a class. Raises a UserError if no class of this name has parts of its own."""
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
