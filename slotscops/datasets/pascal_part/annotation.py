"""PASCAL-Part's annotations and photos become records.

Shapes: H x W pixels of a photo, S side of a crop.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.core.pixels import Box, box_of, crop_labels, crop_photo, square_crop
from slotscops.core.records import Record
from slotscops.datasets.pascal_part.classes import PART_NAMES, AnnotatedObject, class_name_of, paint_parts, part_label
from slotscops.datasets.pascal_part.matlab import MAX_MATLAB_BYTES, MatlabError, read_matlab_structs
from slotscops.datasets.pascal_part.tree import PascalPartTree

# An object is kept if its box covers more of the image than this; Choudhury et al. (NeurIPS 2021) do the same.
BOX_SHARE = {"train": 0.10, "val": 0.20}
_MAX_PHOTO_SIDE = 10_000  # VOC's have at most 500; the square crop of a much larger one would not fit into memory


@dataclass(frozen=True)
class Candidate:
    """An object that is to become a record."""

    image: str
    object_number: int  # from 0, in the file's order
    class_name: str
    split: str
    box: Box
    highest_label: int = 0  # of its parts, where the source has no table of their names


@dataclass(frozen=True)
class LeftOut:
    """Something that becomes no record, and why."""

    image: str
    object_number: int | None  # None: the whole image
    class_name: str | None
    split: str | None
    kind: str  # the reason in general, to count by
    reason: str  # the reason in particular
    damaged: bool  # a fault of the file, not a choice


class ImageScan(NamedTuple):
    """What becomes of each object of the wanted classes in one image."""

    candidates: list[Candidate]
    left_out: list[LeftOut]


# ---- annotations -------------------------------------------------------------------------------------------------


def read_annotation(source: Path | str | BinaryIO) -> list[AnnotatedObject]:
    """Reads one `.mat` file of PASCAL-Part, from its path or from an open file.

    Raises:
        UserError: in one line, whatever is wrong with the file.
    """
    name = str(source if isinstance(source, Path | str) else getattr(source, "name", "annotation"))
    try:
        anno = read_matlab_structs(_read_bytes(source), "anno")
        if len(anno) != 1:
            raise MatlabError(f"has {len(anno)} structs 'anno', needed one")
        objects = [_read_object(row, f"object {number}") for number, row in enumerate(_rows(anno[0], "objects"))]
        for number, item in enumerate(objects):
            if item.mask.shape != objects[0].mask.shape:
                sizes = f"{_size_of(item.mask)}, object 0 of {_size_of(objects[0].mask)}"
                raise MatlabError(f"object {number} has a mask of {sizes}, needed the photo's size in both")
    except MatlabError as damage:
        raise UserError(f"{name}: {damage}; fetch the file again") from None
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
            sizes = f"{_size_of(part_mask)}, its object of {_size_of(mask)}"
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
    value = row.get(field)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise MatlabError(f"{where} lacks its name, '{field}'")
    return value


def _mask(row: dict[str, Any], where: str) -> NDArray[np.bool_]:
    value = row.get("mask")
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.size == 0:
        raise MatlabError(f"{where} lacks a 'mask' of H x W pixels")
    if value.dtype.kind not in "uif" or not ((value == 0) | (value == 1)).all():
        raise MatlabError(f"{where} has a mask of type {value.dtype} with other values than 0 and 1, needed only these")
    return value.view(np.bool_) if value.itemsize == 1 else value.astype(np.bool_)


# ---- photos ------------------------------------------------------------------------------------------------------


def _photo_fault(tree: PascalPartTree, image: str, mask: NDArray[np.bool_]) -> str | None:
    """What is wrong with a photo as far as its header tells. Nothing is decoded."""
    try:
        with tree.open_photo(image) as stream:
            _open_jpeg(stream, tree.photo_path(image), mask)
    except UserError as error:
        return str(error)
    return None


def _read_photo(tree: PascalPartTree, image: str, mask: NDArray[np.bool_]) -> Image.Image:
    """The photo in RGB, whatever its own colours. Raises UserError."""
    with tree.open_photo(image) as stream:
        photo = _open_jpeg(stream, tree.photo_path(image), mask)
        try:
            with warnings.catch_warnings(action="ignore"):
                return photo.convert("RGB")
        except Exception as error:  # Pillow raises anything on damaged files
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{tree.photo_path(image)}: photo is damaged ({reason}); fetch it again") from None


def _open_jpeg(stream: BinaryIO, path: Path, mask: NDArray[np.bool_]) -> Image.Image:
    """Reads the header. The size is that of the pixels: nothing is turned by Exif, the masks are not either."""
    try:
        with warnings.catch_warnings(action="ignore"):
            photo = Image.open(stream, formats=["JPEG"])
        width, height = photo.size
    except Image.DecompressionBombError:
        width = height = _MAX_PHOTO_SIDE + 1  # at the least
    except Exception as error:  # as above
        raise UserError(f"{path}: is no readable JPEG ({type(error).__name__}); fetch it again") from None
    if max(width, height) > _MAX_PHOTO_SIDE:
        raise UserError(f"{path}: photo of more than {_MAX_PHOTO_SIDE} pixels a side; fetch the original photo")
    if (width, height) != mask.shape[::-1]:
        came = f"photo of {width} x {height}, but masks of {_size_of(mask)}"
        raise UserError(f"{path}: {came}, needed one size; fetch the original photo")
    return photo


# ---- first phase: which objects are kept -------------------------------------------------------------------------


def scan_image(
    tree: PascalPartTree,
    image: str,
    split_of_class: dict[str, str],
    class_names: list[str],
    min_box_share: dict[str, float],
) -> ImageScan:
    """Sorts one image's objects of the wanted classes into those that are kept and those left out: each is in one.

    Args:
        split_of_class: which split's list of each class names the image.
        min_box_share: by split, the share of the image that an object's box must exceed.
    """
    scan = ImageScan([], [])
    try:
        with tree.open_annotation(image) as stream:
            objects = read_annotation(stream)
    except UserError as error:
        # The split is unknown only where the lists disagree on it.
        splits = set(split_of_class.values())
        split = splits.pop() if len(splits) == 1 else None
        scan.left_out.append(LeftOut(image, None, None, split, "damaged file", str(error), damaged=True))
        return scan
    # A class that the table lacks cannot be asked for: left to itself, such a fault of the file would go unseen.
    unasked = set(PART_NAMES) - set(class_names)
    wanted = [(number, item) for number, item in enumerate(objects) if item.class_name not in unasked]
    photo_fault = _photo_fault(tree, image, objects[0].mask) if wanted and split_of_class else None
    for number, item in wanted:
        split = split_of_class.get(item.class_name)
        fault = _fault(item, split, photo_fault, min_box_share)
        if fault is not None:
            scan.left_out.append(LeftOut(image, number, item.class_name, split, *fault))
        elif split is not None:
            scan.candidates.append(Candidate(image, number, item.class_name, split, box_of(item.mask)))
    return scan


def _fault(
    item: AnnotatedObject, split: str | None, photo_fault: str | None, min_box_share: dict[str, float]
) -> tuple[str, str, bool] | None:
    """Why an object is left out: kind, reason, and whether a file is at fault."""
    if item.class_name not in PART_NAMES:
        return "unknown class", f"PASCAL-Part knows no class '{item.class_name}'", True
    if split is None:
        return "in no split list", "its image is in no split list of its class", False
    if photo_fault is not None:
        return "damaged file", photo_fault, True
    if not item.mask.any():
        return "empty mask", "its mask is empty", False
    if not item.parts:
        return "no parts annotated", "no parts annotated", False
    for name, _ in item.parts:
        if part_label(item.class_name, name) is None:
            return "unknown part", f"PASCAL-Part knows no part '{name}' of {item.class_name}", True
    left, top, right, bottom = box_of(item.mask)
    share = (right - left) * (bottom - top) / item.mask.size
    if share <= min_box_share[split]:
        wanted = f"{100 * min_box_share[split]:g} %"
        reason = f"its box covers {100 * share:.3g} % of the image, needed more than {wanted} for {split}"
        return f"box covers no more than {wanted} of the image", reason, False
    return None


# ---- second phase: records ---------------------------------------------------------------------------------------


def read_records(
    tree: PascalPartTree, image: str, candidates: list[Candidate], size: int
) -> tuple[list[Record], list[LeftOut]]:
    """Crops the candidates of one image to `size` x `size`. What turns out to be damaged only now is left out."""
    if not candidates:
        return [], []
    try:
        with tree.open_annotation(image) as stream:
            objects = read_annotation(stream)
        numbered = dict(enumerate(objects))
        if not all(c.object_number in numbered and _is_unchanged(c, numbered[c.object_number]) for c in candidates):
            raise UserError(f"{tree.annotation_path(image)}: has changed since it was scanned; start anew")
        photo = _read_photo(tree, image, objects[0].mask)
    except UserError as error:
        return [], [
            LeftOut(image, item.object_number, item.class_name, item.split, "damaged file", str(error), damaged=True)
            for item in candidates
        ]
    return [_make_record(item, objects[item.object_number], photo, size) for item in candidates], []


def _is_unchanged(candidate: Candidate, item: AnnotatedObject) -> bool:
    """Whether the object is still the one that was scanned: hours may lie between the phases."""
    box = box_of(item.mask) if item.mask.any() else None
    known = all(part_label(item.class_name, name) for name, _ in item.parts)
    return known and (item.class_name, box) == (candidate.class_name, candidate.box)


def _make_record(candidate: Candidate, item: AnnotatedObject, photo: Image.Image, size: int) -> Record:
    labels, small = (Image.fromarray(paint_parts(item, smallest_on_top)) for smallest_on_top in (False, True))
    crop = square_crop(candidate.box)
    names = zip(PART_NAMES[item.class_name], labels.histogram()[1:], strict=False)
    return Record(
        key=f"{candidate.image}_{candidate.object_number}",
        image=crop_photo(photo, crop, size),
        parts=crop_labels(labels, crop, size),
        parts_small=crop_labels(small, crop, size),
        object_mask=crop_labels(Image.fromarray(item.mask.astype(np.uint8)), crop, size) > 0,
        description={
            "image": candidate.image,
            "object": candidate.object_number,
            "class": item.class_name,
            "box": list(candidate.box),
            "crop": list(crop),
            "source_size": list(photo.size),
            "part_names": [name for name, num_pixels in names if num_pixels],
        },
    )


def _size_of(mask: NDArray[Any]) -> str:
    return f"{mask.shape[1]} x {mask.shape[0]}"
