"""Training and inference see the same pixels of the same photo, whatever its mode and shape."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import photo, save_resnet_run

import slotscops
from slotscops.core.photos import read_photo
from slotscops.core.pixels import DEFAULT_CONTEXT
from slotscops.datasets.photo_folder import PhotoFolder
from slotscops.segment.segmenter import Segmenter

# mode -> ending of a format that keeps it
MODES = {
    "1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "png", "RGBA": "png", "CMYK": "tif", "I;16": "png",
    "I;16B": "tif", "I": "tif", "F": "tif", "YCbCr": "tif", "LAB": "tif", "jpeg": "jpg", "turned": "jpg", "gif": "gif",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return slotscops.load(save_resnet_run(tmp_path_factory.mktemp("runs") / "resnet"))


def in_mode(mode: str, size: tuple[int, int]) -> Image.Image:
    grey = photo(size, "L")
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    if mode == "LAB":
        return Image.merge("LAB", [grey, grey, grey])
    return photo(size) if mode in ("jpeg", "turned", "gif") else photo(size).convert(mode)


@pytest.mark.parametrize("size", [(40, 71), (90, 51), (64, 64), (30, 30)])
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_photo_is_the_same_crop_in_shards_and_in_segment(
    mode: str, size: tuple[int, int], model: Segmenter, tmp_path: Path
) -> None:
    exif = Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    in_mode(mode, size).save(tmp_path / f"photo.{MODES[mode]}", exif=exif)
    folder = PhotoFolder(tmp_path, None, 0.0, "object")
    name = f"photo.{MODES[mode]}"
    candidates = folder.scan(name, {"object": "train"}, ["object"], {"train": 0.1, "val": 0.2}).candidates
    (record,), left_out = folder.read(name, candidates, model.size, DEFAULT_CONTEXT)
    assert not left_out
    seen = model.crop(read_photo(tmp_path / name)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen, record.image)
    assert record.image.std() > 1


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_and_sixteen_bits_of_one_photo_are_the_photo_of_eight_bits(white: int, tmp_path: Path) -> None:
    grey = np.asarray(photo((40, 30), "L")) // 2 * 2
    Image.fromarray((grey * np.float64(white / 255)).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("float.tif", "deep.png"):
        np.testing.assert_array_equal(np.asarray(read_photo(tmp_path / name))[..., 0], grey)


@pytest.mark.parametrize("size", [(64, 31), (31, 64)])
def test_maps_of_a_photo_lie_where_its_pixels_lay_in_the_square(size: tuple[int, int], model: Segmenter) -> None:
    image = photo(size)
    square = Image.new("RGB", (64, 64), (124, 116, 104))
    left, top = -((size[0] - 64) // 2), -((size[1] - 64) // 2)
    square.paste(image, (left, top))
    inside = model.segment(square).maps[:, top : top + size[1], left : left + size[0]]
    np.testing.assert_allclose(model.segment(image).maps, inside, atol=1e-5)
