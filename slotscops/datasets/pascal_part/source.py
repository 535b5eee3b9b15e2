"""PASCAL-Part as a source of objects to shard."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slotscops.core.photos import shown_name
from slotscops.core.pixels import Context
from slotscops.core.records import Record
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.crops import read_records
from slotscops.datasets.pascal_part.scan import scan_image
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, list_images, list_passed_over, open_tree
from slotscops.datasets.pascal_part.whole_photos import read_whole_photo
from slotscops.datasets.sources import WHOLE_FOLDER, Candidate, ImageScan, LeftOut, SplitAssignment, WholePhoto


@dataclass(frozen=True)
class PascalPart:
    """PASCAL-Part, in folders or in its archives."""

    tree: PascalPartTree

    @property
    def root(self) -> Path:
        return self.tree.root

    def list_images(self) -> list[str]:
        passed_over = [WHOLE_FOLDER] if list_passed_over(self.tree) else []
        return [*list_images(self.tree), *passed_over]

    def splits(self, class_names: list[str]) -> SplitAssignment:
        return find_splits(self.tree, class_names)

    def scan(
        self, image: str, split_of_class: dict[str, str], class_names: list[str], min_box_share: Mapping[str, float]
    ) -> ImageScan:
        if image == WHOLE_FOLDER:
            return ImageScan([], [_passed_over(name, reason) for name, reason in list_passed_over(self.tree)])
        return scan_image(self.tree, image, split_of_class, class_names, dict(min_box_share))

    def read(
        self, image: str, candidates: list[Candidate], size: int, context: Context
    ) -> tuple[list[Record], list[LeftOut]]:
        return read_records(self.tree, image, candidates, size, context)

    def read_whole(self, image: str, class_name: str, ignored: Sequence[str]) -> WholePhoto:
        return read_whole_photo(self.tree, image, class_name, ignored)

    def part_names(self, class_name: str, candidates: list[Candidate]) -> list[str]:
        return list(PART_NAMES[class_name])


def _passed_over(name: str, reason: str) -> LeftOut:
    return LeftOut(shown_name(name), None, None, None, "no annotation", reason, damaged=True)


@contextmanager
def open_pascal_part(root: Path, scratch: Path) -> Iterator[PascalPart]:
    """As `open_tree`."""
    with open_tree(root, scratch) as tree:
        yield PascalPart(tree)
