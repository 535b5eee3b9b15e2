"""Draws part maps: VOC's colours, overlays on photos, and sheets of several pictures."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slotscops.core.records import IGNORED

_GAP = 4  # pixels between the tiles of a sheet
_STRIP_PIXELS = 1_000_000  # pixels coloured at a time, so that a large photo needs no large floating-point copies


def voc_palette(num_labels: int = 256) -> NDArray[np.uint8]:
    """(num_labels, 3) RGB colours of PASCAL VOC: label 0 black, neighbouring labels far apart.

    Bit b of the label goes to bit 7 - b // 3 of channel b % 3.
    """
    labels = np.arange(num_labels)
    palette = np.zeros((num_labels, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= (((labels >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette


def overlay(image: NDArray[np.uint8], labels: NDArray[np.uint8], opacity: float = 0.6) -> Image.Image:
    """The photo with its parts coloured; label 0, the background, and pixels to be ignored (255) stay as they are.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) part labels.
        opacity: of the colours, 0..1.
    """
    height, width = labels.shape
    palette = voc_palette().astype(np.float32)
    picture = Image.new("RGB", (width, height))
    num_rows = max(1, _STRIP_PIXELS // width)
    for first in range(0, height, num_rows):
        photo, label = image[first : first + num_rows], labels[first : first + num_rows]
        is_part = (label > 0) & (label != IGNORED)
        mixed = (1 - opacity) * photo + opacity * palette[label]
        strip = np.where(is_part[..., None], mixed, photo).round().astype(np.uint8)
        picture.paste(Image.fromarray(strip), (0, first))
    return picture


def label_image(labels: NDArray[np.uint8]) -> Image.Image:
    """Indexed PNG of a (H, W) label map in VOC's colours: pixel value = part label."""
    image = Image.fromarray(labels).convert("P")
    image.putpalette(voc_palette().tobytes())
    return image


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of equal size in rows and columns, on white."""
    width, height = rows[0][0].size
    num_columns = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB", (num_columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), (255, 255, 255)
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture.convert("RGB"), (x * (width + _GAP), y * (height + _GAP)))
    return canvas


def comparison(images: Tensor, predicted: Tensor, true: Tensor | None) -> Image.Image:
    """A sheet of three rows: photos, parts found, true parts.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        predicted: (B, H, W) integer labels, 0 = background.
        true: (B, H, W) integer labels, or None for no third row.
    """
    photos = [photo.permute(1, 2, 0).cpu().numpy() for photo in images]
    rows = [[Image.fromarray(photo) for photo in photos]]
    for labels in (predicted, true):
        if labels is not None:
            maps = labels.to(torch.uint8).cpu().numpy()
            rows.append([overlay(photo, label_map) for photo, label_map in zip(photos, maps, strict=True)])
    return sheet(rows)


def picture_bytes(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()
