"""Makes a page, `index.html`, that shows all segmented photos. It opens from disk, without a network.

A page on disk may show a picture but not read its pixels. The labels that the page needs to name the part under the
pointer therefore come as scripts. `gallery/index.js` lists the photos and the share of each part in them.
`gallery/labels-NNNN.js` holds the run-length encoded label maps of 100 photos, with at most 192 cells per side. The
page loads only those for the photos on the screen.

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
GRID_SIDE = 192  # cells on the longer side of the label maps that the page draws
_THUMBNAIL_SIDE, _PHOTO_SIDE = 320, 1280  # pixels
_FOLDER = "gallery"


@dataclass(frozen=True)
class Entry:
    """One photo in the gallery."""

    name: str
    width: int  # of the photo, pixels
    height: int
    shares: list[int]  # share of each slot in the photo's pixels, in thousandths
    grid: tuple[int, int]  # width and height of the small label map
    runs: str  # see `encode_runs`


@dataclass(frozen=True)
class Skipped:
    """A photo that could not be read or written."""

    path: str
    reason: str


def shrink_labels(labels: NDArray[np.uint8], longest: int = GRID_SIDE) -> NDArray[np.uint8]:
    """(H, W) labels -> (g, f) labels at the centres of the cells, with g and f at most `longest`."""
    height, width = labels.shape
    scale = min(1.0, longest / max(height, width))
    num_rows, num_columns = max(1, round(height * scale)), max(1, round(width * scale))
    rows = (2 * np.arange(num_rows) + 1) * height // (2 * num_rows)
    columns = (2 * np.arange(num_columns) + 1) * width // (2 * num_columns)
    small: NDArray[np.uint8] = labels[rows[:, None], columns]
    return small


def encode_runs(labels: NDArray[np.uint8]) -> str:
    """Run-length encodes (g, f) labels as base64 of label, length, label, length ... in row-major order.

    A length takes one or more bytes of 7 bits each, low bits first. The top bit is set in all but its last byte.
    """
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
    """Writes the JPEGs that the page shows of one photo.

    The page does not use the photo's own file, which may be huge, rotated, or of a format that browsers do not show.

    Args:
        name: file name of the photo in the gallery, without its ending.
        photo: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 rows of the slots, see `FoundParts.winners`; 0 = background.
        num_slots: S.

    Returns:
        The photo's entry for `Gallery.add`.
    """
    image = Image.fromarray(photo)
    for folder, side in (("photos", _PHOTO_SIDE), ("thumbnails", _THUMBNAIL_SIDE)):
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        write_bytes(out / _FOLDER / folder / f"{name}.jpg", jpeg.getvalue())
    # Row by row, because NumPy first makes 8 bytes of each label.
    counts = np.stack([np.bincount(row, minlength=num_slots) for row in labels]).sum(axis=0)
    shares = counts * 1000 / labels.size
    small = shrink_labels(labels)
    height, width = labels.shape
    return Entry(
        name, width, height, shares.round().astype(int).tolist(), (small.shape[1], small.shape[0]), encode_runs(small)
    )


@dataclass
class Gallery:
    """Collects photos. `finish` writes the page when all photos have been added."""

    out: Path
    title: str
    part_names: Sequence[str]  # names of the parts
    has_maps: bool  # soft maps were written too
    part_numbers: Sequence[int] | None = None  # of these parts, which say their colours; None: 1 to K
    _photos: list[Any] = field(default_factory=list)
    _waiting: list[str] = field(default_factory=list)  # encoded label maps for the next file of them

    @staticmethod
    def begin(
        out: Path, title: str, part_names: Sequence[str], has_maps: bool, part_numbers: Sequence[int] | None = None
    ) -> "Gallery":
        """Makes the folders. It removes an earlier page, which would mix old photos with new maps."""
        for folder in ("photos", "thumbnails"):
            (out / _FOLDER / folder).mkdir(parents=True, exist_ok=True)
        (out / "index.html").unlink(missing_ok=True)
        return Gallery(out, title, part_names, has_maps, part_numbers)

    def add(self, entry: Entry) -> None:
        """Adds a photo, and writes a file of label maps when 100 photos are waiting for it."""
        self._photos.append([entry.name, entry.width, entry.height, *entry.grid, entry.shares])
        self._waiting.append(entry.runs)
        if len(self._waiting) == PAGE_SIZE:
            self._write_page()

    def finish(self, skipped: Sequence[Skipped]) -> Path:
        """Writes the remaining label maps, the list of photos and `index.html`. Returns the path of the page."""
        if self._waiting:
            self._write_page()
        palette = voc_palette()
        names = ["background", *self.part_names]
        numbers = [0, *(self.part_numbers or range(1, len(names)))]
        content = {
            "title": self.title,
            "parts": [
                {"name": name, "colour": palette[number].tolist()} for number, name in zip(numbers, names, strict=True)
            ],
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
        # ASCII only, so that the page reads it correctly with any encoding that a server announces.
        listed = ",".join(json.dumps(argument, separators=(",", ":")) for argument in arguments)
        write_bytes(self.out / _FOLDER / name, f"{function}({listed});\n".encode())
