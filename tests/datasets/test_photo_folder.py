import io
import json
import os
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PYTHON, python, train
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slotscops.core.errors import UserError
from slotscops.core.files import sha256_of_json
from slotscops.core.photos import read_photo
from slotscops.core.pixels import PADDING
from slotscops.core.records import IGNORED, MEMBERS, Record, from_members
from slotscops.datasets.label_maps import read_part_names
from slotscops.datasets.photo_folder import PhotoFolder
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


def left_out(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "index" / "left_out.json").read_text())
    return found


def records(out: Path) -> dict[str, Record]:
    """Every sample of all shards by its image."""
    dataset = open_dataset(out)
    readers = [ShardReader(dataset, entry) for entries in dataset.splits.values() for entry in entries]
    found = {}
    for reader in readers:
        for row in range(len(reader.index)):
            members = {name: reader.read_member(row, name) for name in MEMBERS}
            record = from_members(reader.index.key(row), members)
            found[record.description["image"]] = record
    return found


# ---- label maps --------------------------------------------------------------------------------------------------


def small_png(values: NDArray[np.uint8], depth: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow does not write."""
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(len(values), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def shard_one(
    folder: Path, label: bytes, names: str | None = None, exif: Image.Exif | None = None, photo: str = "a.png"
) -> Path:
    """One photo of 60 x 40 pixels with one label map, as shards."""
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "parts").mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), (90, 120, 30)).save(folder / "photos" / photo, exif=exif or Image.Exif())
    (folder / "parts" / "a.png").write_bytes(label)
    if names is not None:
        (folder / "parts" / "parts.txt").write_text(names, encoding="utf-8")
    write(folder / "photos", folder / "out", "--parts", str(folder / "parts"))
    return folder / "out"


def png(values: NDArray[np.uint8], kind: str = "PNG", exif: int | None = None) -> bytes:
    stream = io.BytesIO()
    entries = Image.Exif()
    if exif is not None:
        entries[0x0112] = exif
    Image.fromarray(values).save(stream, kind, exif=entries)
    return stream.getvalue()


def boxes(*labels: int) -> NDArray[np.uint8]:
    """A map of 60 x 40 pixels with one column for each label, 4 pixels wide."""
    values = np.zeros((40, 60), np.uint8)
    for number, label in enumerate(labels):
        values[10:30, 8 + 4 * number : 12 + 4 * number] = label
    return values


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_greys_of_few_bits_are_the_labels_that_were_written(tmp_path: Path, depth: int) -> None:
    labels = tuple(range(1, min(2**depth, 4)))
    out = shard_one(tmp_path, small_png(boxes(*labels), depth))
    assert open_dataset(out).part_names == {"object": [f"part_{label}" for label in labels]}
    assert set(np.unique(records(out)["a.png"].part_labels)) == {0, *labels}


def test_a_rim_of_255_is_neither_part_nor_object_and_stays_to_be_ignored(tmp_path: Path) -> None:
    out = shard_one(tmp_path, png(boxes(1, 2, 255)))
    assert shard.main(["--inspect", str(out)]) == 0
    assert open_dataset(out).part_names == {"object": ["part_1", "part_2"]}
    record = records(out)["a.png"]
    assert set(np.unique(record.part_labels)) == {0, 1, 2, IGNORED}
    assert record.description["box"] == [8, 10, 16, 30]
    assert record.description["part_names"] == ["part_1", "part_2"]
    assert (record.object_mask == ((record.part_labels == 1) | (record.part_labels == 2))).all()


def test_255_alone_is_the_mask_of_an_object_without_parts(tmp_path: Path) -> None:
    out = shard_one(tmp_path, png(boxes(255)))
    record = records(out)["a.png"]
    assert open_dataset(out).part_names == {"object": []}
    assert not record.part_labels.any()
    assert record.object_mask.any()
    assert record.description["box"] == [8, 10, 12, 30]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (png(boxes(1, 2), "JPEG"), "is a JPEG by its content"),
        (png(boxes(1, 4)), r"labels 1, 4, needed 1, 2, 3"),
        (png(boxes(85, 170, 255)), r"labels 85, 170, 255, needed"),
        (png(np.tile(np.arange(60, dtype=np.uint8), (40, 1))), r"59 labels \(1, 2, 3, 4, 5, 6, 7, 8 and 51 more\)"),
        (png(np.zeros((40, 60, 3), np.uint8)), "a PNG of mode RGB"),
        (png(boxes(1).T), "labels of 40 x 60"),
        (png(np.zeros((80, 120), np.uint8)), "labels of 120 x 80"),
        (png(255 - boxes(255)), "only 255 along its whole edge, as an inverted mask does"),
    ],
)
def test_values_that_are_no_part_labels_are_refused_with_what_was_seen(
    tmp_path: Path, label: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=rf"parts/a\.png.*{message}"):
        shard_one(tmp_path, label)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfhead\r\nbody side\r\n\r\n",
        "\ufeffhead\nbody\u00a0side \n".encode("utf-16-le"),
        "\ufeffhead\nbody side".encode("utf-16-be"),
        b"__ignore__\n_Background_\nhead\nbody side\n",
        b"0: background\n1: head\n2: body side\n255: void\n",
        b"1\thead\n2\tbody side\n",
    ],
)
def test_a_list_of_names_is_read_as_editors_and_tools_write_it(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "parts.txt").write_bytes(text)
    assert read_part_names(tmp_path / "parts.txt") == ["head", "body side"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"t\xeate\n", "is not UTF-8 text"),
        (b"1 head\n3 tail\n", "begin with 1, ..., 3, needed 1, 2, 3"),
        (b"head\nhead\n", "each once"),
        (b"he\x1bad\n", "cannot be shown"),
    ],
)
def test_a_list_of_names_that_is_none_is_one_line_before_any_photo_is_read(
    tmp_path: Path, text: bytes, message: str
) -> None:
    draw(tmp_path / "photos", 0, tmp_path / "parts")
    (tmp_path / "parts" / "parts.txt").write_bytes(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/parts/parts\.txt: .*{message}"):
        write(tmp_path / "photos", tmp_path / "out", "--parts", str(tmp_path / "parts"))


def test_a_part_that_one_photo_hides_needs_a_list_of_names_which_may_begin_with_0(tmp_path: Path) -> None:
    out = shard_one(tmp_path, png(boxes(1, 3)), "\ufeffbackground\nhead\nbody\u00a0side\ntail\n")
    assert open_dataset(out).part_names == {"object": ["head", "body side", "tail"]}
    assert records(out)["a.png"].description["part_names"] == ["head", "tail"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("own", "photo"), [(False, "a.png"), (True, "a.png"), (False, "a.jpg"), (False, "a.tif")])
def test_a_label_map_of_the_stored_pixels_is_turned_with_its_photo(
    tmp_path: Path, orientation: int, own: bool, photo: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = boxes(1, 1, 2)
    label = png(stored, exif=orientation if own else None)
    record = records(shard_one(tmp_path, label, exif=exif, photo=photo))[photo]
    marked = Image.fromarray(stored)
    marked.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(marked))
    rows, columns = np.nonzero(shown)
    assert record.description["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_label_map_drawn_over_the_photo_as_shown_stays_as_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    record = records(shard_one(tmp_path, png(np.ascontiguousarray(boxes(1).T)), exif=exif))["a.png"]
    assert record.description["box"] == [10, 8, 30, 12]


# ---- names and the walk ------------------------------------------------------------------------------------------


def test_names_that_no_key_can_hold_get_one_and_photos_meet_their_labels(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "parts").mkdir()
    decomposed, composed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    screenshot = "Screenshot at 9.41\u202fAM"
    for photo, label in ((f"{decomposed}.JPG", f"{composed}.PNG"), (f"{screenshot}.PNG", f"{screenshot}.png")):
        Image.new("RGB", (60, 40)).save(tmp_path / "photos" / photo)
        (tmp_path / "parts" / label).write_bytes(png(boxes(1, 2)))
    assert write(tmp_path / "photos", tmp_path / "out", "--parts", str(tmp_path / "parts"), "--strict") == 0
    keys = {name: record.key for name, record in records(tmp_path / "out").items()}
    assert keys == {
        f"{decomposed}.JPG": f"{composed}_0",
        f"{screenshot}.PNG": "Screenshot at 9_41%E2%80%AFAM_0",
    }


def test_a_name_that_is_not_utf_8_is_left_out_and_listed(tmp_path: Path) -> None:
    draw(tmp_path / "photos", 0)
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 1
    (item,) = left_out(tmp_path / "out")
    assert (item["image"], item["kind"]) == (r"caf\xe9.jpg", "name that is not UTF-8")


def test_all_that_is_no_photo_is_counted_and_links_are_followed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slotscops.core.photos._reads_heif", lambda: False)
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    draw(photos / "real", 0)
    draw(elsewhere, 1)
    Image.new("RGB", (60, 40)).save(photos / "moving.gif")
    Image.new("RGB", (60, 40)).save(photos / "old.JFIF", "JPEG")
    Image.new("RGB", (60, 40)).save(photos / "new.avif")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "again").symlink_to(photos / "real")
    (photos / "up").symlink_to(tmp_path)
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "copy.jpg").symlink_to(photos / "real" / "photo.0.jpg")
    for name in ("notes.txt", "phone.HEIC", "._a.jpg", "Thumbs.db", ".DS_Store", ".hidden.jpg"):
        (photos / name).write_bytes(b"x")
    (photos / "__MACOSX").mkdir()
    (photos / "__MACOSX" / "a.jpg").write_bytes(b"x")
    assert write(photos, tmp_path / "out", "--strict") == 1
    taken = {"linked/photo.1.png", "moving.gif", "new.avif", "old.JFIF", "real/photo.0.jpg"}
    assert records(tmp_path / "out").keys() == taken
    found = {item["image"]: (item["kind"], item["damaged"]) for item in left_out(tmp_path / "out")}
    litter = ("litter of an operating system", False)
    seen = ("link to a folder seen already", True)
    assert found == {
        "again": seen, "up": seen,
        "gone.jpg": ("link that leads nowhere", True),
        "copy.jpg": ("link to a photo taken already", True),
        "notes.txt": ("no photo by its ending", True),
        "phone.HEIC": ("HEIC without pillow-heif", True),
        ".hidden.jpg": ("hidden", False),
        "._a.jpg": litter, "Thumbs.db": litter, ".DS_Store": litter, "__MACOSX": litter,
    }  # fmt: skip


def test_litter_alone_is_no_reason_to_fail_and_does_not_change_the_plan(tmp_path: Path) -> None:
    draw(tmp_path / "photos", 0)
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 0
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"x")
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 0


def test_shards_of_an_earlier_version_which_counted_photos_only_are_added_to(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "photos", number)
    write(tmp_path / "photos", tmp_path / "out")
    path = tmp_path / "out" / "index" / "plan.json"
    names = [image for image in PhotoFolder(tmp_path / "photos", None, 0.1, "object").list_images() if image != "."]
    plan = json.loads(path.read_text()) | {"images": 3, "images_sha256": sha256_of_json(names)}
    path.write_text(json.dumps(plan))
    assert write(tmp_path / "photos", tmp_path / "out") == 0
    draw(tmp_path / "photos", 3)
    with pytest.raises(UserError, match="was made with another images"):
        write(tmp_path / "photos", tmp_path / "out")


def test_photos_of_a_test_folder_are_never_trained_on(tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "photos" / ("train", "Test")[number == 2], number)
    assert write(tmp_path / "photos", tmp_path / "out", "--val-share", "0", "--strict") == 0
    assert [open_dataset(tmp_path / "out").num_samples(split) for split in ("train", "val")] == [2, 1]


@pytest.mark.parametrize("folders", [("train", "validation"), ("Train", "Val"), ("training", "VALID")])
def test_folders_named_after_splits_are_the_splits(tmp_path: Path, folders: tuple[str, str]) -> None:
    for number in range(3):
        draw(tmp_path / "photos" / folders[number == 2], number)
    draw(tmp_path / "photos" / "test", 3)
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 0
    assert [open_dataset(tmp_path / "out").num_samples(split) for split in ("train", "val")] == [2, 1]
    (item,) = left_out(tmp_path / "out")
    assert (item["image"], item["kind"]) == ("test/photo.3.jpg", "in no split folder")


def test_photos_of_one_name_have_their_paths_as_keys_and_labels_of_their_own(tmp_path: Path) -> None:
    photos, parts = tmp_path / "photos", tmp_path / "parts"
    draw(photos, 0)
    for folder, label in (("a", 1), ("b", 2), ("c", 0)):
        draw(photos / folder, 1)
        (parts / folder).mkdir(parents=True)
        (parts / folder / "photo.1.png").write_bytes(png(boxes(*range(1, label + 1))))
    for name in ("photo.0.png", "photo.1.png"):  # the second could be of any of three photos
        (parts / name).write_bytes(png(boxes(1)))
    (parts / "c" / "photo.1.png").unlink()
    assert write(photos, tmp_path / "out", "--parts", str(parts), "--strict") == 1
    found = {name: (record.key, record.description["part_names"]) for name, record in records(tmp_path / "out").items()}
    assert found == {
        "photo.0.jpg": ("photo_0_0", ["part_1"]),
        "a/photo.1.png": ("a%2Fphoto%2E1%2Epng_0", ["part_1"]),
        "b/photo.1.png": ("b%2Fphoto%2E1%2Epng_0", ["part_1", "part_2"]),
    }
    reasons = {(item["image"], item["kind"]): item["reason"] for item in left_out(tmp_path / "out")}
    assert "must lie there because other photos have the same name" in reasons["c/photo.1.png", "no label map"]
    assert reasons.keys() == {
        ("c/photo.1.png", "no label map"),
        (f"{parts}/photo.1.png", "label map without a photo"),
    }


def test_photos_whose_names_are_one_on_a_mac_are_not_both_taken(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    names = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")]
    for name in names:
        Image.new("RGB", (60, 40)).save(tmp_path / "photos" / name)
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 1
    assert [item["kind"] for item in left_out(tmp_path / "out")] == ["name of another photo"]
    assert len(records(tmp_path / "out")) == 1


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_label_maps_that_are_not_used_are_counted_by_reason(tmp_path: Path, num_workers: str) -> None:
    photos, parts = tmp_path / "photos", tmp_path / "parts"
    for number in range(4):
        draw(photos, number, parts)
    (parts / "photo.1.png").rename(parts / "photo.1.tif")
    (parts / "photo.2.png").rename(parts / "other.png")
    (parts / "photo.3.png").write_bytes(png(boxes(85)))
    (parts / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("readme.md", "Thumbs.db", "parts.txt"):
        (parts / name).write_text("top\nbottom\n")
    more = ["--parts", str(parts), "--strict", "--workers", num_workers]
    assert write(photos, tmp_path / "out", *more) == 1
    assert records(tmp_path / "out").keys() == {"photo.0.jpg"}
    assert {(item["image"], item["kind"]) for item in left_out(tmp_path / "out")} == {
        ("photo.1.png", "no label map"),
        ("photo.2.webp", "no label map"),
        ("photo.3.jpg", "label map that cannot be used"),
        (f"{parts}/photo.1.tif", "label map without a photo"),
        (f"{parts}/other.png", "label map without a photo"),
        (f"{parts}/gone.png", "link that leads nowhere"),
    }
    (reason,) = (item["reason"] for item in left_out(tmp_path / "out") if item["image"] == "photo.1.png")
    assert "only photo.1.tif" in reason


def test_where_no_photo_is_left_one_line_counts_the_reasons(tmp_path: Path) -> None:
    images, parts = tmp_path / "photos", tmp_path / "parts"
    for number in range(3):
        draw(images, number, parts)
        Image.new("L", (60, 40)).save(parts / f"photo.{number}.png")
    (images / "broken.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        write(images, tmp_path / "out", "--parts", str(parts))
    assert "to write: 3 x no parts annotated, 1 x damaged file; such as broken.jpg: " in str(caught.value)
    (tmp_path / "others").mkdir()
    for name in ("a.txt", "b.txt", "Thumbs.db"):
        (tmp_path / "others" / name).touch()
    with pytest.raises(UserError, match=r"passed over 2 x no photo by its ending, 1 x .*, such as "):
        write(tmp_path / "others", tmp_path / "out")


def test_label_maps_among_the_photos_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, 0, tmp_path)
    with pytest.raises(UserError, match="put the label maps into a folder of their own"):
        write(tmp_path, tmp_path / "out", "--parts", str(tmp_path))


def test_a_folder_of_plain_photos_trains_and_evaluates_and_is_inspected(tmp_path: Path) -> None:
    for number in range(16):
        draw(tmp_path / "photos" / ("val" if number % 4 == 0 else "train"), number)
    out = tmp_path / "out"
    more = ["--teacher-weights", "random:0", *COMMON]
    assert shard.main(["--images", str(tmp_path / "photos"), "--out", str(out), *more]) == 0
    assert [open_dataset(out).num_samples(split) for split in ("train", "val")] == [12, 4]
    trained = train(PYTHON, out, tmp_path / "run", "train.eval_every_steps=3")
    assert trained.returncode == 0, trained.stderr
    scored = python("-m", "slotscops.evaluate", "--checkpoint", tmp_path / "run", "--shards", out)
    assert scored.returncode == 0, scored.stderr
    assert shard.main(["--inspect", str(out)]) == 0
    with Image.open(out / "contact_sheet.png") as picture:
        assert picture.width > 64


def test_a_heic_photo_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pip install 'slotscops[heif]'")
    (tmp_path / "photos").mkdir()
    photo = Image.new("RGB", (64, 48), (200, 60, 20))
    heif.from_pillow(photo).save(tmp_path / "photos" / "phone.HEIC", quality=95)
    assert write(tmp_path / "photos", tmp_path / "out", "--strict") == 0
    (record,) = records(tmp_path / "out").values()
    centre = record.image[record.image.shape[0] // 2, record.image.shape[1] // 2]
    assert np.abs(centre.astype(int) - [200, 60, 20]).max() < 12


def test_a_class_name_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    draw(tmp_path / "photos", 0)
    assert write(tmp_path / "photos", tmp_path / "out", "--class-name", "my\u00a0horse") == 0
    assert open_dataset(tmp_path / "out").class_names == ["my horse"]
    for name in ("", "\u00a0", "horse\u200b\x1b"):
        with pytest.raises(UserError, match="--class-name"):
            write(tmp_path / "photos", tmp_path / "none", "--class-name", name)
    assert not (tmp_path / "none").exists()
