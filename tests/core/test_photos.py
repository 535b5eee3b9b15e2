import errno
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from small_runs import photo

from slotscops.core import photos
from slotscops.core.errors import UserError
from slotscops.core.photos import find_photos, read_image, read_photo, to_array, to_rgb, unique_names
from slotscops.core.pixels import PADDING


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_an_image_of_any_mode_becomes_rgb_of_its_size(mode: str) -> None:
    grey = photo((7, 5), "L")
    image = grey.convert("I").convert("I;16") if mode == "I;16" else photo((7, 5)).convert("RGB")
    if mode in ("I", "F"):
        image = grey.convert(mode)
    elif mode == "LAB":
        image = Image.new("LAB", (7, 5), (128, 128, 128))
    elif mode not in ("I;16", "RGB"):
        image = image.convert(mode)
    result = to_rgb(image)
    assert (result.mode, result.size) == ("RGB", (7, 5))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(read_photo(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_what_is_transparent_gets_the_colour_of_padding() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (1, 2, 3, 255))
    result = to_rgb(image)
    assert result.getpixel((0, 0)) == PADDING
    assert result.getpixel((1, 0)) == (1, 2, 3)


@given(st.lists(st.sampled_from(["a.jpg", "A.jpg", "x/a.png", "a-2.jpg", "b.jpg", "y/a-2.gif"]), max_size=8))
def test_every_photo_has_a_name_of_its_own_on_any_file_system(photos: list[str]) -> None:
    names = unique_names(map(Path, photos))
    assert len({name.casefold() for name in names}) == len(photos)


def test_a_photo_named_twice_is_taken_once_and_results_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "gallery" / "photos").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "b.parts.png", "b.overlay.jpg", "gallery/photos/b.jpg", "notes.txt"):
        photo((4, 4)).save(tmp_path / name, "PNG")
    found = find_photos([tmp_path / "b.jpg", tmp_path], out=tmp_path)
    assert found.photos == [tmp_path / "b.jpg", tmp_path / "a.PNG"]
    assert [item.path.name for item in found.passed_over] == ["notes.txt"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_photo_cut_short_is_refused_by_name(tmp_path: Path, share: float) -> None:
    photo((200, 200)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"cut\.jpg: is no readable image"):
        read_photo(tmp_path / "cut.jpg")


def test_a_heic_photo_under_another_ending_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slotscops.core.photos._reads_heif", lambda: False)
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match=r"phone\.jpg: reading HEIC needs pillow-heif"):
        read_photo(tmp_path / "phone.jpg")


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    photo((4, 4)).save(tmp_path / "a.png")
    listdir = os.listdir

    def refuse(folder: Path) -> list[str]:  # the tests may run as root, who may read everything
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    found = find_photos([tmp_path])
    assert found.photos == [tmp_path / "a.png"]
    assert [(item.kind, item.reason) for item in found.passed_over] == [
        ("folder that cannot be read", "Permission denied")
    ]


@pytest.mark.parametrize("ending", ["", ".maps.safetensors"])
def test_long_names_are_cut_to_fit_and_stay_different(ending: str) -> None:
    names = unique_names([Path("a/" + "é" * 127 + ".jpg"), Path("b/" + "é" * 127 + ".jpg")], ending)
    assert len(set(names)) == 2
    assert max(len((name + ending).encode()) for name in names) <= 255


