"""Photos of PASCAL-Part, which must be JPEGs of the size that their annotation says.

Shapes: H x W pixels of a photo.
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.annotation import size_of
from slotscops.datasets.pascal_part.tree import PascalPartTree

_MAX_PHOTO_SIDE = 10_000  # VOC's have at most 500; the square crop of a much larger one would not fit into memory


def find_photo_fault(tree: PascalPartTree, image: str, mask: NDArray[np.bool_]) -> str | None:
    """What is wrong with a photo according to its header; None if nothing is. No pixel is decoded."""
    try:
        with tree.open_photo(image) as stream:
            _open_jpeg(stream, tree.photo_path(image), mask)
    except UserError as error:
        return str(error)
    return None


def read_photo(tree: PascalPartTree, image: str, mask: NDArray[np.bool_]) -> Image.Image:
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
    """Reads the header. The size is that of the stored pixels: Exif turns neither the photo nor the masks."""
    try:
        with warnings.catch_warnings(action="ignore"):
            photo = Image.open(stream, formats=["JPEG"])
        width, height = photo.size
    except Image.DecompressionBombError:
        width = height = _MAX_PHOTO_SIDE + 1  # or more: the header says it is huge
    except Exception as error:  # as above
        raise UserError(f"{path}: is no readable JPEG ({type(error).__name__}); fetch it again") from None
    if max(width, height) > _MAX_PHOTO_SIDE:
        raise UserError(f"{path}: photo of more than {_MAX_PHOTO_SIDE} pixels a side; fetch the original photo")
    if (width, height) != mask.shape[::-1]:
        came = f"photo of {width} x {height}, but masks of {size_of(mask)}"
        raise UserError(f"{path}: {came}, needed one size; fetch the original photo")
    return photo
