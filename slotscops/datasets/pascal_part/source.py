"""PASCAL-Part as a source of objects to shard."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slotscops.core.records import Record
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.crops import read_records
from slotscops.datasets.pascal_part.scan import scan_image
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, list_images, open_tree
from slotscops.datasets.sources import Candidate, ImageScan, LeftOut, SplitAssignment


@dataclass(frozen=True)
class PascalPart:
    """PASCAL-Part, in folders or in its archives."""

    tree: PascalPartTree

    @property
    def root(self) -> Path:
        return self.tree.root

    def list_images(self) -> list[str]:
        return list_images(self.tree)

    def splits(self, class_names: list[str]) -> SplitAssignment:
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
