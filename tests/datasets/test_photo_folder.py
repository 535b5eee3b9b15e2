import json
from pathlib import Path

import numpy as np
import pytest
from commands import ONE_PROCESS, python, train
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.core.photos import read_photo
from slotscops.core.pixels import PADDING
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.shard.reader import ShardReader

COMMON = ["--size", "64", "--samples-per-shard", "4", "--workers", "1"]


def draw(folder: Path, number: int, parts: Path | None = None) -> None:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"photo.{number}.{('jpg', 'png', 'webp')[number % 3]}")
    if parts:
        labels = np.zeros((40, 60), np.uint8)
        labels[5:20, 10:30], labels[20:30, 10:30] = 1, 2
        parts.mkdir(exist_ok=True)
        Image.fromarray(labels).save(parts / f"photo.{number}.png")


def write(images: Path, out: Path, *more: str) -> int:
    return shard.main(["--images", str(images), "--out", str(out), "--no-features", *COMMON, *more])


def test_every_mode_becomes_rgb_as_shown(tmp_path: Path) -> None:
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        grey = np.full((4, 6), 0x8000, np.uint16)
        (Image.fromarray(grey) if mode == "I;16" else Image.new("RGB", (6, 4), (128,) * 3).convert(mode)).save(path)
        photo = read_photo(path)
        assert (photo.mode, photo.size) == ("RGB", (6, 4))
        # Black and white, or of few colours: Pillow's own conversion leaves the grey.
        assert mode in ("1", "P") or abs(photo.getpixel((2, 2))[0] - 128) <= 1  # type: ignore[index, operator]
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png").getpixel((0, 0)) == PADDING
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").size == (4, 6)


def test_photos_with_label_maps_are_cropped_to_their_labels_and_damage_is_listed(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / "photos" / "sub", number, tmp_path / "parts")
    (tmp_path / "parts" / "parts.txt").write_text("top\nbottom\n")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"x")
    assert write(tmp_path / "photos", tmp_path / "out", "--parts", str(tmp_path / "parts"), "--val-share", "0.5") == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.part_names == {"object": ["top", "bottom"]}
    assert sum(dataset.num_samples(split) for split in ("train", "val")) == 8
    description = ShardReader(dataset, dataset.splits["train"][0]).read_description(0)
    assert (description["box"], description["part_names"]) == ([10, 5, 30, 30], ["top", "bottom"])
    (left_out,) = json.loads((tmp_path / "out" / "index" / "left_out.json").read_text())
    assert left_out["image"] == "broken.jpg"
    assert left_out["damaged"]


def test_two_photos_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    draw(tmp_path / "a", 0)
    draw(tmp_path / "b", 0)
    with pytest.raises(UserError, match=r"photo\.0\.jpg and .*two photos of one name"):
        write(tmp_path, tmp_path / "out")


def test_a_folder_of_plain_photos_trains_and_evaluates_and_is_inspected(tmp_path: Path) -> None:
    for number in range(16):
        draw(tmp_path / "photos" / ("val" if number % 4 == 0 else "train"), number)
    out = tmp_path / "out"
    more = ["--teacher-weights", "random:0", *COMMON]
    assert shard.main(["--images", str(tmp_path / "photos"), "--out", str(out), *more]) == 0
    assert [open_dataset(out).num_samples(split) for split in ("train", "val")] == [12, 4]
    trained = train(ONE_PROCESS, out, tmp_path / "run", "train.eval_every_steps=3")
    assert trained.returncode == 0, trained.stderr
    scored = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "run", "--shards", out)
    assert scored.returncode == 0, scored.stderr
    assert shard.main(["--inspect", str(out)]) == 0
    with Image.open(out / "contact_sheet.png") as picture:
        assert picture.width > 64