def test_a_message_about_a_photo_stays_on_one_line_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"two\nlines \x1b[2J \xe9.jpg")
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"two\\nlines \\x1b\[2J \\xe9\.jpg: is no readable image") as refused:
        read_photo(path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_a_photo_is_turned_as_pillow_turns_it_and_says_by_what(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    photo((7, 5)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    image, said = read_image(path)
    assert (np.asarray(to_rgb(image)) == expected).all()
    assert said == orientation


def entry(kind: int, count: int, value: bytes) -> bytes:
    """An Exif block with nothing but an orientation of some type."""
    head = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"
    return head + struct.pack(">HI", kind, count) + value + bytes(20)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (entry(3, 1, b"\0\x06\0\0"), (5, 7)),
        (entry(4, 1, b"\0\0\0\x06"), (5, 7)),
        (entry(11, 1, struct.pack(">f", 6)), (5, 7)),
        (entry(3, 1, b"\0\x09\0\0"), (7, 5)),
        (entry(2, 2, b"6\0\0\0"), (7, 5)),
        (entry(5, 1, b"\xff\xff\xff\xff"), (7, 5)),
        (entry(3, 1, b"\0\x06\0\0")[:20], (7, 5)),
        (b"Exif\0\0" + bytes(range(60)), (7, 5)),
    ],
)
def test_a_damaged_exif_block_costs_no_photo(tmp_path: Path, exif: bytes, size: tuple[int, int]) -> None:
    photo((7, 5)).save(tmp_path / "a.jpg", exif=exif)
    assert read_photo(tmp_path / "a.jpg").size == size


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_whole_numbers_of_32_bits_are_scaled_and_not_clipped(tmp_path: Path, white: int) -> None:
    values = np.linspace(0, white, 256).round().astype(np.int32)[None]
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert np.asarray(read_photo(tmp_path / "deep.tif"))[0, :, 0].tolist() == list(range(256))


def test_postscript_is_not_given_to_an_interpreter(tmp_path: Path) -> None:
    photo((7, 5)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: is PostScript, which is no photo"):
        read_photo(tmp_path / "a.jpg")


def test_links_in_a_circle_and_what_is_no_file_are_passed_over_wherever_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo((4, 4)).save(folder / "a.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "there").symlink_to(folder / "back")
    (folder / "back").symlink_to(folder / "there")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind("socket.png")  # its whole path may be too long for a socket
        found = find_photos([folder, folder / "pipe.jpg"], out=tmp_path / "out")
    assert found.photos == [folder / "a.png"]
    assert [(item.path.name, item.kind) for item in found.passed_over] == [
        ("back", "link that leads nowhere"),
        ("circle.png", "link that leads nowhere"),
        ("pipe.jpg", "not a regular file"),
        ("socket.png", "not a regular file"),
        ("there", "link that leads nowhere"),
        ("pipe.jpg", "not a regular file"),
    ]


def test_files_of_a_folder_that_may_be_listed_but_not_entered_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    for path in (tmp_path / "a.png", closed / "b.png"):
        photo((4, 4)).save(path)
    stat = Path.stat

    def refuse(path: Path, **how: bool) -> os.stat_result:  # the tests may run as root, who may enter everything
        if path.parent == closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refuse)
    found = find_photos([tmp_path])
    assert found.photos == [tmp_path / "a.png"]
    assert [(item.path, item.kind) for item in found.passed_over] == [(closed / "b.png", "file that cannot be read")]


def exif(kind: int, count: int, value: bytes, tag: int = 0x0112) -> bytes:
    """Exif with one entry, by default the orientation, and after it the orientation 6 where the entry is another."""
    entries = [struct.pack("<HHI", tag, kind, count) + value]
    if tag != 0x0112:
        entries.append(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))
    table = struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + table


def test_another_entry_of_a_wrong_type_does_not_keep_a_photo_from_being_turned(tmp_path: Path) -> None:
    # Pillow writes the resolution as a fraction, and cannot make one from this text.
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif(2, 4, b"abc\0", tag=0x011A))
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises((TypeError, ValueError, AttributeError, struct.error)):
        ImageOps.exif_transpose(image)
    assert read_photo(tmp_path / "a.jpg").size == (20, 40)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (100_000_000, 1)])
def test_a_photo_with_a_side_beyond_all_reason_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(UserError, match=rf"{size[0]} x {size[1]} pixels, at most 100000000 and 100000 a side"):
        read_photo(tmp_path / "a.png")


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            read_photo(path)


def test_conversion_in_strips_gives_what_conversion_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.float32) * 3)]
    whole = [to_array(to_rgb(image)) for image in images]
    monkeypatch.setattr(photos, "_STRIP_PIXELS", 70)
    for image, expected in zip(images, whole, strict=True):
        assert (to_array(to_rgb(image)) == expected).all()
