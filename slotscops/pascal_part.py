"""PASCAL-Part's annotations and photos become records.

Shapes: H x W pixels of a photo, S side of a crop.
"""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from slotscops.errors import UserError
from slotscops.images import IMAGENET_MEAN
from slotscops.pascal_classes import PART_NAMES, class_name_of, part_label
from slotscops.pascal_tree import PascalPartTree
from slotscops.records import Record

# An object is kept if its box covers more of the image than this; Choudhury et al. (NeurIPS 2021) do the same.
BOX_SHARE = {"train": 0.10, "val": 0.20}
_MARGIN = 0.05  # of the box's longer side, on every side of the crop
_MAX_PIXELS = 100_000_000  # a photo of more is refused before it is decoded
_MAX_ANNOTATION_BYTES = 64_000_000  # the largest real file has 0.1 MB
_FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # beyond the photo's edge: zero once normalised

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive


@dataclass(frozen=True)
class AnnotatedObject:
    """One object as the annotation has it."""

    class_name: str  # VOC's name
    mask: NDArray[np.bool_]  # (H, W)
    parts: list[tuple[str, NDArray[np.bool_]]]  # (name as in the file, (H, W) mask), in the file's order


@dataclass(frozen=True)
class Candidate:
    """An object that is to become a record."""

    image: str
    object_number: int  # from 0, in the file's order
    class_name: str
    split: str
    box: Box


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


# ---- annotations -------------------------------------------------------------------------------------------------


def read_annotation(path: Path) -> list[AnnotatedObject]:
    """Reads one `.mat` file of PASCAL-Part.

    Raises:
        UserError: in one line, whatever is wrong with the file.
    """
    anno = _load_matlab(path)
    try:
        objects = [_read_object(row) for row in _rows(anno["objects"], ("class", "mask", "parts"))]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its 'anno' is not as PASCAL-Part's ({_one_line(error)}); {_FETCH}") from None
    for number, item in enumerate(objects):
        for name, mask in item.parts:
            if mask.shape != item.mask.shape:
                raise UserError(
                    f"{path}: part {name} of object {number} has a mask of {_size(mask)}, its object of "
                    f"{_size(item.mask)}; {_FETCH}"
                )
        if item.mask.shape != objects[0].mask.shape:
            raise UserError(f"{path}: objects with masks of different sizes; {_FETCH}")
    return objects


def _load_matlab(path: Path) -> Any:
    """The (1, 1) struct `anno`."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_ANNOTATION_BYTES:
            raise UserError(f"{path}: {num_bytes} bytes, no annotation of PASCAL-Part has so many; {_FETCH}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content[:4] == b"\x89HDF" or b"MATLAB 7.3" in content[:128]:
        raise UserError(f"{path}: is a MATLAB 7.3 file, needed version 5 (save with -v7)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            variables = scipy.io.loadmat(io.BytesIO(content), variable_names=["anno"])  # type: ignore[arg-type]
    except Exception as error:  # SciPy's reader raises anything from TypeError to zlib.error on damaged files
        raise UserError(f"{path}: is no whole MATLAB 5 file ({_one_line(error)}); {_FETCH}") from None
    if "anno" not in variables:
        raise UserError(f"{path}: lacks the variable 'anno'; {_FETCH}")
    anno = variables["anno"]
    if getattr(anno.dtype, "names", None) is None or anno.size != 1 or "objects" not in anno.dtype.names:
        raise UserError(f"{path}: its 'anno' is no struct with 'objects'; {_FETCH}")
    return anno.flat[0]


def _rows(structs: Any, fields: tuple[str, ...]) -> Iterator[Any]:
    """The elements of a struct array; nothing at all is stored as an empty array without fields."""
    if structs.size == 0:
        return
    missing = set(fields) - set(structs.dtype.names or ())
    if missing:
        raise KeyError(f"no field {sorted(missing)[0]}")
    yield from structs.flat


def _read_object(row: Any) -> AnnotatedObject:
    parts = [(_text(part["part_name"]), _mask(part["mask"])) for part in _rows(row["parts"], ("part_name", "mask"))]
    return AnnotatedObject(class_name_of(_text(row["class"])), _mask(row["mask"]), parts)


def _text(value: Any) -> str:
    if value.size != 1 or value.dtype.kind != "U":
        raise ValueError("a name that is no text")
    return str(value.flat[0])


def _mask(value: Any) -> NDArray[np.bool_]:
    if value.ndim != 2 or value.dtype.kind not in "bui":
        raise ValueError(f"a mask of {value.ndim} dimensions and type {value.dtype}")
    if value.size and (int(value.min()) < 0 or int(value.max()) > 1):
        raise ValueError("a mask with other values than 0 and 1")
    mask: NDArray[np.bool_] = value.astype(bool)
    return mask


# ---- first phase: which objects are kept -------------------------------------------------------------------------


def scan_image(
    tree: PascalPartTree,
    image: str,
    split_of_class: dict[str, str],
    class_names: list[str],
    min_box_share: dict[str, float],
) -> tuple[list[Candidate], list[LeftOut]]:
    """Sorts one image's objects of the wanted classes into those that are kept and those left out.

    Args:
        split_of_class: which split's list of each class names the image.
        min_box_share: by split, the share of the image that an object's box must exceed.
    """
    try:
        objects = read_annotation(tree.annotation_path(image))
        wanted = [(number, item) for number, item in enumerate(objects) if item.class_name in class_names]
        if wanted:
            _check_photo(tree.photo_path(image), wanted[0][1].mask)
    except UserError as error:
        # The split is unknown only where the lists disagree on it.
        splits = set(split_of_class.values())
        split = splits.pop() if len(splits) == 1 else None
        return [], [LeftOut(image, None, None, split, "damaged file", str(error), damaged=True)]
    candidates, left_out = [], []
    for number, item in wanted:
        split = split_of_class.get(item.class_name)
        fault = _fault(item, split, min_box_share)
        if fault is None:
            assert split is not None
            candidates.append(Candidate(image, number, item.class_name, split, _box(item.mask)))
        else:
            left_out.append(LeftOut(image, number, item.class_name, split, *fault))
    return candidates, left_out


def _fault(item: AnnotatedObject, split: str | None, min_box_share: dict[str, float]) -> tuple[str, str, bool] | None:
    """Why an object is left out: kind, reason, and whether the file is at fault."""
    if split is None:
        return "in no split list", "its image is in no split list of its class", False
    if not item.mask.any():
        return "empty mask", "its mask is empty", False
    if not item.parts:
        return "no parts annotated", "no parts annotated", False
    for name, _ in item.parts:
        if part_label(item.class_name, name) is None:
            return "unknown part", f"PASCAL-Part knows no part '{name}' of {item.class_name}", True
    left, top, right, bottom = _box(item.mask)
    share = (right - left) * (bottom - top) / item.mask.size
    if share <= min_box_share[split]:
        kind = f"box covers no more than {100 * min_box_share[split]:g} % of the image"
        return kind, f"its box covers {100 * share:.1f} % of the image", False
    return None


def _box(mask: NDArray[np.bool_]) -> Box:
    """The smallest box that holds the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _check_photo(path: Path, mask: NDArray[np.bool_]) -> None:
    """Looks at the photo's header only."""
    with _open_photo(path) as photo:
        if photo.size != (mask.shape[1], mask.shape[0]):
            raise UserError(f"{path}: photo of {photo.width} x {photo.height}, but masks of {_size(mask)}; {_FETCH}")


