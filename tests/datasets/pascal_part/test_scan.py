"""Which objects are kept: every object is accounted for, and damage costs only its own image."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from annotations import HORSE, Described, annotation, jpeg, rectangle, scan, write_tree

from slotscops.datasets.pascal_part.scan import scan_image
from slotscops.datasets.sources import Candidate


def sized(width: int, parts: bool = True) -> Described:
    """An object whose box covers `width` of 1000 pixels."""
    mask = rectangle(1000, 1, (0, 0, width, 1))
    return ("horse", mask, [("head", mask)] if parts else [])


@pytest.mark.parametrize(("split", "limit"), [("train", 100), ("val", 200)])
def test_a_box_must_cover_more_than_the_limit_of_its_split(tmp_path: Path, split: str, limit: int) -> None:
    objects = [sized(width) for width in (limit - 1, limit, limit + 1)]
    tree = write_tree(tmp_path, {"a": annotation(objects)}, lists={f"{split}.txt": "a"}, photo=jpeg(1000, 1))
    found = scan(tree)
    assert found.candidates == [Candidate("a", 2, "horse", split, (0, 0, limit + 1, 1))]
    assert [item.object_number for item in found.left_out] == [0, 1]
    assert all(f"box covers no more than {limit // 10} % of the image" in item.kind for item in found.left_out)
    assert f"its box covers {limit / 10 - 0.1:.3g} % of the image" in found.left_out[0].reason
    assert not any(item.damaged for item in found.left_out)
    assert len(scan_image(tree, "a", {"horse": split}, ["horse"], {split: 0.0}).candidates) == 3


def test_every_object_of_a_wanted_class_is_kept_or_left_out_with_a_reason(tmp_path: Path) -> None:
    empty = np.zeros_like(HORSE[1])
    objects: list[Described] = [
        HORSE,
        ("cow", HORSE[1], []),  # asked for by nobody
        ("horse", HORSE[1], []),
        ("horse", empty, [("head", empty)]),
        ("horse", HORSE[1], [("lhorn", HORSE[1])]),
        ("dog", HORSE[1], [("head", HORSE[1])]),  # its class's lists do not name the image
        ("unicorn", HORSE[1], [("head", HORSE[1])]),
    ]
    lists = {"horse_train.txt": "a 1", "dog_train.txt": "b 1"}
    found = scan(write_tree(tmp_path, {"a": annotation(objects)}, lists=lists), classes="horse,dog")
    assert found.candidates == [Candidate("a", 0, "horse", "train", (5, 5, 45, 35))]
    assert [(item.object_number, item.class_name, item.split, item.kind, item.damaged) for item in found.left_out] == [
        (2, "horse", "train", "no parts annotated", False),
        (3, "horse", "train", "empty mask", False),
        (4, "horse", "train", "unknown part", True),
        (5, "dog", None, "in no split list", False),
        (6, "unicorn", None, "unknown class", True),
    ]
    assert "no part 'lhorn' of horse" in found.left_out[2].reason


def test_an_image_in_no_list_is_left_out_without_looking_at_its_photo(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE])}, lists={"train.txt": "b"})
    tree.photo_path("a").unlink()
    found = scan(tree)
    assert [(item.kind, item.object_number) for item in found.left_out] == [("in no split list", n) for n in (0, 1)]


def oversized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    content = jpeg(60, 40)
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + height.to_bytes(2) + width.to_bytes(2) + content[place + 4 :]


@pytest.mark.parametrize(
    ("photo", "wanted"),
    [
        (None, r"a\.jpg: no such file"),
        (b"", r"a\.jpg: is no readable JPEG"),
        (b"GIF89a" + bytes(99), r"a\.jpg: is no readable JPEG"),
        (jpeg(60, 40)[:30], r"a\.jpg: is no readable JPEG"),
        (jpeg(40, 60), r"a\.jpg: photo of 40 x 60, but masks of 60 x 40"),
        (oversized_jpeg(65_000, 60_000), r"a\.jpg: photo of more than 10000 pixels a side"),
        (oversized_jpeg(9_900, 9_900), r"a\.jpg: photo of 9900 x 9900, but masks of 60 x 40"),
        (oversized_jpeg(10_001, 2), r"a\.jpg: photo of more than 10000 pixels a side"),
    ],
)
def test_a_damaged_photo_leaves_out_every_object_and_costs_no_other_image(
    tmp_path: Path, photo: bytes | None, wanted: str
) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE]), "b": annotation([HORSE])})
    if photo is None:
        tree.photo_path("a").unlink()
    else:
        tree.photo_path("a").write_bytes(photo)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        found = scan(tree)
    assert not leaked
    assert found.candidates == []
    assert [(item.object_number, item.split, item.damaged) for item in found.left_out] == [
        (0, "train", True),
        (1, "train", True),
    ]
    assert all(re.search(wanted, item.reason) for item in found.left_out)
    assert len(scan(tree, "b").candidates) == 1


@pytest.mark.parametrize("content", [None, b"", annotation([HORSE])[:-9]])
def test_a_damaged_annotation_leaves_out_its_image_and_costs_no_other(tmp_path: Path, content: bytes | None) -> None:
    tree = write_tree(tmp_path, {"a": content or b"", "b": annotation([HORSE])})
    if content is None:
        tree.annotation_path("a").unlink()
    (left_out,) = scan(tree).left_out
    assert (left_out.object_number, left_out.class_name, left_out.split) == (None, None, "train")
    assert left_out.damaged
    assert "a.mat" in left_out.reason
    assert len(scan(tree, "b").candidates) == 1
