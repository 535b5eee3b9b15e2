import io

import numpy as np
import torch
from PIL import Image

from slotscops.core.pictures import comparison, label_image, overlay, picture_bytes, voc_palette
from slotscops.core.records import IGNORED


def test_the_first_colours_are_those_of_pascal_voc() -> None:
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert [tuple(colour) for colour in voc_palette(7).tolist()] == expected
    assert len({tuple(colour) for colour in voc_palette().tolist()}) == 256


def test_an_overlay_leaves_the_background_alone_and_mixes_the_rest() -> None:
    photo = np.full((1, 3, 3), 100, np.uint8)
    mixed = np.asarray(overlay(photo, np.array([[0, 1, IGNORED]], np.uint8), opacity=0.5))
    assert mixed[0, 0].tolist() == mixed[0, 2].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == [114, 50, 50]


def test_a_label_picture_read_back_as_indices_is_the_label_map() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(picture_bytes(label_image(labels)))) as image:
        assert image.mode == "P"
        assert (np.asarray(image) == labels).all()


def test_a_comparison_has_a_row_for_photos_found_and_true_parts() -> None:
    images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
    labels = torch.ones(3, 10, 10, dtype=torch.int64)
    assert comparison(images, labels, labels).size == (38, 38)
    picture = comparison(images, labels, None)
    assert picture.size == (38, 24)
    assert picture.getpixel((0, 14)) == (77, 0, 0)
