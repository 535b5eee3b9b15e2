"""The table of classes and parts, and how overlapping parts are painted."""

import io

import numpy as np
import pytest
from annotations import (
    Described,
    annotation,
    described_objects,
)
from hypothesis import given, settings

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import (
    PART_NAMES,
    AnnotatedObject,
    check_class_names,
    paint_parts,
    part_label,
)


def test_the_table_has_the_20_classes_of_voc_in_its_order_and_every_part_once() -> None:
    assert len(PART_NAMES) == 20
    assert list(PART_NAMES) == sorted(PART_NAMES)
    assert all(len(set(names)) == len(names) <= 24 for names in PART_NAMES.values())
    assert {name: len(names) for name, names in PART_NAMES.items() if name in ("person", "dog", "horse", "car")} == {
        "person": 24, "dog": 18, "horse": 21, "car": 13,
    }  # fmt: skip
    assert [name for name, names in PART_NAMES.items() if not names] == ["boat", "chair", "diningtable", "sofa"]


def test_a_part_has_its_position_as_label_whatever_its_number() -> None:
    assert part_label("aeroplane", "body") == 1
    assert part_label("aeroplane", "wheel_12") == part_label("aeroplane", "wheel") == 7
    assert part_label("horse", "lfho") == 18
    assert part_label("horse", "lhorn") is None
    assert part_label("unicorn", "head") is None


def test_classes_are_checked_with_a_suggestion_and_table_is_the_diningtable() -> None:
    assert check_class_names(["table", " horse", "cow", "cow"]) == ["cow", "diningtable", "horse"]
    with pytest.raises(UserError, match="unknown class 'hrose'; did you mean 'horse'"):
        check_class_names(["cow", "hrose"])
    with pytest.raises(UserError, match="unknown class 'xyz'; known are aeroplane, bicycle"):
        check_class_names(["xyz"])


@given(described_objects())
@settings(max_examples=100, deadline=None)
def test_where_parts_overlap_the_first_listed_stays_on_top(objects: list[Described]) -> None:
    for item in read_annotation(io.BytesIO(annotation(objects))):
        labels = paint_parts(item)
        assert labels.dtype == np.uint8
        for y, x in np.ndindex(labels.shape):
            here = [part_label(item.class_name, name) for name, mask in item.parts if mask[y, x]]
            assert labels[y, x] == (here[0] if here else 0)


@given(described_objects())
@settings(max_examples=100, deadline=None)
def test_painted_the_other_way_the_smallest_part_stays_on_top(objects: list[Described]) -> None:
    for item in read_annotation(io.BytesIO(annotation(objects))):
        labels = paint_parts(item, smallest_on_top=True)
        assert ((labels > 0) == (paint_parts(item) > 0)).all()
        for y, x in np.ndindex(labels.shape):
            here = [(int(mask.sum()), place) for place, (_, mask) in enumerate(item.parts) if mask[y, x]]
            if here:
                name, _ = item.parts[min(here)[1]]
                assert labels[y, x] == part_label(item.class_name, name)


def test_a_label_of_each_class_is_its_place_in_the_table() -> None:
    mask = np.ones((1, 1), np.bool_)
    for name, parts in PART_NAMES.items():
        for place, part in enumerate(parts):
            assert paint_parts(AnnotatedObject(name, mask, [(f"{part}_2", mask)])).item() == place + 1
