"""Label maps of photos: which values of a PNG are labels of parts, and what the parts are called.

The accepted files are described in shards/README.md, "What is accepted".

Shapes: H x W pixels.
"""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError, first_line
from slotscops.core.files import decode_text
from slotscops.core.photos import orientation_of, turned
from slotscops.core.records import IGNORED

NAMES_FILE = "parts.txt"  # one part name a line, in the order of the labels
# labelme and other programs write these into the first lines of parts.txt, for label 0 or for ignored pixels. They
# name no part.
_NAMES_OF_ZERO = {
    "background", "_background_", "__background__", "_ignore_", "__ignore__", "ignore", "bg", "none", "no part",
    "void", "unlabeled", "unlabelled",
}  # fmt: skip
_NUMBERED = re.compile(r"(\d+)\s*[:.,;=)\s]\s*(\S.*)")  # a line of parts.txt that begins with its label
_MOST_LABELS = 48  # in one map; an antialiased mask or a photo has more
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # bytes of a PNG's header
_GREY, _PALETTE = 0, 3


class LabelMapError(UserError):
    """A label map that is damaged, or whose values are no part labels."""


class LabelMap(NamedTuple):
    """The labels of one photo, at the size at which the photo is shown."""

    part_labels: NDArray[np.uint8]  # (H, W) part label, 0 = no part, or IGNORED
    object_mask: NDArray[np.bool_]  # (H, W) True on the object; ignored pixels are not on it

    def of_parts(self) -> list[int]:
        """The labels of parts that occur, sorted."""
        return [label for label in np.unique(self.part_labels).tolist() if label not in (0, IGNORED)]


def read_label_map(path: Path, shown_size: tuple[int, int], orientation: int, names: list[str]) -> LabelMap:
    """The labels of a photo's pixels as the photo is shown.

    Args:
        shown_size: width and height of the photo as it is shown.
        orientation: the Exif orientation by which the photo was turned.
        names: of the parts, in the order of their labels; empty where parts have no names.

    Raises:
        LabelMapError: the file is damaged, is not a PNG, or has another size than the photo, or its values are not part
            labels.
    """
    labels = _read_values(path, shown_size, orientation)
    if labels.shape[::-1] != shown_size:
        raise _other_size(path, (labels.shape[1], labels.shape[0]), shown_size)
    return _check_values(path, labels, names)


def _other_size(path: Path, size: tuple[int, int], shown_size: tuple[int, int]) -> LabelMapError:
    came = f"labels of {size[0]} x {size[1]}, but the photo is shown at {shown_size[0]} x {shown_size[1]}"
    return LabelMapError(f"{path}: {came}; both need the same size")


def _read_values(path: Path, shown_size: tuple[int, int], orientation: int) -> NDArray[np.uint8]:
    """(H, W) of the values in the file at their own bit depth, turned as the photo is shown.

    Args:
        shown_size: width and height of the photo as it is shown.
        orientation: the Exif orientation by which the photo was turned.

    Raises:
        LabelMapError: the file is damaged, is not a PNG, has colours or 16 bits, or cannot have the photo's size.
    """
    try:
        with path.open("rb") as file:
            header = file.read(33)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.format != "PNG":
                came = f"is a {image.format} by its content"
                raise LabelMapError(f"{path}: {came}, needed a PNG, which keeps labels exactly")
            depth, colour_type = header[_BIT_DEPTH], header[_COLOUR_TYPE]
            if colour_type not in (_GREY, _PALETTE) or depth > 8:
                came = f"a PNG of mode {image.mode}"
                raise LabelMapError(f"{path}: {came}, needed a grey or palette PNG of at most 8 bits")
            if sorted(image.size) != sorted(shown_size):  # before it is decoded, however large it may be
                raise _other_size(path, image.size, shown_size)
            own_orientation = orientation_of(image)
            labels = np.array(image).astype(np.uint8)
        if colour_type == _GREY and depth in (2, 4):
            labels //= 255 // (2**depth - 1)  # Pillow spreads greys of few bits over 0 to 255
    except LabelMapError:
        raise
    except Exception as error:  # Pillow raises anything on damaged files
        raise LabelMapError(f"{path}: label map is damaged ({first_line(error)[:120]})") from None
    return _turn(labels, shown_size, orientation, own_orientation)


