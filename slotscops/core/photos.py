"""Photos of any kind as people have them: found in folders, read, turned upright, in 8-bit RGB.

Shapes: H x W pixels.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slotscops.core.errors import UserError, first_line
from slotscops.core.pixels import PADDING

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_RESULT_ENDINGS = (".parts.png", ".overlay.jpg")
_MAX_PIXELS = 100_000_000  # a photo of more is refused before it is decoded
_MAX_SIDE = 100_000  # its padded square is resized in strips, which takes time by the square's area
ORIENTATION = 0x0112  # Exif's entry that says how to turn a photo


def find_photos(paths: Iterable[Path], out: Path | None = None) -> list[Path]:
    """The photos themselves and those anywhere below the folders, sorted within each folder, each once.

    Args:
        out: the folder of results, which may be one of these or lie in one; results are not taken for photos.

    Raises:
        UserError: no such photo or folder.
    """
    photos: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file())
            photos |= dict.fromkeys(p for p in found if out is None or not _is_result(p.resolve(), out.resolve()))
        elif path.exists():
            photos[path] = None
        else:
            raise UserError(f"{path}: no such photo or folder")
    return list(photos)


def _is_result(path: Path, out: Path) -> bool:
    return path.is_relative_to(out / "gallery") or (path.parent == out and path.name.endswith(_RESULT_ENDINGS))


def read_photo(path: Path) -> Image.Image:
    """The photo in 8-bit RGB, turned as its Exif entry says. Sharding and segmentation both read photos here.

    Raises:
        UserError: no such file, not an image, more than 100 million pixels or 100,000 pixels a side. Whatever Pillow
            raises on a damaged file, the message holds Pillow's own sentence.
    """
    return to_rgb(read_image(path)[0])


def read_image(path: Path) -> tuple[Image.Image, int]:
    """The image in its own mode, turned upright, and the Exif orientation by which it was turned (1: not at all).

    Raises:
        UserError: as `read_photo`.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS or max(image.size) > _MAX_SIDE:
                limit = f"at most {_MAX_PIXELS} and {_MAX_SIDE} a side are read"
                raise UserError(f"{path}: {image.width} x {image.height} pixels, {limit}")
            orientation = image.getexif().get(ORIENTATION, 1)
            return ImageOps.exif_transpose(image), orientation
    except FileNotFoundError:
        raise UserError(f"{path}: no such photo") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises anything on damaged files
        raise UserError(f"{path}: is no readable image ({first_line(error)[:200]})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode; what is transparent gets the colour of padding.

    Pixels of 16 bits are divided by 257. Of floating-point pixels, white is 1, 255 or 65535, the smallest that no
    pixel exceeds, or else the brightest pixel.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips these at 255
        pixels = np.asarray(image).astype(np.float64)
        white = 65535.0 if image.mode != "F" else _white_of(pixels)
        scaled = np.nan_to_num(pixels * (255 / white)).clip(0, 255).round()
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*PADDING, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _white_of(pixels: NDArray[np.float64]) -> float:
    brightest = float(pixels.max(initial=0, where=np.isfinite(pixels)))
    return next((white for white in (1.0, 255.0, 65535.0) if brightest <= white), brightest)


def unique_names(photos: Iterable[Path]) -> list[str]:
    """File names without suffix; two photos of one name, even if only on a Mac, get a number."""
    taken: set[str] = set()
    names = []
    for photo in photos:
        stem = photo.stem.encode("utf-8", "replace").decode()  # a name that is no UTF-8 cannot stand in a page
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
