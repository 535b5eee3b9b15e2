"""Crops around objects become records."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotations import (
    HORSE,
    Described,
    annotation,
    jpeg,
    rectangle,
    scan,
    write_tree,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.pixels import Box, Context, square_crop
from slotscops.datasets.pascal_part.classes import (
    PART_NAMES,
)
from slotscops.datasets.pascal_part.crops import read_records
from slotscops.datasets.pascal_part.scan import scan_image
from slotscops.datasets.pascal_part.tree import PascalPartTree

BOXES = st.tuples(st.integers(0, 600), st.integers(0, 600), st.integers(1, 600), st.integers(1, 600)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@given(BOXES)
def test_a_crop_is_square_about_the_box_with_a_margin_on_every_side(box: Box) -> None:
    left, top, right, bottom = square_crop(box)
    side, longer = right - left, max(box[2] - box[0], box[3] - box[1])
    assert side == bottom - top
    margins = (box[0] - left, box[1] - top, right - box[2], bottom - box[3])
    assert min(margins) >= 1
    assert abs(min(margins) - 0.05 * longer) <= 1
    assert abs((left + right) - (box[0] + box[2])) <= 1  # the centre, to half a pixel
    assert abs((top + bottom) - (box[1] + box[3])) <= 1


@given(BOXES, st.text(), st.floats(0, 2), st.floats(0, 1))
def test_a_moved_crop_holds_the_whole_box_and_has_the_side_of_one_that_was_not_moved(
    box: Box, key: str, share: float, portion: float
) -> None:
    moved = square_crop(box, key, Context(share, portion * share))
    left, top, right, _ = square_crop(box, key, Context(share))
    longer = max(box[2] - box[0], box[3] - box[1])
    assert moved[2] - moved[0] == moved[3] - moved[1] == right - left
    assert abs((right - left) - longer * Context(share).side_per_box) <= 2
    assert max(abs(moved[0] - left), abs(moved[1] - top)) <= portion * share * longer + 0.5
    assert moved[0] <= box[0]
    assert moved[1] <= box[1]
    assert moved[2] >= box[2]
    assert moved[3] >= box[3]


def test_the_place_of_a_crop_depends_on_the_key_alone_and_spreads_evenly() -> None:
    box, context = (0, 0, 1000, 1000), Context(0.5, 0.5)
    assert square_crop(box, "2008_000008_0", context) == (-90, -421, 1910, 1579)  # the same for ever
    places = np.array([square_crop(box, str(number), context)[:2] for number in range(2000)]) + 500
    assert (abs(places.mean(axis=0)) < 25).all()
    assert (abs(places.std(axis=0) - 1000 / 12**0.5) < 20).all()


def lossless_tree(tmp_path: Path, objects: list[Described], photo: NDArray[np.uint8], **options: Any) -> PascalPartTree:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=100, subsampling=0)
    return write_tree(tmp_path, {"a": annotation(objects)}, photo=file.getvalue(), **options)


@given(st.integers(0, 60), st.integers(0, 40), st.integers(16, 60), st.integers(16, 60), st.sampled_from([32, 64, 97]))
@settings(max_examples=40, deadline=None)
def test_the_masks_of_a_crop_lie_where_the_photo_shows_them(
    tmp_path_factory: pytest.TempPathFactory, left: int, top: int, width: int, height: int, size: int
) -> None:
    mask = rectangle(120, 100, (left, top, left + width, top + height))
    part = rectangle(120, 100, (left, top, left + width // 2, top + height))
    photo = np.zeros((100, 120, 3), np.uint8)
    photo[..., 0], photo[..., 1] = mask * 255, part * 255
    tree = lossless_tree(tmp_path_factory.mktemp("tree"), [("horse", mask, [("head", part)])], photo)
    splits = {"horse": "train"}
    (candidate,) = scan_image(tree, "a", splits, ["horse"], {"train": 0.0}).candidates
    (record,), left_out = read_records(tree, "a", [candidate], size)
    assert left_out == []
    assert record.image.shape == (size, size, 3)
    assert record.part_labels.shape == record.object_mask.shape == (size, size)
    # Red is the object, green its part; only pixels on an edge may differ, and the fill beyond the photo is grey.
    fill = (np.abs(record.image.astype(int) - (124, 116, 104)) < 40).all(axis=2)
    wrong = ((record.image[..., 0] > 127) != record.object_mask) & ~fill
    wrong |= ((record.image[..., 1] > 127) != (record.part_labels == 1)) & ~fill
    edges = np.zeros_like(wrong)
    for values in (record.object_mask, record.part_labels, fill):
        for axis in (0, 1):
            for shift in (-1, 1):
                edges |= np.roll(values, shift, axis) != values
    assert not (wrong & ~edges).any()


def test_a_crop_beyond_the_photo_is_filled_with_the_mean_colour_of_imagenet(tmp_path: Path) -> None:
    mask = rectangle(60, 40, (0, 0, 60, 40))
    tree = lossless_tree(tmp_path, [("horse", mask, [("head", mask)])], np.full((40, 60, 3), 255, np.uint8))
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 66)
    assert record.description["crop"] == [-3, -13, 63, 53]  # 66 a side: resizing changes nothing
    np.testing.assert_array_equal(record.image[:13], np.broadcast_to((124, 116, 104), (13, 66, 3)))
    np.testing.assert_array_equal(record.image[13:53, 3:63], 255)
    np.testing.assert_array_equal(record.object_mask, rectangle(66, 66, (3, 13, 63, 53)))
    np.testing.assert_array_equal(record.part_labels, rectangle(66, 66, (3, 13, 63, 53)))


def test_a_record_says_where_it_comes_from_and_which_parts_it_shows(tmp_path: Path) -> None:
    mask = rectangle(60, 40, (10, 10, 40, 30))
    hidden = rectangle(60, 40, (11, 11, 13, 13))
    parts = [("tail", mask), ("leye", hidden), ("head", rectangle(60, 40, (30, 10, 41, 30)))]
    tree = write_tree(tmp_path, {"a": annotation([("cow", mask, []), ("horse", mask, parts)])})
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 32)
    assert record.key == "a_1"
    assert record.description == {
        "image": "a",
        "object": 1,
        "class": "horse",
        "box": [10, 10, 40, 30],
        "crop": [8, 3, 42, 37],
        "source_size": [60, 40],
        "part_names": ["head", "tail"],  # in the order of the labels; the eye lies below the tail
    }
    assert set(np.unique(record.part_labels)) == {0, 1, PART_NAMES["horse"].index("tail") + 1}


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_photos_become_rgb(tmp_path: Path, mode: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, photo=jpeg(60, 40, mode))
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 32)
    assert record.image.shape == (32, 32, 3)
    assert record.image.flags.writeable


def test_a_photo_turned_by_exif_stays_as_its_pixels_lie(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "JPEG", exif=exif)
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, photo=file.getvalue())
    assert len(read_records(tree, "a", scan(tree).candidates, 32)[0]) == 1


def test_a_photo_cut_short_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE])}, photo=jpeg(60, 40)[:1500])
    candidates = scan(tree).candidates
    assert len(candidates) == 2
    records, left_out = read_records(tree, "a", candidates, 32)
    assert records == []
    assert [(item.object_number, item.class_name, item.split) for item in left_out] == [
        (0, "horse", "train"),
        (1, "horse", "train"),
    ]
    assert all(item.damaged and "photo is damaged (image file is truncated" in item.reason for item in left_out)


@pytest.mark.parametrize(
    "objects",
    [[], [("cow", *HORSE[1:])], [("horse", HORSE[1][::-1, ::-1], HORSE[2])], [("horse", HORSE[1], [("x", HORSE[1])])]],
)
def test_an_annotation_that_changed_between_the_phases_is_damage(tmp_path: Path, objects: list[Described]) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    candidates = scan(tree).candidates
    tree.annotation_path("a").write_bytes(annotation(objects))
    records, (left_out,) = read_records(tree, "a", candidates, 32)
    assert records == []
    assert left_out.damaged
    assert "a.mat: has changed since it was scanned" in left_out.reason


def test_everything_that_travels_between_processes_can_be_pickled(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, ("horse", HORSE[1], [])])})
    found = scan(tree)
    assert pickle.loads(pickle.dumps((tree, found))) == (tree, found)
    (record,), _ = pickle.loads(pickle.dumps(read_records(tree, "a", found.candidates, 32)))
    assert record.key == "a_0"
