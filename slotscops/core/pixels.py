"""Pixels: square crops around objects, resized, and the normalisation of an ImageNet network.

Channel order, value range and the colour of padding are defined here.

Shapes: B images, H x W pixels of a photo, S side of a resized crop.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slotscops.core.constants import made_once

# RGB mean and standard deviation of ImageNet, pixels in [0, 1]: what torchvision's networks were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Linear sRGB to CIE XYZ; the rows sum to the white point of D65.
_XYZ_OF_RGB = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive

_LARGE_SIDE = 4096  # pixels of the photo; the padding of a larger square is not resized
_STRIP_PIXELS = 4_000_000  # so many pixels of a crop's square are resized at a time
# Colour of padding beyond the photo's edge; it is zero after normalisation.
PADDING = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


@dataclass(frozen=True)
class Context:
    """How much of its surroundings a crop shows around an object's box, as shares of the box's longer side."""

    share: float = 0.05  # on every side of the box, if the box lies in the middle
    jitter: float = 0.0  # the crop is moved by up to this much, across and down

    @property
    def side_per_box(self) -> float:
        """A crop's side over its box's longer side, up to a pixel of the photo."""
        return 1 + 2 * self.share


DEFAULT_CONTEXT = Context()


def box_of(mask: NDArray[np.bool_]) -> Box:
    """The smallest box that holds the (H, W) mask, which must not be empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def square_crop(box: Box, key: str = "", context: Context = DEFAULT_CONTEXT) -> Box:
    """The square around the box with some of its surroundings on every side; it may reach beyond the photo.

    Args:
        key: of the sample. It alone decides by which share of `context.jitter` the square is moved, so that a sample
            has the same crop in every data set and on every machine.
    """
    left, top, right, bottom = box
    longer = max(right - left, bottom - top)
    margin = max(1, round(context.share * longer))
    side = longer + 2 * margin
    across, down = (max(-margin, min(margin, round(share * context.jitter * longer))) for share in _shifts(key))
    x, y = (left + right - side) // 2 + across, (top + bottom - side) // 2 + down
    return x, y, x + side, y + side


def _shifts(key: str) -> tuple[float, float]:
    """Two numbers in -1..1 that look random and depend on the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    across, down = (int.from_bytes(digest[start : start + 8], "big") for start in (0, 8))
    return across / 2**63 - 1, down / 2**63 - 1


def whole_square(size: tuple[int, int]) -> Box:
    """The square around a whole photo of (width, height), which lies in its middle; padding fills the rest."""
    side = max(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def crop_photo(photo: Image.Image, crop: Box, size: int) -> NDArray[np.uint8]:
    """(S, S, 3) RGB, antialiased; ImageNet's mean colour where the crop reaches beyond the photo."""
    return _crop(photo, crop, size, PADDING, Image.Resampling.BICUBIC)


def crop_labels(labels: Image.Image, crop: Box, size: int) -> NDArray[np.uint8]:
    """(S, S) labels of the nearest pixel; 0 where the crop reaches beyond the photo."""
    return _crop(labels, crop, size, 0, Image.Resampling.NEAREST)


def _crop(image: Image.Image, crop: Box, size: int, fill: Any, filter_: Image.Resampling) -> NDArray[np.uint8]:
    """Pads to the square, then resizes: the same values as from one canvas of side x side pixels.

    For squares of more than 4096 pixels, one value in about 10,000 differs from that by one grey level.

    Pillow resizes across first and down second. Here the two passes are separate, so that only a strip of the canvas
    exists at a time. A long thin photo then needs no huge square.
    """
    left, top, right, bottom = crop
    side = right - left
    narrow = Image.new(image.mode, (size, side), fill)  # what is above and below the photo keeps its colour
    num_rows = max(1, _STRIP_PIXELS // side)
    columns = _columns_of_photo(image.width, crop, size)
    box_left, box_right = (column * side / size for column in columns)
    for first in range(max(top, 0), min(bottom, image.height), num_rows):
        last = min(first + num_rows, bottom, image.height)
        strip = Image.new(image.mode, (side, last - first), fill)
        strip.paste(image.crop((0, first, image.width, last)), (-left, 0))
        box = (box_left, 0, box_right, last - first)
        narrow.paste(strip.resize((columns[1] - columns[0], last - first), filter_, box), (columns[0], first - top))
    return np.array(narrow.resize((size, size), filter_))


def _columns_of_photo(width: int, crop: Box, size: int) -> tuple[int, int]:
    """The first resized column that depends on the photo, and the one after the last. Bicubic reaches two pixels far.

    The other columns are padding. A crop of ordinary size is resized in all its columns: a few more are cheap, and the
    values then equal Pillow's to the last bit.
    """
    left, _, right, _ = crop
    side = right - left
    if side <= _LARGE_SIDE:
        return 0, size
    margin = 3 + 3 * size // side
    first = min(max(0, -left * size // side - margin), size - 1)
    return first, max(first + 1, min(size, (width - left) * size // side + 1 + margin))


def normalise_images(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Normalises pixels as a network wants them: (p - mean) / std for each colour.

    Args:
        images: (B, 3, H, W) RGB, uint8 in 0..255 or floating point in [0, 1].
        mean: of red, green and blue, for pixels in [0, 1]. The defaults are those of torchvision's ImageNet networks.
        std: standard deviations, likewise.

    Returns:
        (B, 3, H, W) float32.
    """
    assert images.dtype == torch.uint8 or images.is_floating_point(), images.dtype
    images = images.contiguous()  # the layout of the result decides the last bits of a convolution
    pixels = images / 255 if images.dtype == torch.uint8 else images.float()
    centre, spread = (_of_colours(tuple(numbers), images.device) for numbers in (mean, std))
    return (pixels - centre).div_(spread)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIE Lab of sRGB pixels under the standard illuminant D65.

    Args:
        images: (B, 3, H, W) RGB, uint8 in 0..255 or floating point in [0, 1]. No gradient flows to them.

    Returns:
        (B, 3, H, W), in float64 for float64 images, else float32: L in [0, 100], a and b about in [-110, 110].

    Source: IEC 61966-2-1 for sRGB, CIE 15 for Lab.
    """
    assert images.dtype == torch.uint8 or images.is_floating_point(), images.dtype
    with torch.no_grad():
        dtype = torch.promote_types(images.dtype, torch.float32)
        pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
        red, green, blue = linear.unbind(1)  # (B, H, W)
        # Each row is divided by its sum, so that white is (1, 1, 1). `small` is where the cube root is replaced.
        small = 6 / 29
        roots = []
        for row in _XYZ_OF_RGB:
            share = (row[0] * red + row[1] * green + row[2] * blue) / sum(row)
            straight = share / (3 * small**2) + 4 / 29
            roots.append(torch.where(share > small**3, share.clamp_min(small**3) ** (1 / 3), straight))
        x, y, z = roots
        return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


@made_once
def _of_colours(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1) float32. Filled on the device: a tensor of the host would be copied there, which waits for a GPU."""
    return torch.cat([torch.full((1, 1, 1), number, device=device) for number in numbers])
