from pathlib import Path

import numpy as np
import pytest

from slotscops.core.errors import UserError
from slotscops.core.records import IGNORED
from slotscops.datasets.merging import open_merge
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.groups import PASCAL_PART_116

WITH_PARTS = {name: list(parts) for name, parts in PART_NAMES.items() if parts}


def test_left_and_right_become_one_part_and_front_and_back_stay_two() -> None:
    merge = open_merge("left-right", WITH_PARTS)
    assert merge.part_names["cat"] == (
        ["head", "eye", "ear", "nose", "torso", "neck", "fleg", "fpa", "bleg", "bpa", "tail"]
    )
    assert merge.part_names["bus"][:4] == ["frontside", "side", "backside", "roofside"]
    assert merge.part_names["train"][1:5] == ["hfrontside", "hside", "hbackside", "hroofside"]
    assert merge.part_names["bicycle"] == WITH_PARTS["bicycle"]
    assert merge.groups["bird"]["wing"] == ["lwing", "rwing"]
    one = open_merge("left-right", {"mug": ["left_grip", "right_grip", "lid", "rid"]})
    assert one.part_names == {"mug": ["grip", "lid", "rid"]}  # only PASCAL-Part's names are abbreviated


def test_the_groups_of_pascal_part_116_are_116_parts_made_of_parts_that_exist() -> None:
    merge = open_merge("pascal-part-116", WITH_PARTS)
    assert sum(map(len, merge.part_names.values())) == 116
    assert {name: len(parts) for name, parts in merge.part_names.items()} == {
        "aeroplane": 6, "bicycle": 5, "bird": 9, "bottle": 2, "bus": 10, "car": 10, "cat": 9, "cow": 9, "dog": 10,
        "horse": 9, "motorbike": 4, "person": 14, "pottedplant": 2, "sheep": 9, "train": 7, "tvmonitor": 1,
    }  # fmt: skip
    assert set(merge.part_names["person"]) == {
        "head", "eye", "torso", "neck", "leg", "foot", "nose", "ear", "eyebrow", "mouth", "hair", "lower arm",
        "upper arm", "hand",
    }  # fmt: skip
    for name, groups in PASCAL_PART_116.items():
        members = [part for parts in groups.values() for part in parts]
        assert set(members) <= set(PART_NAMES[name])
        assert len(members) == len(set(members))


def test_merged_labels_keep_no_part_and_ignored_pixels_and_follow_the_new_names() -> None:
    merge = open_merge("pascal-part-116", {"horse": WITH_PARTS["horse"]})
    horse, names = WITH_PARTS["horse"], merge.part_names["horse"]
    old = np.array(
        [0, IGNORED, *(horse.index(part) + 1 for part in ("head", "lear", "rear", "rblleg", "tail"))], np.uint8
    )
    new = [0, IGNORED, *(names.index(part) + 1 for part in ("head", "ear", "ear", "leg", "tail"))]
    assert merge.apply(old[None], "horse").tolist() == [new]


def test_a_file_groups_parts_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "coarse.yaml"
    path.write_text("horse: {head: [head, leye, reye], end: [tail]}\ncow: {head: [head]}\n")
    merge = open_merge(str(path), {"horse": ["head", "leye", "reye", "torso", "tail"]})
    assert merge.name == "coarse.yaml"
    assert merge.part_names == {"horse": ["head", "torso", "end"]}
    assert merge.groups == {"horse": {"head": ["head", "leye", "reye"]}}


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (None, "no such file or preset"),
        ("cat: {}", "names none of the classes horse"),
        ("{horse: {}, mouse: {}}", "unknown class 'mouse'; did you mean 'horse'"),
        ("horse: [head]", "needed 'CLASS"),
        ("horse: {head: leye}", "needed 'CLASS"),
        ('horse: {"a\\u001bb": [head]}', "needed 'CLASS"),
        ("horse: {eye: [leye, rey]}", "unknown part 'rey'; did you mean 'reye'"),
        ("horse: {eye: [leye, [reye]]}", "unknown part \"\\['reye'\\]\""),
        ("horse: {eye: [leye, reye], face: [reye]}", "'reye' is in two groups"),
        ("horse: {tail: [leye, reye]}", "'tail' is a part of its own"),
        ("horse: {eye: [leye", "is not YAML"),
    ],
)
def test_groups_that_do_not_fit_are_one_line(tmp_path: Path, text: str | None, needed: str) -> None:
    path = tmp_path / "map.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=needed) as raised:
        open_merge(str(path), {"horse": ["head", "leye", "reye", "tail"]})
    assert "\n" not in str(raised.value)


def test_the_preset_for_pascal_part_refuses_other_parts() -> None:
    with pytest.raises(UserError, match="those of class 'object' here are others"):
        open_merge("pascal-part-116", {"object": ["part_1"]})
