"""Several true parts that are scored as one, such as the left and the right ear.

Shapes: H x W pixels of a label map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slotscops.config import read_yaml
from slotscops.core.errors import UserError, suggest
from slotscops.core.records import IGNORED
from slotscops.datasets.pascal_part.classes import PART_NAMES
from slotscops.datasets.pascal_part.groups import PASCAL_PART_116

LEFT_RIGHT, PASCAL_PART = "left-right", "pascal-part-116"
PRESETS = (LEFT_RIGHT, PASCAL_PART)
_FORM = "needed 'CLASS: {NEW: [PART, ...]}', such as 'horse: {ear: [lear, rear]}'"

Groups = Mapping[str, Sequence[str]]  # name of the merged part -> the parts it is made of


@dataclass(frozen=True)
class PartMerge:
    """Which true parts count as one. Parts that belong to no group stay as they are."""

    name: str  # of the preset, or of the file without its folder
    part_names: dict[str, list[str]]  # by class, after merging; part label = position + 1
    groups: dict[str, dict[str, list[str]]]  # by class: merged part -> the parts it is made of, of two parts or more
    _lookup: dict[str, NDArray[np.uint8]]  # by class: (256,) new label of each old one

    def apply(self, labels: NDArray[np.uint8], class_name: str) -> NDArray[np.uint8]:
        """(H, W) labels of merged parts from (H, W) labels of the class's own parts. 255 stays 255.

        The paint order was decided before: a part of two halves is as small as its halves where parts overlap.
        """
        return self._lookup[class_name][labels]


def open_merge(name_or_path: str, part_names: Mapping[str, Sequence[str]]) -> PartMerge:
    """The merge of a preset, or of a YAML file `CLASS: {NEW: [PART, ...]}`.

    Args:
        part_names: the parts of the data set, by class.

    Raises:
        UserError: no such preset or file, or the groups do not fit the parts.
    """
    if name_or_path == LEFT_RIGHT:
        groups_of: Mapping[str, Groups] = {name: _left_right(name, parts) for name, parts in part_names.items()}
    elif name_or_path == PASCAL_PART:
        foreign = [name for name, parts in part_names.items() if list(parts) != list(PART_NAMES.get(name, ()))]
        if foreign:
            raise UserError(
                f"--merge {PASCAL_PART}: merges the parts of PASCAL-Part; those of class '{foreign[0]}' here are "
                "others; give a YAML file"
            )
        groups_of = {name: PASCAL_PART_116.get(name, {}) for name in part_names}
    else:
        groups_of = _read_groups(name_or_path, part_names)
    merged, lookup, kept = {}, {}, {}
    for name, parts in part_names.items():
        merged[name], lookup[name] = _merge(parts, groups_of.get(name, {}))
        kept[name] = {new: list(old) for new, old in groups_of.get(name, {}).items() if len(old) > 1}
    return PartMerge(Path(name_or_path).name, merged, kept, lookup)


def _merge(parts: Sequence[str], groups: Groups) -> tuple[list[str], NDArray[np.uint8]]:
    """The names after merging, in the order of each one's first part, and the (256,) table of labels."""
    group_of = {old: new for new, members in groups.items() for old in members}
    names: list[str] = []
    lookup = np.full(256, IGNORED, np.uint8)
    lookup[0] = 0
    for label, part in enumerate(parts, start=1):
        new = group_of.get(part, part)
        if new not in names:
            names.append(new)
        lookup[label] = names.index(new) + 1
    return names, lookup


def _left_right(class_name: str, parts: Sequence[str]) -> Groups:
    """Pairs that differ in `left` and `right`, and in PASCAL-Part's classes in a leading l and r."""
    has_short_names = list(parts) == list(PART_NAMES.get(class_name, ()))
    groups: dict[str, tuple[str, str]] = {}
    for part in parts:
        if "left" in part:
            twin, rest = part.replace("left", "right", 1), part.replace("left", "", 1).strip(" _-")
        elif has_short_names and part.startswith("l"):
            twin, rest = f"r{part[1:]}", part[1:]
        else:
            continue
        if twin in parts:
            groups[rest or part] = (part, twin)
    return groups


def _read_groups(path: str, part_names: Mapping[str, Sequence[str]]) -> dict[str, Groups]:
    if not Path(path).exists():
        raise UserError(
            f"--merge {path}: no such file or preset{suggest(path, PRESETS)}; presets are {', '.join(PRESETS)}"
        )
    content = read_yaml(Path(path), "--merge")
    if not set(content) & set(part_names):
        wanted = ", ".join(part_names)
        raise UserError(f"{path}: names none of the classes {wanted}, which are scored; {_FORM}")
    for name in content:
        if name not in part_names and name not in PART_NAMES:  # a file may serve several data sets
            hint = suggest(str(name), part_names) or f"; known are {', '.join(part_names)}"
            raise UserError(f"{path}: unknown class {str(name)!r}{hint}")
    return {name: _check_groups(path, name, content[name], part_names[name]) for name in part_names if name in content}


def _check_groups(path: str, class_name: str, groups: Any, parts: Sequence[str]) -> Groups:
    where = f"{path}, class {class_name}"
    if not isinstance(groups, dict) or not all(
        isinstance(new, str) and new.strip() and new.isprintable() and isinstance(old, list) and old
        for new, old in groups.items()
    ):
        raise UserError(f"{where}: {_FORM}")
    members = [part for old in groups.values() for part in old]
    for part in members:
        if part not in parts:
            hint = suggest(str(part), parts) or f"; known are {', '.join(parts)}"
            raise UserError(f"{where}: unknown part {str(part)!r}{hint}")
        if members.count(part) > 1:
            raise UserError(f"{where}: part '{part}' is in two groups; take it out of one")
    for new in groups:
        if new in parts and new not in groups[new]:
            raise UserError(f"{where}: '{new}' is a part of its own; put it into its group, or choose another name")
    return {str(new): [str(part) for part in old] for new, old in groups.items()}
