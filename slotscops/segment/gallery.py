"""A page for all segmented photos that opens from disk, without a network: `index.html`.

A page on disk may show a picture but not read its pixels, so what the pointer needs to name a part comes as script:
`gallery/index.js` says which photos there are and how much of each part is in them, `gallery/labels-NNNN.js` holds
the label maps of 100 photos, at most 192 cells a side, as runs; the page loads only the ones on the screen.

Shapes: H x W pixels of the photo, g x f cells of its small label map.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.files import write_bytes
from slotscops.core.pictures import voc_palette

PAGE_SIZE = 100  # photos whose label maps share a file
GRID_SIDE = 192  # cells, longer side of the label maps the page draws
_THUMBNAIL_SIDE, _PHOTO_SIDE = 320, 1280  # pixels
_FOLDER = "gallery"


@dataclass(frozen=True)
class Entry:
    """One photo in the gallery."""

    name: str
    width: int  # of the photo, pixels
    height: int
    shares: list[int]  # per slot, of the photo's pixels, in thousandths
    grid: tuple[int, int]  # width and height of the small label map
    runs: str  # see `encode_runs`


@dataclass(frozen=True)
class Skipped:
    """A photo that could not be read."""

    path: str
    reason: str


def shrink_labels(labels: NDArray[np.uint8], longest: int = GRID_SIDE) -> NDArray[np.uint8]:
    """(g, f) labels at the centres of cells, not more than `longest` a side, of (H, W)."""
    height, width = labels.shape
    scale = min(1.0, longest / max(height, width))
    num_rows, num_columns = max(1, round(height * scale)), max(1, round(width * scale))
    rows = (2 * np.arange(num_rows) + 1) * height // (2 * num_rows)
    columns = (2 * np.arange(num_columns) + 1) * width // (2 * num_columns)
    small: NDArray[np.uint8] = labels[rows[:, None], columns]
    return small


def encode_runs(labels: NDArray[np.uint8]) -> str:
    """Base64 of label, length, label, length ... in reading order; a length is 7 bits a byte, low ones first."""
    flat = labels.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    packed = bytearray()
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        packed.append(int(flat[start]))
        length = stop - start
        while length > 127:
            packed.append(length & 127 | 128)
            length >>= 7
        packed.append(length)
    return base64.b64encode(packed).decode()


def write_pictures(out: Path, name: str, photo: NDArray[np.uint8], labels: NDArray[np.uint8], num_slots: int) -> Entry:
    """Writes what the page shows of one photo, which may itself be huge, turned, or of a format no browser knows.

    Args:
        photo: (H, W, 3) RGB.
        labels: (H, W), 0 = background.
    """
    image = Image.fromarray(photo)
    for folder, side in (("photos", _PHOTO_SIDE), ("thumbnails", _THUMBNAIL_SIDE)):
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        write_bytes(out / _FOLDER / folder / f"{name}.jpg", jpeg.getvalue())
    shares = np.bincount(labels.reshape(-1), minlength=num_slots) * 1000 / labels.size
    small = shrink_labels(labels)
    height, width = labels.shape
    return Entry(
        name, width, height, shares.round().astype(int).tolist(), (small.shape[1], small.shape[0]), encode_runs(small)
    )


@dataclass
class Gallery:
    """Collects photos; the page itself appears when all are there."""

    out: Path
    title: str
    part_names: Sequence[str]  # of slots 1 to K
    has_maps: bool  # soft maps lie beside the other files
    _photos: list[Any] = field(default_factory=list)
    _waiting: list[str] = field(default_factory=list)  # runs for the next file of label maps

    @staticmethod
    def begin(out: Path, title: str, part_names: Sequence[str], has_maps: bool) -> "Gallery":
        """Makes the folders. A page from an earlier time is removed: it would mix old photos with new maps."""
        for folder in ("photos", "thumbnails"):
            (out / _FOLDER / folder).mkdir(parents=True, exist_ok=True)
        (out / "index.html").unlink(missing_ok=True)
        return Gallery(out, title, part_names, has_maps)

    def add(self, entry: Entry) -> None:
        self._photos.append([entry.name, entry.width, entry.height, *entry.grid, entry.shares])
        self._waiting.append(entry.runs)
        if len(self._waiting) == PAGE_SIZE:
            self._write_page()

    def finish(self, skipped: Sequence[Skipped]) -> Path:
        """Writes `index.html` and returns its path."""
        if self._waiting:
            self._write_page()
        palette = voc_palette()
        names = ["background", *self.part_names]
        content = {
            "title": self.title,
            "parts": [{"name": name, "colour": palette[slot].tolist()} for slot, name in enumerate(names)],
            "pageSize": PAGE_SIZE,
            "hasMaps": self.has_maps,
            "skipped": [[photo.path, photo.reason] for photo in skipped],
            "photos": self._photos,  # name, width, height, grid width, grid height, shares
        }
        self._write_script("index.js", "slotscopsGallery", content)
        page = self.out / "index.html"
        write_bytes(page, (resources.files("slotscops.segment") / "gallery.html").read_bytes())
        return page

    def _write_page(self) -> None:
        number = (len(self._photos) - 1) // PAGE_SIZE
        self._write_script(f"labels-{number:04}.js", "slotscopsLabels", number, self._waiting)
        self._waiting = []

    def _write_script(self, name: str, function: str, *arguments: Any) -> None:
        # ASCII, so that the page reads it right whatever encoding a server announces.
        listed = ",".join(json.dumps(argument, separators=(",", ":")) for argument in arguments)
        write_bytes(self.out / _FOLDER / name, f"{function}({listed});\n".encode())
