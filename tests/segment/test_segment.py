import errno
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import python
from PIL import Image
from safetensors.numpy import load_file
from small_runs import photo, save_feature_run, save_resnet_run

import slotscops
from slotscops.core.errors import RunError, UserError
from slotscops.evaluate.__main__ import main as evaluate_main
from slotscops.segment import __main__ as segment
from slotscops.segment.segmenter import FoundParts, Segmenter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet_run(tmp_path_factory.mktemp("runs") / "resnet")


def test_three_lines_of_python_give_parts_at_the_photos_own_size(run: Path, tmp_path: Path) -> None:
    photo((90, 50)).save(tmp_path / "horse.jpg")
    model = slotscops.load(run)
    parts = model.segment(tmp_path / "horse.jpg")
    parts.overlay().save(tmp_path / "parts.png")
    assert parts.maps.shape == (6, 50, 90)
    np.testing.assert_allclose(parts.maps.sum(axis=0), 1, rtol=1e-5)
    assert parts.labels.shape == (50, 90)
    assert (parts.labels == parts.maps.argmax(axis=0)).all()
    with Image.open(tmp_path / "parts.png") as picture:
        assert picture.size == (90, 50)


def test_a_photo_of_the_training_size_is_segmented_as_evaluation_does(run: Path) -> None:
    model = slotscops.load(run)
    image = photo((64, 64))
    crop = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = model.network(crop).maps((64, 64))[0]
    np.testing.assert_allclose(model.segment(image).maps, expected.numpy(), atol=1e-5)


def test_what_is_padded_does_not_show_and_a_wide_photo_keeps_its_place(run: Path) -> None:
    model = slotscops.load(run)
    wide = photo((64, 32))
    square = Image.new("RGB", (64, 64), (124, 116, 104))
    square.paste(wide, (0, 16))
    np.testing.assert_allclose(model.segment(wide).maps, model.segment(square).maps[:, 16:48], atol=1e-5)


