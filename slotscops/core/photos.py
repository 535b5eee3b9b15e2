"""Photos of any kind as people have them: found in folders, read, turned upright, in 8-bit RGB.

Shapes: H x W pixels.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from slotscops.core.errors import UserError
from slotscops.core.pixels import PADDING

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_RESULT_ENDINGS = (".parts.png", ".overlay.jpg")
_MAX_PIXELS = 100_000_000  # a photo of more is refused before it is decoded


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
    """The photo, turned as its EXIF says, in RGB.

    Raises:
        UserError: no such file, not an image, or more than 100 million pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels, at most {_MAX_PIXELS} are read")
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: no such photo") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no readable image ({type(error).__name__})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode: 16 bits are scaled, what is transparent gets the colour of padding."""
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips these at 255
        pixels = np.asarray(image).astype(np.float64)
        brightest = 65535 if image.mode != "F" else float(np.nanmax(pixels, initial=0)) or 1
        scaled = np.nan_to_num(pixels * (255 / brightest)).clip(0, 255).round()
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*PADDING, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


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
