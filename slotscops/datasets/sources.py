"""What every source of objects has in common: it lists its images, sorts their objects, and crops the kept ones."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.pixels import Box, Context
from slotscops.core.records import Record

SPLITS = ("train", "val")
WHOLE_FOLDER = "."  # stands in a list of images for all that the search for them passed over


@dataclass(frozen=True)
class Candidate:
    """An object that is to become a record."""

    image: str
    object_number: int  # from 0, in the file's order
    class_name: str
    split: str
    box: Box
    highest_label: int = 0  # of its parts, where the source has no table of their names


@dataclass(frozen=True)
class LeftOut:
    """Something that becomes no record, and why."""

    image: str
    object_number: int | None  # None: the whole image
    class_name: str | None
    split: str | None
    kind: str  # the general reason, by which items are counted
    reason: str  # the exact reason
    damaged: bool  # whether a file is at fault; otherwise a setting left the item out


def count_kinds(left_out: Iterable[LeftOut]) -> str:
    """How many items were left out for which general reason, the most frequent first: '9 x box too small, 3 x ...'."""
    return ", ".join(f"{count} x {kind}" for kind, count in Counter(item.kind for item in left_out).most_common())


class ImageScan(NamedTuple):
    """What becomes of each object of the wanted classes in one image."""

    candidates: list[Candidate]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class WholePhoto:
    """An uncropped photo and the true parts of all objects of one class in it. H x W are the photo's pixels."""

    photo: Image.Image  # RGB
    part_labels: NDArray[np.uint8]  # (H, W) part label, 0 = no part, or IGNORED; first listed on top
    part_labels_small: NDArray[np.uint8]  # (H, W) the same with the smallest part on top


class SplitAssignment(Protocol):
    """Which split an object belongs to: by its class and its image."""

    def of_image(self, image: str) -> dict[str, str]:
        """class -> split, for the classes whose lists name the image."""


class Source(Protocol):
    """Photos with their objects. Sources travel to worker processes: they are small and hold no open file."""

    @property
    def root(self) -> Path:
        """Folder of the source, which messages name."""

    def list_images(self) -> list[str]:
        """Names of all images, each once, sorted."""

    def splits(self, class_names: list[str]) -> SplitAssignment:
        """Raises UserError where the splits contradict each other."""

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        """Each object of the image is kept or left out with the reason."""

    def read(
        self, image: str, candidates: list[Candidate], size: int, context: Context
    ) -> tuple[list[Record], list[LeftOut]]:
        """Crops the kept objects of one image to `size` x `size`; what turns out to be damaged is left out."""

    def read_whole(self, image: str, class_name: str, ignored: Sequence[str]) -> WholePhoto:
        """An uncropped photo with the true parts of every object of a class, however small the object is.

        Args:
            image: one of `list_images`.
            ignored: classes whose objects are to be ignored.

        Raises:
            UserError: the photo or its annotation cannot be read, or there is none.
        """

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        """The class's part table; part label = position + 1."""