def _turn(
    labels: NDArray[np.uint8], shown_size: tuple[int, int], orientation: int, own_orientation: int | None
) -> NDArray[np.uint8]:
    """Turns labels by their own Exif entry if they have one, otherwise by the photo's.

    A map without an entry stays as it is if it has the shown size as it is and would not have it when turned.
    """
    upright = np.asarray(turned(Image.fromarray(labels), own_orientation or orientation))
    is_upright_already = labels.shape[::-1] == shown_size != upright.shape[::-1]
    return labels if own_orientation is None and is_upright_already else upright


def _check_values(path: Path, labels: NDArray[np.uint8], names: list[str]) -> LabelMap:
    """Decides what 255 means, and refuses values that are not part labels.

    Beside other labels, 255 marks a rim to be ignored: it stays in the part labels and is not on the object. Alone, 255
    is the object's mask.

    Raises:
        LabelMapError: the map has more labels than a photo has parts, a label without a name, or an inverted mask; or
            parts have no names, and the labels have gaps.
    """
    values = [value for value in np.unique(labels).tolist() if value]
    small = [value for value in values if value != IGNORED]
    if values == [IGNORED]:
        mask = labels == IGNORED
        if mask[[0, -1]].all() and mask[:, [0, -1]].all() and not mask.all():
            came = "holds only 255 along its whole edge, as an inverted mask does"
            raise LabelMapError(f"{path}: {came}; needed 255 on the object and 0 elsewhere")
        return LabelMap(np.zeros_like(labels), mask)
    seen = ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
    if len(small) > _MOST_LABELS:
        need = f"at most {_MOST_LABELS} can be parts; is it an antialiased mask or a photo?"
        raise LabelMapError(f"{path}: holds {len(values)} labels ({seen}), {need}")
    if small and names and small[-1] > len(names):
        came = f"holds label {small[-1]} (seen: {seen})"
        raise LabelMapError(f"{path}: {came}, but {NAMES_FILE} names {len(names)} parts")
    if not names and small != list(range(1, len(small) + 1)):
        need = f"needed 1, 2, 3 and so on without gaps; where a part may be hidden, name all parts in {NAMES_FILE}"
        raise LabelMapError(f"{path}: holds labels {seen}, {need}")
    return LabelMap(labels, (labels > 0) & (labels != IGNORED))


# ---- names of parts ----------------------------------------------------------------------------------------------


def read_part_names(path: Path) -> list[str]:
    """The names in a `parts.txt`, in the order of the labels from 1.

    First lines that name label 0 are left out. If every line begins with its label, as in `1: head`, the label is not
    part of the name.

    Raises:
        UserError: the file is not text, or its names cannot be printed, occur twice, are too many, or are numbered in
            another order.
    """
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    names = _without_numbers(path, [" ".join(line.split()) for line in lines if line.strip()])
    while names and names[0].lower() in _NAMES_OF_ZERO:
        names = names[1:]
    unprintable = [name for name in names if not name.isprintable()]
    if unprintable:
        raise UserError(f"{path}: {unprintable[0]!r} cannot be shown; write names in printable characters")
    if len(set(names)) != len(names) or len(names) >= IGNORED:
        raise UserError(f"{path}: needs fewer than {IGNORED} names, each once, one a line")
    return names


def _without_numbers(path: Path, names: list[str]) -> list[str]:
    """The names without the labels that their lines begin with. Labels count up from 0 or 1; 255 may come last."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if not names or len(numbers) < len(names):
        return names
    named = [match[2] for match in matches if match]
    if numbers[1:] and numbers[-1] == IGNORED:
        numbers, named = numbers[:-1], named[:-1]
    if numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        raise UserError(
            f"{path}: its lines begin with {numbers[0]}, ..., {numbers[-1]}, needed 1, 2, 3 and so on in order"
        )
    return named[1:] if numbers[0] == 0 else named