def _open_photo(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            photo = Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such photo") from None
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise UserError(f"{path}: is no readable image ({type(error).__name__})") from None
    if photo.width * photo.height > _MAX_PIXELS:
        photo.close()
        raise UserError(f"{path}: {photo.width} x {photo.height} pixels, at most {_MAX_PIXELS} are read")
    return photo


# ---- second phase: records ---------------------------------------------------------------------------------------


def read_records(
    tree: PascalPartTree, image: str, candidates: list[Candidate], size: int
) -> tuple[list[Record], list[LeftOut]]:
    """Crops the candidates of one image. A photo that turns out to be cut short leaves all of them out."""
    try:
        objects = read_annotation(tree.annotation_path(image))
        photo = _read_photo(tree.photo_path(image))
    except UserError as error:
        return [], [
            LeftOut(image, item.object_number, item.class_name, item.split, "damaged file", str(error), damaged=True)
            for item in candidates
        ]
    return [_make_record(item, objects[item.object_number], photo, size) for item in candidates], []


def _read_photo(path: Path) -> Image.Image:
    with _open_photo(path) as photo:
        try:
            return photo.convert("RGB")
        except Exception as error:  # as above
            raise UserError(f"{path}: photo is damaged ({_one_line(error)})") from None


def _make_record(candidate: Candidate, item: AnnotatedObject, photo: Image.Image, size: int) -> Record:
    labels = paint_parts(item)
    crop = square_crop(candidate.box)
    present = sorted(set(np.unique(labels).tolist()) - {0})
    return Record(
        key=f"{candidate.image}_{candidate.object_number}",
        image=_crop(photo, crop, size, _FILL, Image.Resampling.BICUBIC),
        parts=_crop(Image.fromarray(labels), crop, size, 0, Image.Resampling.NEAREST),
        object_mask=_crop(Image.fromarray(item.mask.astype(np.uint8)), crop, size, 0, Image.Resampling.NEAREST) > 0,
        description={
            "image": candidate.image,
            "object": candidate.object_number,
            "class": item.class_name,
            "box": list(candidate.box),
            "crop": list(crop),
            "source_size": list(photo.size),
            "part_names": [PART_NAMES[item.class_name][label - 1] for label in present],
        },
    )


def paint_parts(item: AnnotatedObject) -> NDArray[np.uint8]:
    """(H, W) part labels, 0 = none. Where masks overlap the first listed wins, as with Choudhury et al."""
    labels = np.zeros(item.mask.shape, np.uint8)
    for name, mask in reversed(item.parts):
        label = part_label(item.class_name, name)
        assert label is not None  # scanning left such objects out
        labels[mask] = label
    return labels


def square_crop(box: Box) -> Box:
    """The square around the box with 5 % of its longer side on every side; it may reach beyond the photo."""
    left, top, right, bottom = box
    longer = max(right - left, bottom - top)
    side = longer + 2 * max(1, round(_MARGIN * longer))
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return x, y, x + side, y + side


def _crop(image: Image.Image, crop: Box, size: int, fill: Any, filter_: Image.Resampling) -> NDArray[np.uint8]:
    """(size, size[, 3]) the crop, filled where it reaches beyond the image."""
    side = crop[2] - crop[0]
    canvas = Image.new(image.mode, (side, side), fill)
    canvas.paste(image, (-crop[0], -crop[1]))
    return np.asarray(canvas.resize((size, size), filter_))


def _size(mask: NDArray[Any]) -> str:
    return " x ".join(str(side) for side in reversed(mask.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


_FETCH = "fetch the file again"
