"""Where objects to shard come from: each source lists its images, sorts their objects and crops the kept ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slotscops.core.records import Record
from slotscops.datasets.pascal_part.annotation import Candidate, ImageScan, LeftOut, read_records, scan_image
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, list_images, open_tree


class SplitsOfImages(Protocol):
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

    def splits(self, class_names: list[str]) -> SplitsOfImages:
        """Raises UserError where the splits contradict each other."""

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        """Each object of the image is kept or left out with the reason."""

    def read(self, image: str, candidates: list[Candidate], size: int) -> tuple[list[Record], list[LeftOut]]:
        """Crops the kept objects of one image to `size` x `size`; what turns out to be damaged is left out."""

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        """The class's part table; part label = position + 1."""


@dataclass(frozen=True)
class PascalPart:
    """PASCAL-Part, in folders or in its archives."""

    tree: PascalPartTree

    @property
    def root(self) -> Path:
        return self.tree.root

    def list_images(self) -> list[str]:
        return list_images(self.tree)

    def splits(self, class_names: list[str]) -> SplitsOfImages:
        return find_splits(self.tree, class_names)

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        return scan_image(self.tree, image, split_of_class, class_names, dict(min_box_share))

    def read(self, image: str, candidates: list[Candidate], size: int) -> tuple[list[Record], list[LeftOut]]:
        return read_records(self.tree, image, candidates, size)

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        return list(PART_NAMES[class_name])


@contextmanager
def open_pascal_part(root: Path, scratch: Path) -> Iterator[PascalPart]:
    """As `open_tree`."""
    with open_tree(root, scratch) as tree:
        yield PascalPart(tree)
