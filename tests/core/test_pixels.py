"""Crops: padded, then resized, whatever the photo's shape."""

import numpy as np
import pytest
from PIL import Image
from small_runs import photo

from slotscops.core.pixels import PADDING, Box, crop_labels, crop_photo, whole_square


@pytest.mark.parametrize(("strip_pixels", "large_side"), [(1, 4096), (700, 4096), (4_000_000, 4096), (700, 1)])
@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((90, 50), whole_square((90, 50))),
        ((51, 90), whole_square((51, 90))),
        ((64, 64), whole_square((64, 64))),
        ((3, 200), whole_square((3, 200))),
        ((1, 1), whole_square((1, 1))),
        ((90, 50), (10, 5, 40, 35)),
        ((90, 50), (-7, 20, 53, 80)),
    ],
)
def test_a_crop_resized_in_strips_has_the_values_of_one_padded_canvas(
    size: tuple[int, int], crop: Box, strip_pixels: int, large_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slotscops.core.pixels._STRIP_PIXELS", strip_pixels)
    monkeypatch.setattr("slotscops.core.pixels._LARGE_SIDE", large_side)
    image, side = photo(size), crop[2] - crop[0]
    canvas = Image.new("RGB", (side, side), PADDING)
    canvas.paste(image, (-crop[0], -crop[1]))
    expected = np.asarray(canvas.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop_photo(image, crop, 32), expected)
    labels = image.convert("L")
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(labels, (-crop[0], -crop[1]))
    expected = np.asarray(canvas.resize((32, 32), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(crop_labels(labels, crop, 32), expected)


def test_a_photo_of_extreme_shape_needs_no_square_of_its_longer_side() -> None:
    wide = crop_photo(Image.new("RGB", (100_000, 2), (9, 9, 9)), whole_square((100_000, 2)), 32)
    assert wide.shape == (32, 32, 3)
    assert tuple(wide[0, 0]) == PADDING
