"""Finds photos in folders and reads them as upright 8-bit RGB.

Shapes: H x W pixels.
"""

import functools
import importlib
import logging
import os
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from slotscops.core.errors import UserError, first_line
from slotscops.core.pixels import PADDING

PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif"}
)
NO_PHOTO = "no photo by its ending"  # a kind of file that is passed over
_HEIF_SUFFIXES = {".heic", ".heif"}
_HEIF_KINDS = {b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis"}  # in the first bytes of a file
# Files that operating systems leave in folders, in lower case. `._*`, which a Mac leaves, is checked separately.
_LITTER = {
    ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", ".appledouble", ".spotlight-v100", ".trashes",
    ".fseventsd", ".directory", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
_MAX_NAME_BYTES = 255  # of a file's name on common file systems
_RESULT_ENDINGS = (".parts.png", ".overlay.jpg", ".maps.safetensors")
_RESULTS = (
    "gallery",
    "videos",
    "index.html",
    "coco.json",
    "coco_polygons.json",
    "labelme",
    "part_features.safetensors",
)
_MAX_PIXELS = 100_000_000  # a larger photo is refused before it is decoded
_MAX_SIDE = 100_000  # its padded square is resized in strips, which takes time by the square's area
_ORIENTATION = 0x0112  # Exif's entry that says how to turn a photo
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by Exif's orientation, as Pillow's exif_transpose
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what Pillow logs of a damaged photo
_STRIP_PIXELS = 4_000_000  # pixels converted at a time, so that a large photo takes little memory beside itself


class PassedOver(NamedTuple):
    """A file or folder that the search for photos did not take."""

    path: Path
    kind: str  # the general reason, by which files are counted
    reason: str  # the exact reason
    is_fault: bool  # False if nobody would expect the file to be taken, such as Thumbs.db


class FoundPhotos(NamedTuple):
    """The photos that a search took, and the files and folders that it passed over."""

    photos: list[Path]
    passed_over: list[PassedOver]


def find_photos(paths: Iterable[Path], out: Path | None = None) -> FoundPhotos:
    """The photos among the paths and all photos below the folders among them, sorted within each folder, each once.

    Args:
        out: the folder of results. It may lie among the photos; earlier results in it are not taken as photos.

    Raises:
        UserError: no such photo or folder.
    """
    photos: dict[Path, None] = {}
    passed_over: list[PassedOver] = []
    for path in paths:
        if path.is_dir():
            found = walk_folder(path, lambda inside: out is not None and _is_result(real_path(inside), real_path(out)))
            photos |= dict.fromkeys(found.photos)
            passed_over += found.passed_over
        elif path.is_file():
            photos[path] = None
        elif path.exists():
            passed_over.append(_fault(path, "not a regular file", "is not a regular file"))
        else:
            raise UserError(f"{path}: no such photo or folder")
    return FoundPhotos(list(photos), passed_over)


def _is_result(path: Path, out: Path) -> bool:
    return path.parent == out and (path.name in _RESULTS or path.name.endswith(_RESULT_ENDINGS))


def walk_folder(root: Path, is_ours: Callable[[Path], bool] = lambda path: False) -> FoundPhotos:
    """All photos below a folder, and all that was passed over, both sorted by path.

    Links are followed, and each file and folder is taken once. One that is found both directly and through a link keeps
    its own name.

    Args:
        is_ours: files and folders that are neither taken nor passed over, such as earlier results.
    """
    found = FoundPhotos([], [])
    folders = [root]
    links: list[Path] = []  # to folders; they are entered after all real folders
    linked_photos: list[Path] = []
    seen = {_identity(parent) for parent in real_path(root).parents}  # a link to one of these would leave the folder
    taken = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if _identity(folder) in seen:
            found.passed_over.append(_fault(folder, "link to a folder seen already", "leads to a folder seen already"))
            continue
        seen.add(_identity(folder))
        try:
            paths = [folder / name for name in os.listdir(folder)]  # noqa: PTH208, keeps the folder's name as given
        except OSError as error:
            found.passed_over.append(_fault(folder, "folder that cannot be read", error.strerror or str(error)))
            continue
        for path in sorted(path for path in paths if not is_ours(path) and not _is_shards(path)):
            reason = why_passed_over(path)
            if reason is not None:
                found.passed_over.append(reason)
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_symlink():
                linked_photos.append(path)
            else:
                taken.add(_identity(path))
                found.photos.append(path)
    for path in linked_photos:
        if _identity(path) in taken:
            found.passed_over.append(_fault(path, "link to a photo taken already", "leads to a photo taken already"))
        else:
            taken.add(_identity(path))
            found.photos.append(path)
    return FoundPhotos(sorted(found.photos), sorted(found.passed_over))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def real_path(path: Path) -> Path:
    """The path without links. Path.resolve raises a RuntimeError on links in a circle before Python 3.13."""
    return Path(os.path.realpath(path))


def _is_shards(path: Path) -> bool:
    return os.path.isfile(path / "index" / "plan.json")  # noqa: PTH113, Path.is_file raises in a closed folder


def _fault(path: Path, kind: str, reason: str) -> PassedOver:
    return PassedOver(path, kind, reason, is_fault=True)


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name is what operating systems leave behind."""
    return name.startswith("._") or name.lower() in _LITTER


def why_passed_over(path: Path) -> PassedOver | None:
    """Why a file is not taken as a photo, or why a folder is not entered; None if it is taken or entered."""
    name = path.name
    if is_litter(name):
        return PassedOver(path, "litter of an operating system", "is litter of an operating system", is_fault=False)
    if name.startswith("."):
        return PassedOver(path, "hidden", "is hidden: its name starts with a dot", is_fault=False)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        is_link = os.path.islink(path)  # noqa: PTH114, Path.is_symlink raises in a folder that may not be entered
        kind = "link that leads nowhere" if is_link else "file that cannot be read"
        return _fault(path, kind, f"{kind} ({error.strerror})")
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        return _fault(path, "not a regular file", "is not a regular file")
    suffix = path.suffix.lower()
    if suffix not in PHOTO_SUFFIXES:
        return _fault(path, NO_PHOTO, f"its ending '{path.suffix}' is not one of a photo")
    if suffix in _HEIF_SUFFIXES and not _reads_heif():
        return _fault(path, "HEIC without pillow-heif", _NEEDS_HEIF)
    if suffix == ".avif" and not _reads_avif():
        return _fault(path, "AVIF that this Pillow cannot read", "reading AVIF needs Pillow 11.3 or newer")
    return None


_NEEDS_HEIF = "reading HEIC needs pillow-heif: pip install pillow-heif"


@functools.cache
def _reads_heif() -> bool:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


@functools.cache
def _reads_avif() -> bool:
    with warnings.catch_warnings(action="ignore"):  # an old Pillow does not know this feature's name
        return bool(features.check("avif"))


def _is_heif(path: Path) -> bool:
    """Whether the first bytes are HEIF's. Photos of telephones are often renamed to .jpg."""
    with path.open("rb") as file:
        header = file.read(64)
    is_avif = b"avif" in header[8:]  # among the compatible kinds of a mif1 or msf1
    return header[4:8] == b"ftyp" and header[8:12] in _HEIF_KINDS and not is_avif


def read_photo(path: Path) -> Image.Image:
    """The photo in 8-bit RGB, turned as its Exif entry says. Sharding and segmentation both read photos here.

    Raises:
        UserError: no such file, not a regular file, not an image, more than 100 million pixels or 100,000 pixels a
            side, or no memory for it. For a damaged file, the message quotes Pillow's.
    """
    image = read_image(path)[0]
    try:
        return to_rgb(image)
    except Exception as error:  # a damaged palette, or no memory
        raise UserError(f"{shown_name(path)}: cannot be converted to RGB ({first_line(error)[:200]})") from None


def read_image(path: Path) -> tuple[Image.Image, int]:
    """The image in its own mode, turned upright, and the Exif orientation by which it was turned (1: not at all).

    Raises:
        UserError: as `read_photo`.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{shown_name(path)}: is not a regular file")
        if _is_heif(path) and not _reads_heif():
            raise UserError(f"{shown_name(path)}: {_NEEDS_HEIF}")
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS or max(image.size) > _MAX_SIDE:
                limit = f"at most {_MAX_PIXELS} and {_MAX_SIDE} a side are read"
                raise UserError(f"{shown_name(path)}: {image.width} x {image.height} pixels, {limit}")
            if image.format == "EPS":  # Pillow would hand this program to Ghostscript
                raise UserError(f"{shown_name(path)}: is PostScript, which is no photo")
            orientation = orientation_of(image) or 1
            image.load()
            # A TIFF is turned as it is loaded, and has no orientation any more.
            upright = turned(image, orientation_of(image) or 1)
            upright.info = {name: value for name, value in upright.info.items() if name == "transparency"}
            return upright, orientation
    except FileNotFoundError:
        raise UserError(f"{shown_name(path)}: no such photo") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises anything on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{shown_name(path)}: cannot be read ({error.strerror})") from None
        raise UserError(f"{shown_name(path)}: is no readable image ({first_line(error)[:200]})") from None


def orientation_of(image: Image.Image) -> int | None:
    """Exif's orientation, 1 to 8; None if it is missing, has another value, or the Exif block cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises anything on damaged blocks, and the photo may be whole
        return None
    return int(value) if value is not None and value in range(1, 9) else None


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image, turned as it is to be shown. Unlike Pillow's exif_transpose, it rewrites no Exif block."""
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode. Transparent pixels are laid over the colour of padding.

    16-bit pixels are divided by 257. Floating-point pixels are scaled so that white becomes 255, where white is the
    smallest of 1, 255 and 65535 that no pixel exceeds, or the brightest pixel if all are exceeded. 32-bit integers are
    scaled likewise, but their white is at least 255.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips these at 255
        whites = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, ())
        white = _white_of(image, whites) if whites else 65535.0
        return _convert_in_strips(image, lambda strip: _scaled(strip, white))
    if image.has_transparency_data:
        return _convert_in_strips(image, _on_padding)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(strip: Image.Image, white: float) -> Image.Image:
    with np.errstate(invalid="ignore"):  # pixels that are not numbers become 0
        scaled = np.nan_to_num(np.asarray(strip).astype(np.float64) * (255 / white)).clip(0, 255).round()
    return Image.fromarray(scaled.astype(np.uint8))


def _on_padding(strip: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", strip.size, (*PADDING, 255))
    return Image.alpha_composite(canvas, strip.convert("RGBA"))


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """First row and pixels of each strip of an image, from top to bottom."""
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for first in range(0, image.height, num_rows):
        yield first, image.crop((0, first, image.width, min(first + num_rows, image.height)))


def _convert_in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for first, strip in _strips(image):
        rgb.paste(convert(strip).convert("RGB"), (0, first))
    return rgb


def _white_of(image: Image.Image, whites: tuple[float, ...]) -> float:
    pixels = (np.asarray(strip) for _, strip in _strips(image))
    brightest = max(float(strip.max(initial=0, where=np.isfinite(strip))) for strip in pixels)
    return next((white for white in whites if brightest <= white), brightest)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 pixels of an RGB image. `numpy.asarray` would need three times the memory on the way."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for first, strip in _strips(image):
        pixels[first : first + strip.height] = np.asarray(strip)
    return pixels


def shown_name(name: str | Path) -> str:
    """A file's name for one line of a terminal: bytes that are not UTF-8 and control characters as escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    is_unsafe = ("C", "Zl", "Zp")  # Unicode's categories of control characters and of line and paragraph ends
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c).startswith(is_unsafe) else c for c in text
    )


def unique_names(photos: Iterable[Path], longest_ending: str = "") -> list[str]:
    """A distinct name for each photo: its file name without suffix, with a number behind it where two would be equal.

    Names that differ only in upper and lower case, or in how accents are composed, count as equal: a Mac does not tell
    them apart. A name is cut if it would be too long for a file system with `longest_ending` behind it.
    """
    max_bytes = _MAX_NAME_BYTES - len(longest_ending.encode())
    taken: set[str] = set()
    names = []
    for photo in photos:
        stem = photo.stem.encode("utf-8", "replace").decode()  # a page can only hold UTF-8
        name, number = _cut(stem, max_bytes), 1
        while unicodedata.normalize("NFC", name).casefold() in taken:
            number += 1
            name = f"{_cut(stem, max_bytes - len(f'-{number}'))}-{number}"
        taken.add(unicodedata.normalize("NFC", name).casefold())
        names.append(name)
    return names


def _cut(name: str, max_bytes: int) -> str:
    return name.encode()[:max_bytes].decode(errors="ignore")
