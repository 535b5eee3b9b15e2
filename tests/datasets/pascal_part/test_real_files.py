"""The real annotations and photos."""

from pathlib import Path

import numpy as np
import scipy.io
from annotations import scan

from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import (
    PART_NAMES,
)
from slotscops.datasets.pascal_part.crops import read_records
from slotscops.datasets.pascal_part.scan import BOX_SHARE, scan_image
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, find_tree, list_images
from slotscops.datasets.sources import ImageScan


def scan_all(tree: PascalPartTree) -> list[tuple[str, ImageScan]]:
    names = list(PART_NAMES)
    splits = find_splits(tree, names)
    return [(image, scan_image(tree, image, splits.of_image(image), names, BOX_SHARE)) for image in list_images(tree)]


def test_each_of_the_22_objects_of_the_real_photos_is_accounted_for(real_data: Path) -> None:
    tree = find_tree(real_data / "pascal_part")
    found = scan_all(tree)
    assert len(found) == 11
    kept = {f"{item.image}_{item.object_number}": item for _, result in found for item in result.candidates}
    left_out = {f"{item.image}_{item.object_number}": item for _, result in found for item in result.left_out}
    # Counted by hand from what scipy.io.loadmat shows: class and split of the 12 kept, 10 boxes too small.
    assert {key: (item.class_name, item.split) for key, item in kept.items()} == {
        "2008_000008_1": ("horse", "train"), "2008_000019_0": ("dog", "train"), "2008_000019_1": ("dog", "train"),
        "2008_000019_2": ("dog", "train"), "2008_000026_0": ("person", "val"), "2008_000652_0": ("person", "train"),
        "2008_000700_0": ("person", "train"), "2008_000726_0": ("person", "train"),
        "2008_000726_1": ("person", "train"), "2008_000939_1": ("car", "val"), "2008_003228_1": ("person", "train"),
        "2008_003228_2": ("person", "train"),
    }  # fmt: skip
    assert sorted(left_out) == [
        "2008_000008_0", "2008_000009_0", "2008_000009_1", "2008_000026_1", "2008_000939_0", "2008_001978_0",
        "2008_003228_0", "2008_003228_3", "2008_003497_0", "2008_003497_1",
    ]  # fmt: skip
    assert {item.kind for item in left_out.values()} == {
        "box covers no more than 10 % of the image",
        "box covers no more than 20 % of the image",
    }


def test_real_annotations_read_as_scipy_reads_them(real_data: Path) -> None:
    for path in sorted((real_data / "pascal_part" / "Annotations_Part").glob("*.mat")):
        rows = scipy.io.loadmat(path)["anno"][0, 0]["objects"].flat
        for item, row in zip(read_annotation(path), rows, strict=True):
            assert item.class_name == row["class"].item()
            np.testing.assert_array_equal(item.mask, row["mask"])
            assert [name for name, _ in item.parts] == [part["part_name"].item() for part in row["parts"].flat]
            for (_, mask), part in zip(item.parts, row["parts"].flat, strict=True):
                np.testing.assert_array_equal(mask, part["mask"])


def test_the_real_horse_becomes_a_record(real_data: Path) -> None:
    tree = find_tree(real_data / "pascal_part")
    (record,), left_out = read_records(tree, "2008_000008", scan(tree, "2008_000008").candidates, 128)
    assert left_out == []
    assert record.description["source_size"] == [500, 442]
    assert record.description["part_names"] == [
        "head", "torso", "neck", "lfuleg", "lflleg", "lbuleg", "lblleg", "tail", "lfho", "lbho",
    ]  # fmt: skip
    assert 0.1 < record.object_mask.mean() < 0.5
    assert ((record.part_labels > 0) <= record.object_mask).all()


def test_all_800_real_faces_are_kept_in_their_splits(real_data: Path) -> None:
    found = [item for _, result in scan_all(find_tree(real_data / "faces")) for item in result.candidates]
    assert {split: sum(item.split == split for item in found) for split in BOX_SHARE} == {"train": 650, "val": 150}
    assert {item.class_name for item in found} == {"person"}
