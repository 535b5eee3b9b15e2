import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import python
from PIL import Image
from safetensors.numpy import load_file

import slotscops
from slotscops import checkpoint, segment
from slotscops.build import build_model
from slotscops.config import Config, load_config, to_mapping, write_config
from slotscops.errors import UserError
from slotscops.evaluate import main as evaluate_main
from slotscops.teacher import Teacher


def save_run(folder: Path, config: Config) -> Path:
    """A run's folder with one checkpoint of the untrained network."""
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    fingerprint = Teacher("relu5_4", "random:0").fingerprint
    state = checkpoint.State(1, 8, to_mapping(config), "", "", "random:0", fingerprint)
    checkpoint.save_checkpoint(
        folder / "checkpoints",
        {"model": build_model(config, 512).state_dict(), "optimizer": {}, "rng": {}},
        state,
        keep=1,
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(None, ["encoder.name=resnet18", "encoder.weights=random:0", "data.size=64"])
    return save_run(tmp_path_factory.mktemp("runs") / "resnet", config)


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


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
    import torch

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
    kinds = (".parts.png", ".overlay.png", ".maps.safetensors")
    assert {path.name for path in out.iterdir()} == {name + kind for name in names for kind in kinds}
    assert "broken.jpg: is no readable image" in done.stderr
    with Image.open(out / "cmyk.parts.png") as labels:
        assert labels.mode == "P"
        assert (np.asarray(labels) == load_file(out / "cmyk.maps.safetensors")["maps"].argmax(axis=0)).all()


def test_a_photo_turned_by_exif_comes_out_upright(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo((60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert slotscops.load(run).segment(tmp_path / "turned.jpg").photo.shape == (60, 30, 3)


def test_a_model_on_cached_features_runs_its_teacher(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", load_config(None, ["encoder.name=features", "data.size=64"]))
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
