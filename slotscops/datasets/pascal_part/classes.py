"""PASCAL-Part's classes and their parts, as `part2ind.m` of the data set lists them. A part's label is position + 1."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slotscops.core.errors import UserError, suggest

_VEHICLE = (
    "frontside", "leftside", "rightside", "backside", "roofside", "leftmirror", "rightmirror", "fliplate", "bliplate",
    "door", "wheel", "headlight", "window",
)  # fmt: skip
_HEAD = ("head", "leye", "reye", "lear", "rear")
_PAWS = ("lfleg", "lfpa", "rfleg", "rfpa", "lbleg", "lbpa", "rbleg", "rbpa")
_LEGS = ("lfuleg", "lflleg", "rfuleg", "rflleg", "lbuleg", "lblleg", "rbuleg", "rblleg")
_HORNED = (*_HEAD, "muzzle", "lhorn", "rhorn", "torso", "neck", *_LEGS, "tail")

PART_NAMES: dict[str, tuple[str, ...]] = {
    "aeroplane": ("body", "stern", "lwing", "rwing", "tail", "engine", "wheel"),
    "bicycle": ("fwheel", "bwheel", "saddle", "handlebar", "chainwheel", "headlight"),
    "bird": (
        "head", "leye", "reye", "beak", "torso", "neck", "lwing", "rwing", "lleg", "lfoot", "rleg", "rfoot", "tail",
    ),
    "boat": (),
    "bottle": ("cap", "body"),
    "bus": _VEHICLE,
    "car": _VEHICLE,
    "cat": (*_HEAD, "nose", "torso", "neck", *_PAWS, "tail"),
    "chair": (),
    "cow": _HORNED,
    "diningtable": (),
    "dog": (*_HEAD, "nose", "torso", "neck", *_PAWS, "tail", "muzzle"),
    "horse": (*_HEAD, "muzzle", "torso", "neck", *_LEGS, "tail", "lfho", "rfho", "lbho", "rbho"),
    "motorbike": ("fwheel", "bwheel", "handlebar", "saddle", "headlight"),
    "person": (
        *_HEAD, "lebrow", "rebrow", "nose", "mouth", "hair", "torso", "neck", "llarm", "luarm", "lhand", "rlarm",
        "ruarm", "rhand", "llleg", "luleg", "lfoot", "rlleg", "ruleg", "rfoot",
    ),
    "pottedplant": ("pot", "plant"),
    "sheep": _HORNED,
    "sofa": (),
    "train": (
        "head", "hfrontside", "hleftside", "hrightside", "hbackside", "hroofside", "headlight", "coach", "cfrontside",
        "cleftside", "crightside", "cbackside", "croofside",
    ),
    "tvmonitor": ("screen",),
}  # fmt: skip
_ALIASES = {"table": "diningtable"}  # the annotations' own name


def class_name_of(name: str) -> str:
    """VOC's name of a class."""
    return _ALIASES.get(name, name)


def part_name_of(name: str) -> str:
    """The part's name without the number of its instance: `wheel_1` -> `wheel`."""
    return re.sub(r"_\d+$", "", name)


def part_label(class_name: str, part_name: str) -> int | None:
    """1-based label of a part as the file names it; None where the table does not know it."""
    names = PART_NAMES.get(class_name, ())
    plain = part_name_of(part_name)
    return names.index(plain) + 1 if plain in names else None


@dataclass(frozen=True)
class AnnotatedObject:
    """One object as the annotation has it."""

    class_name: str  # VOC's name
    mask: NDArray[np.bool_]  # (H, W)
    parts: list[tuple[str, NDArray[np.bool_]]]  # (name as in the file, (H, W) mask), in the file's order


def paint_parts(item: AnnotatedObject, smallest_on_top: bool = False) -> NDArray[np.uint8]:
    """(H, W) part labels, 0 = none.

    Where masks overlap, the part that the file lists first stays on top, as in Choudhury et al. If it lists the head
    before the eyes, the head hides them.

    Args:
        smallest_on_top: the mask with the fewest pixels stays on top instead; of equal ones, the first listed.
    """
    parts = item.parts
    if smallest_on_top:
        parts = sorted(parts, key=lambda part: int(np.count_nonzero(part[1])))  # stable
    labels = np.zeros_like(item.mask, np.uint8)
    for name, mask in reversed(parts):
        label = part_label(item.class_name, name)
        assert label is not None  # scan_image leaves such objects out
        np.copyto(labels, np.uint8(label), where=mask)
    return labels


def check_class_names(names: Iterable[str]) -> list[str]:
    """The classes in the table's order, each once.

    Raises:
        UserError: a class that PASCAL-Part does not have.
    """
    wanted = {class_name_of(name.strip()) for name in names}
    for name in sorted(wanted - set(PART_NAMES)):
        hint = suggest(name, [*PART_NAMES, *_ALIASES]) or f"; known are {', '.join(PART_NAMES)}"
        raise UserError(f"unknown class '{name}'{hint}")
    return [name for name in PART_NAMES if name in wanted]
