"""Reads annotations of PASCAL-Part.

Shapes: H x W pixels of a photo.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.classes import AnnotatedObject, class_name_of
from slotscops.datasets.pascal_part.matlab import MAX_MATLAB_BYTES, MatlabError, read_matlab_structs


def read_annotation(source: Path | str | BinaryIO) -> list[AnnotatedObject]:
    """Reads one `.mat` file of PASCAL-Part, from its path or from an open file.

    Raises:
        UserError: one line that says what is wrong with the file.
    """
    name = str(source if isinstance(source, Path | str) else getattr(source, "name", "annotation"))
    try:
        anno = read_matlab_structs(_read_bytes(source), "anno")
        if len(anno) != 1:
            raise MatlabError(f"has {len(anno)} structs 'anno', needed one")
        objects = [_read_object(row, f"object {number}") for number, row in enumerate(_rows(anno[0], "objects"))]
        for number, item in enumerate(objects):
            if item.mask.shape != objects[0].mask.shape:
                sizes = f"{size_of(item.mask)}, object 0 of {size_of(objects[0].mask)}"
                raise MatlabError(f"object {number} has a mask of {sizes}, needed the photo's size in both")
    except MatlabError as damage:
        raise UserError(f"{name}: {damage}; {damage.remedy}") from None
    return objects


def _read_bytes(source: Path | str | BinaryIO) -> bytes:
    try:
        if not isinstance(source, Path | str):
            return source.read(MAX_MATLAB_BYTES + 1)
        with Path(source).open("rb") as file:
            return file.read(MAX_MATLAB_BYTES + 1)
    except Exception as error:  # a member of an archive raises more than OSError
        raise MatlabError(f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})") from None


def _read_object(row: dict[str, Any], where: str) -> AnnotatedObject:
    class_name, mask = _text(row, "class", where), _mask(row, where)
    parts = []
    for part in _rows(row, "parts"):
        name = _text(part, "part_name", f"a part of {where}")
        part_mask = _mask(part, f"part {name} of {where}")
        if part_mask.shape != mask.shape:
            sizes = f"{size_of(part_mask)}, its object of {size_of(mask)}"
            raise MatlabError(f"part {name} of {where} has a mask of {sizes}, needed the photo's size in both")
        parts.append((name, part_mask))
    return AnnotatedObject(class_name_of(class_name), mask, parts)


def _rows(row: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The structs in a field; none at all is stored as an empty matrix."""
    value = row.get(field)
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if not isinstance(value, list):
        raise MatlabError(f"lacks the structs '{field}'")
    return value


def _text(row: dict[str, Any], field: str, where: str) -> str:
    """A name without blanks around it. U+FFFD replaces what cannot be printed, so that other objects stay usable."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise MatlabError(f"{where} lacks its name, '{field}'")
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(value.split()))


def _mask(row: dict[str, Any], where: str) -> NDArray[np.bool_]:
    value = row.get("mask")
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.size == 0:
        raise MatlabError(f"{where} lacks a 'mask' of H x W pixels")
    if value.dtype.kind not in "uif" or not ((value == 0) | (value == 1)).all():
        raise MatlabError(f"{where} has a mask of type {value.dtype} with other values than 0 and 1, needed only these")
    return value.view(np.bool_) if value.itemsize == 1 else value.astype(np.bool_)


def size_of(mask: NDArray[Any]) -> str:
    return f"{mask.shape[1]} x {mask.shape[0]}"
