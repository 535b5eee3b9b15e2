"""Names the parts of a model after the true parts of a few labelled photos.

Each slot gets the name of at most one true part and each true part goes to at most one slot, so that as many labelled
pixels as possible lie in the slot of their part: the assignment problem, which scipy solves.

Shapes: B crops of size x size pixels; S slots, of which slot 0 is the background and has no name; T true parts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core import console
from slotscops.core.errors import RunError, UserError
from slotscops.core.pixels import DEFAULT_CONTEXT
from slotscops.core.records import IGNORED
from slotscops.datasets.label_maps import NAMES_FILE
from slotscops.datasets.photo_folder import PhotoFolder
from slotscops.datasets.sources import SPLITS, Candidate, LeftOut
from slotscops.loader.batches import evaluation_batches
from slotscops.loader.split import Split
from slotscops.segment.names import SHARED, PartNames
from slotscops.segment.segmenter import Segmenter
from slotscops.shard.index import dataset_path, open_dataset

_BATCH_SIZE = 16
_LABEL_FOLDER = "parts"  # of the label maps in a folder of labelled photos, unless another one holds `parts.txt`


@dataclass(frozen=True)
class Overlaps:
    """How many pixels of the labelled photos lie in which slot and in which true part."""

    part_names: list[str]  # T names, of the parts that have a pixel
    table: NDArray[np.int64]  # (S, T + 1) pixel counts; column 0 counts pixels of no part

    def match(self) -> list[str | None]:
        """A name for each slot from 1, or None. No other assignment has more labelled pixels that agree."""
        from scipy.optimize import linear_sum_assignment  # takes long to import

        overlap = self.table[1:, 1:]
        names: list[str | None] = [None] * len(overlap)
        for row, column in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
            if overlap[row, column]:
                names[row] = self.part_names[column]
        return names

    def agreeing(self, names: Sequence[str | None]) -> int:
        """Number of labelled pixels whose slot has the name of their part."""
        places = [(slot, 1 + self.part_names.index(name)) for slot, name in enumerate(names, start=1) if name]
        return sum(int(self.table[place]) for place in places)

    @property
    def num_labelled(self) -> int:
        """Number of pixels that have a true part."""
        return int(self.table[:, 1:].sum())


class _Labelled(NamedTuple):
    """A few crops with their true parts."""

    images: Tensor  # (B, 3, size, size) uint8 RGB
    labels: NDArray[np.uint8]  # (B, size, size) part labels, 0 = no part, or IGNORED
    class_names: list[str]  # B classes


def count_overlaps(
    model: Segmenter, labelled: Path, label_folder: Path | None = None, class_name: str | None = None
) -> tuple[dict[str, Overlaps], int]:
    """Compares the slots of a model with the true parts of labelled photos, on crops as those of its training.

    Args:
        labelled: a folder of shards, all of which are read, or a folder of photos with label maps, as `shard --images`
            reads them.
        label_folder: the label maps of a folder of photos. If not given, they lie in its sub-folder that holds
            `parts.txt`, or in its sub-folder `parts`.
        class_name: class of a folder of photos, if each class has parts of its own.

    Returns:
        The overlaps of the classes that occur, or under `SHARED` if all classes share their parts; and the number of
        crops.

    Raises:
        UserError: if there are no labelled photos, a label or a class is unknown, or the crops have another size.
        RunError: if the network's output is not finite.
    """
    if dataset_path(labelled).is_file():
        part_names, crops = _open_shards(model, labelled)
    else:
        part_names, crops = _open_photos(model, labelled, label_folder, class_name)
    counts = _Counts(model, part_names, labelled)
    num_crops = 0
    for batch in crops:
        counts.add(batch)
        num_crops += len(batch.class_names)
    overlaps = counts.overlaps()
    if not sum(one.num_labelled for one in overlaps.values()):
        raise UserError(f"{labelled}: no pixel of its photos has a label of a part, which names are taken from")
    return overlaps, num_crops


def name_parts(
    model: Segmenter, labelled: Path, label_folder: Path | None = None, class_name: str | None = None
) -> PartNames:
    """Names the parts of a model, prints how well the names agree with the labels, and gives them to the model.

    Args:
        labelled, label_folder, class_name: see `count_overlaps`.

    Raises:
        UserError, RunError: as `count_overlaps`.
    """
    overlaps, num_photos = count_overlaps(model, labelled, label_folder, class_name)
    by_class = {key: one.match() for key, one in overlaps.items()}
    agreeing = sum(one.agreeing(by_class[key]) for key, one in overlaps.items())
    num_labelled = sum(one.num_labelled for one in overlaps.values())
    unseen = [name for name in model.class_names if name not in by_class]
    nothing: list[str | None] = [None] * (model.network.num_slots - 1)
    model.names = PartNames(by_class | dict.fromkeys(unseen, nothing), agreeing / num_labelled, num_photos)
    _show(overlaps, by_class, model.part_numbers)
    console.say(f"{agreeing / num_labelled:.1%} of the labelled pixels of {num_photos} photos agree with these names")
    return model.names


# ---- counting ----------------------------------------------------------------------------------------------------


class _Counts:
    """Counts pixels by slot and true part, in a table for each class or in one table if classes share their parts."""

    def __init__(self, model: Segmenter, part_names: dict[str, list[str]], labelled: Path) -> None:
        """
        Args:
            part_names: of each class of the data, in the order of their labels from 1.
            labelled: what errors name.
        """
        self._model, self._labelled = model, labelled
        every = list(dict.fromkeys(name for names in part_names.values() for name in names))
        self._names = part_names if model.class_names else {SHARED: every}
        self._columns = {
            class_name: np.array([0, *(1 + self._names_of(class_name).index(name) for name in names)])
            for class_name, names in part_names.items()
        }  # by label
        self._tables: dict[str, NDArray[np.int64]] = {}

    def _names_of(self, class_name: str) -> list[str]:
        return self._names[class_name if self._model.class_names else SHARED]

    @torch.inference_mode()
    def add(self, batch: _Labelled) -> None:
        """Adds the pixels of a few crops."""
        model, class_ids = self._model, None
        if model.class_names:
            class_ids = torch.tensor([self._class_id(name) for name in batch.class_names])
        images = batch.images.to(model.device)
        maps = model.network.segment_maps(model.forward(images, class_ids), images)  # (B, S, size, size)
        if not maps.isfinite().all():
            raise RunError(f"{model.trained.path}: its part maps are not finite, so its parts cannot be named")
        found = maps.argmax(dim=1).cpu().numpy()
        for slots, labels, class_name in zip(found, batch.labels, batch.class_names, strict=True):
            self._add_crop(slots, labels, class_name)

    def _class_id(self, class_name: str) -> int:
        if class_name not in self._model.class_names:
            known = ", ".join(self._model.class_names)
            raise UserError(f"{self._labelled}: shows {class_name}, but the model has parts for {known}; label these")
        return self._model.class_names.index(class_name)

    def _add_crop(self, slots: NDArray[np.int64], labels: NDArray[np.uint8], class_name: str) -> None:
        columns, is_known = self._columns[class_name], labels != IGNORED
        highest = labels[is_known].max(initial=0)
        if highest >= len(columns):
            raise UserError(
                f"{self._labelled}: holds label {highest}, but {len(columns) - 1} parts have names; name all in "
                f"{NAMES_FILE}"
            )
        key = class_name if self._model.class_names else SHARED
        shape = (self._model.network.num_slots, 1 + len(self._names[key]))
        table = self._tables.setdefault(key, np.zeros(shape, np.int64))
        cells = slots[is_known] * shape[1] + columns[labels[is_known]]
        table += np.bincount(cells, minlength=table.size).reshape(shape)

    def overlaps(self) -> dict[str, Overlaps]:
        """The tables by class, without the parts that have no pixel."""
        return {key: self._without_unseen(self._names[key], table) for key, table in self._tables.items()}

    @staticmethod
    def _without_unseen(names: list[str], table: NDArray[np.int64]) -> Overlaps:
        seen = 1 + np.flatnonzero(table[:, 1:].any(axis=0))
        return Overlaps([names[column - 1] for column in seen], table[:, [0, *seen]])


# ---- reading -----------------------------------------------------------------------------------------------------


def _open_shards(model: Segmenter, shards: Path) -> tuple[dict[str, list[str]], Iterator[_Labelled]]:
    """The part names by class and the crops of all splits. Where true parts overlap, the smallest is on top."""
    dataset = open_dataset(shards)
    if dataset.size != model.size:
        raise UserError(
            f"{shards}: holds crops of {dataset.size} px, the model was trained at {model.size}; make shards with "
            f"python -m slotscops.shard --size {model.size}"
        )

    def crops() -> Iterator[_Labelled]:
        for name in dataset.splits:
            for batch in evaluation_batches(Split(dataset, name, None, with_labels=True), _BATCH_SIZE):
                assert batch.part_labels_small is not None
                classes = [dataset.class_names[number] for number in batch.class_ids.tolist()]
                yield _Labelled(batch.images, batch.part_labels_small.numpy(), classes)

    return {name: dataset.part_names[name] for name in dataset.class_names}, crops()


def _open_photos(
    model: Segmenter, photos: Path, label_folder: Path | None, class_name: str | None
) -> tuple[dict[str, list[str]], Iterator[_Labelled]]:
    """The part names by class and the crops of a folder of photos with label maps."""
    if model.class_names and class_name is None:
        known = ", ".join(model.class_names)
        raise UserError(f"--name-from {photos}: the model has parts for {known}; say with --class what the photos show")
    name = class_name or "object"
    folder = PhotoFolder(photos, label_folder or _find_label_folder(photos), 0.0, name)
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    for image in folder.list_images():
        scan = folder.scan(image, {name: "train"}, [name], dict.fromkeys(SPLITS, 0.0))
        candidates += scan.candidates
        left_out += scan.left_out
    for kind, count in sorted(Counter(item.kind for item in left_out).items()):
        first = next(item for item in left_out if item.kind == kind)
        console.warn(f"not used for names: {count} x {kind}, such as {first.image}: {first.reason}")
    if not candidates:
        raise UserError(f"{photos}: holds no photo with a label map in {folder.label_folder}")

    def crops() -> Iterator[_Labelled]:
        for first in range(0, len(candidates), _BATCH_SIZE):
            records = []
            for one in candidates[first : first + _BATCH_SIZE]:
                read, faults = folder.read(one.image, [one], model.size, DEFAULT_CONTEXT)
                records += read
                for fault in faults:
                    console.warn(f"not used for names: {fault.image}: {fault.reason}")
            if not records:
                continue
            images = np.stack([record.image for record in records])
            labels = np.stack([record.part_labels for record in records])
            yield _Labelled(torch.from_numpy(images).permute(0, 3, 1, 2), labels, [name] * len(records))

    return {name: folder.part_names(name, candidates)}, crops()


def _find_label_folder(photos: Path) -> Path:
    if not photos.is_dir():
        raise UserError(f"--name-from {photos}: no such folder")
    named = sorted(path.parent for path in photos.glob(f"*/{NAMES_FILE}"))
    if len(named) == 1:
        return named[0]
    if not named and (photos / _LABEL_FOLDER).is_dir():
        return photos / _LABEL_FOLDER
    came = f"{len(named)} of its sub-folders hold {NAMES_FILE}" if named else "neither shards nor label maps there"
    raise UserError(
        f"--name-from {photos}: {came}; put the label maps and {NAMES_FILE} into {photos / _LABEL_FOLDER}, or name "
        "their folder with --parts"
    )


# ---- showing -----------------------------------------------------------------------------------------------------


def _show(overlaps: dict[str, Overlaps], by_class: dict[str, list[str | None]], part_numbers: Sequence[int]) -> None:
    """A table of the names with their support, and lines for what has no counterpart."""
    rows: list[tuple[str, ...]] = []
    for key, one in overlaps.items():
        names = by_class[key]
        for row, (number, name) in enumerate(zip(part_numbers, names, strict=True), start=1):
            if name:
                column = 1 + one.part_names.index(name)
                shared = int(one.table[row, column])
                shares = (shared / one.table[row].sum(), shared / one.table[:, column].sum())
                rows.append((f"{key} {number}".strip(), name, *(f"{100 * share:.1f}" for share in shares)))
    console.show_table("names of the parts", ("slot", "name", "% of the slot", "% of the true part"), rows, 2)
    for key, one in overlaps.items():
        of_class = f" of {key}" if key else ""
        slots = [str(number) for number, name in zip(part_numbers, by_class[key], strict=True) if not name]
        parts = [part for part in one.part_names if part not in by_class[key]]
        if slots:
            console.say(f"slots{of_class} without a name: {', '.join(slots)}")
        if parts:
            console.say(f"true parts{of_class} without a slot: {', '.join(parts)}")