def test_the_command_writes_pictures_for_all_and_lists_what_it_could_not_read(run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    for name, mode in (("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("alpha.png", "RGBA"), ("deeper/grey.jpg", "L")):
        photo((40, 30), mode).save(photos / name)
    (photos / "broken.jpg").write_text("no photo")
    out = tmp_path / "out"
    done = python("-m", "slotscops.segment", "--checkpoint", run, "--out", out, "--soft", photos)
    assert done.returncode == 0, done.stderr
    names = {"alpha", "cmyk", "grey", "grey-2"}
    kinds = (".parts.png", ".overlay.jpg", ".maps.safetensors")
    written = {name + kind for name in names for kind in kinds}
    assert {path.name for path in out.iterdir()} == written | {"index.html", "gallery"}
    assert "broken.jpg: is no readable image" in done.stderr
    with Image.open(out / "cmyk.parts.png") as labels:
        assert labels.mode == "P"
        assert (np.asarray(labels) == load_file(out / "cmyk.maps.safetensors")["maps"].argmax(axis=0)).all()


def test_a_batch_gives_what_each_photo_gives_alone(run: Path) -> None:
    model = slotscops.load(run)
    photos = [photo(size) for size in ((64, 64), (90, 50), (3, 200), (1, 1))]
    for image, parts in zip(photos, model.segment_batch(photos), strict=True):
        np.testing.assert_allclose(parts.maps, model.segment(image).maps, atol=1e-5)
        assert parts.photo.shape == (image.height, image.width, 3)


def test_labels_of_a_large_photo_are_found_strip_by_strip(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = slotscops.load(run).segment(photo((83, 131)))
    whole = parts.maps
    monkeypatch.setattr("slotscops.segment.segmenter._STRIP_PIXELS", 1000)
    strips = FoundParts(parts.photo, parts.logits)
    np.testing.assert_allclose(strips.maps, whole, atol=1e-6)
    assert (strips.labels == strips.maps.argmax(axis=0)).all()


def test_photos_that_cannot_be_read_decide_the_exit_code_as_documented(run: Path, tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.jpg", tmp_path / "bad.jpg", str(tmp_path / "out")
    photo((40, 30)).save(good)
    bad.write_text("no photo")
    common = ["--checkpoint", str(run), "--out", out]
    assert segment.main([*common, str(good), str(bad)]) == 0
    assert segment.main([*common, "--strict", str(good)]) == 0
    assert segment.main([*common, "--strict", str(good), str(bad)]) == 1
    with pytest.raises(RunError, match="no photo could be read"):
        segment.main([*common, str(bad)])


def test_results_in_a_folder_of_photos_are_not_taken_for_photos(run: Path, tmp_path: Path) -> None:
    photo((40, 30)).save(tmp_path / "horse.jpg")
    common = ["--checkpoint", str(run), "--out", str(tmp_path), "--strict", str(tmp_path)]
    for _ in range(2):
        assert segment.main([*common, "--features", "--format", "coco,coco-polygons,labelme"]) == 0
    assert {path.name for path in (tmp_path / "gallery" / "photos").iterdir()} == {"horse.jpg"}


@pytest.mark.parametrize("names", ["head,legs", "a,b,c,d,"])
def test_there_is_a_name_for_each_part_or_an_error(run: Path, tmp_path: Path, names: str) -> None:
    photo((40, 30)).save(tmp_path / "horse.jpg")
    with pytest.raises(UserError, match="the model has 5 parts"):
        segment.main(["--checkpoint", str(run), "--out", str(tmp_path), "--part-names", names, str(tmp_path)])


def test_a_photo_turned_by_exif_comes_out_upright(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo((60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert slotscops.load(run).segment(tmp_path / "turned.jpg").photo.shape == (60, 30, 3)


def test_a_model_on_cached_features_runs_its_teacher(tmp_path: Path) -> None:
    run = save_feature_run(tmp_path / "run")
    assert slotscops.load(run).segment(photo((70, 64))).maps.shape == (6, 64, 70)
    with pytest.raises(UserError, match="came random:1"):
        slotscops.load(run, teacher_weights="random:1")


@pytest.mark.parametrize("mistake", ["nowhere.jpg", "empty"])
def test_photos_that_are_not_there_are_one_line(run: Path, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=mistake):
        segment.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), str(tmp_path / mistake)])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_one_flipped_byte_is_refused_with_code_2(run: Path, toy_shards: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    path = damaged / "checkpoints" / "step-1" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = python("-m", "slotscops.evaluate", "--checkpoint", damaged, "--shards", toy_shards)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "model.safetensors: is damaged" in done.stderr


def test_the_checkpoint_alone_beside_its_settings_is_enough(run: Path, toy_shards: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints" / "step-1", alone)
    shutil.copy(run / "config.yaml", alone)
    assert evaluate_main(["--checkpoint", str(alone), "--shards", str(toy_shards)]) == 0


def test_whatever_one_photo_does_it_is_listed_and_the_others_go_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    photo((40, 30)).save(folder / "good.jpg")
    # StripOffsets (273) as RATIONAL is a TypeError in Pillow, a DDS of an unknown format a NotImplementedError.
    entries = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 5, 1, 8),
               (277, 3, 1, 1), (278, 3, 1, 4), (279, 4, 1, 16)]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    (folder / "rational.tif").write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(20))
    header = struct.pack(
        "<7I44x2I4s5I4I4x", 124, 0x1007, 4, 4, 16, 0, 0, 32, 4, b"ABCD", 0, 0, 0, 0, 0, 0x1000, 0, 0, 0
    )
    (folder / "unknown.png").write_bytes(b"DDS " + header + bytes(64))
    photo((40, 30)).save(folder / "large.jpg")
    write_one = segment._write

    def refuse_large(out: Path, name: str, *rest: Any) -> Any:
        if name == "large":
            raise OSError("encoder error -2 when writing image file")  # what Pillow says of more than 65,500 pixels
        return write_one(out, name, *rest)

    monkeypatch.setattr(segment, "_write", refuse_large)
    common = ["--checkpoint", str(run), "--out", str(out), str(folder)]
    assert segment.main(common) == 0
    assert segment.main(["--strict", *common]) == 1
    told = capsys.readouterr().err
    page = (out / "gallery" / "index.js").read_text()
    assert (out / "good.parts.png").is_file()
    for name in ("rational.tif", "unknown.png", "large.jpg"):
        assert f"{name}: " in told
        assert f"{name}: " in page
    assert "encoder error -2" in page


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_photo_without_memory_for_it_is_listed_and_the_rest_of_its_batch_goes_on(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    for name, width in (("a", 40), ("b", 41), ("c", 42)):
        photo((width, 30)).save(tmp_path / f"{name}.png")
    crop = Segmenter.crop

    def refuse_one(self: Segmenter, image: Image.Image) -> Any:
        if image.width == 41:
            raise error
        return crop(self, image)

    monkeypatch.setattr(Segmenter, "crop", refuse_one)
    assert segment.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), str(tmp_path)]) == 0
    assert "b.png: there is no memory for it" in capsys.readouterr().err
    assert [(tmp_path / "out" / f"{name}.parts.png").is_file() for name in "abc"] == [True, False, True]


# A process that may take 1.2 GB more than it has once everything is imported, however much the machine has.
LIMITED = """
import resource, sys
from pathlib import Path
from slotscops.core import console
from slotscops.segment import __main__ as segment
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 1_200_000_000, resource.RLIM_INFINITY))
console.run_command(lambda: segment.main(sys.argv[1:]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA reserves address space beyond any limit")
def test_a_huge_photo_takes_little_more_memory_than_its_pixels(run: Path, tmp_path: Path) -> None:
    Image.new("1", (6000, 5000)).save(tmp_path / "a.png")  # 30 million pixels in a few kilobytes
    (tmp_path / "limited.py").write_text(LIMITED)
    done = python(tmp_path / "limited.py", "--checkpoint", run, "--out", tmp_path / "out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr


def test_a_full_disk_ends_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    photo((40, 30)).save(tmp_path / "horse.jpg")
    monkeypatch.setattr(segment, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        segment.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), str(tmp_path / "horse.jpg")])


@pytest.mark.parametrize("name", ["a" * 240, "é" * 124])
def test_a_name_as_long_as_a_file_system_takes_is_segmented(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "photos").mkdir()
    photo((40, 30)).save(tmp_path / "photos" / f"{name}.jpg")
    out = tmp_path / "out"
    assert segment.main(["--checkpoint", str(run), "--out", str(out), "--soft", str(tmp_path / "photos")]) == 0
    (written,) = out.glob("*.maps.safetensors")
    assert name.startswith(written.name.removesuffix(".maps.safetensors"))


def test_what_a_folder_holds_beside_photos_is_counted_by_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    (folder / "__MACOSX").mkdir(parents=True)
    photo((40, 30)).save(folder / "horse.jpg")
    for name in ("._horse.jpg", "Thumbs.db", "__MACOSX/horse.jpg"):
        (folder / name).write_bytes(b"x")
    common = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--strict", str(folder)]
    assert segment.main(common) == 0
    assert "3 x litter of an operating system" in capsys.readouterr().out.replace("\n", " ")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    assert segment.main(common) == 1
    told = capsys.readouterr().err
    assert "1 x link that leads nowhere" in told
    assert "1 x link to a folder seen already" in told
    assert "gone.jpg" in (tmp_path / "out" / "gallery" / "index.js").read_text()
