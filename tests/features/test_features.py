import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TWO_PROCESSES, python, started, train
from PIL import Image

import slotscops
from slotscops.core.errors import RunError, UserError
from slotscops.core.files import sha256_of_json
from slotscops.evaluate import __main__ as evaluate
from slotscops.features import __main__ as features
from slotscops.features.cache import open_cache, open_features
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.shard.reader import ShardReader

TEACHER = ["--teacher-weights", "random:0"]


@pytest.fixture
def own_shards(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(toy_shards, tmp_path / "shards"))


def folder_of(shards: Path) -> Path:
    return shards / "features" / "vgg19-relu5_4-64"


def opened(shards: Path) -> features.FeatureCache:
    return open_cache(open_dataset(shards), "relu5_4", 64)


def test_every_row_is_the_teachers_answer_to_that_very_crop(toy_shards: Path) -> None:
    dataset: ShardDataset = open_dataset(toy_shards)
    teacher = Teacher("relu5_4", "random:0")
    for entries in dataset.splits.values():
        for entry in entries:
            crops = ShardReader(dataset, entry).read_images(range(entry.num_samples))
            expected = teacher(crops).half()
            cached = open_features(toy_shards, entry.name)
            assert len(cached) == entry.num_samples
            for row in range(entry.num_samples):
                assert cached[row].dtype == torch.float16
                torch.testing.assert_close(cached[row], expected[row], rtol=2e-3, atol=2e-3)


def test_a_second_cache_of_another_layer_and_size_stands_beside_the_first(own_shards: Path) -> None:
    before = (folder_of(own_shards) / "manifest.json").read_bytes()
    more = ["--layer", "relu5_2+relu5_4", "--size", "96"]
    assert features.main(["--shards", str(own_shards), *TEACHER, *more]) == 0
    assert (folder_of(own_shards) / "manifest.json").read_bytes() == before
    assert open_features(own_shards, "train-000000", "vgg19-relu5_2+relu5_4-96")[0].shape == (1024, 6, 6)
    with pytest.raises(UserError, match="name the one you want"):
        open_features(own_shards, "train-000000")


def test_building_again_finishes_what_is_missing_with_the_same_bytes(own_shards: Path) -> None:
    expected = {path.name: path.read_bytes() for path in folder_of(own_shards).iterdir()}
    for name in ("manifest.json", "train-000001.safetensors"):
        (folder_of(own_shards) / name).unlink()
    with pytest.raises(UserError, match="no finished feature cache"):
        opened(own_shards)
    assert features.main(["--shards", str(own_shards), *TEACHER]) == 0
    assert {path.name: path.read_bytes() for path in folder_of(own_shards).iterdir()} == expected


def test_killed_on_two_processes_and_started_again_on_one_the_cache_has_the_same_bytes(
    own_shards: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(own_shards, tmp_path / "whole"))
    work = ["--teacher", "vgg11", "--layer", "relu5_2", "--size", "128", "--teacher-weights", "random:0"]
    folder, expected = (shards / "features" / "vgg11-relu5_2-128" for shards in (own_shards, whole))
    with started([*TWO_PROCESSES, "-m", "slotscops.features", "--shards", str(own_shards), *work]) as running:
        deadline = time.monotonic() + 120
        while not list(folder.glob("*.safetensors")) and running.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    # Leaving that block kills all of them with SIGKILL.
    assert list(folder.glob("*.safetensors")), "nothing was written before the kill"
    assert not (folder / "manifest.json").exists(), "everything was written before the kill"
    for shards in (own_shards, whole):
        assert features.main(["--shards", str(shards), *work]) == 0
    names = {path.name for path in expected.iterdir()}
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == names


def test_caches_of_other_teachers_stand_beside_each_other_and_say_which_they_are(own_shards: Path) -> None:
    shards_before = {path: path.read_bytes() for path in own_shards.rglob("*.tar")}
    for network, layer, shape in (("resnet18", "layer3", (256, 4, 4)), ("vgg11", "relu3_2", (256, 16, 16))):
        arguments = ["--shards", str(own_shards), "--teacher", network, "--layer", layer]
        assert features.main([*arguments, *TEACHER]) == 0
        assert features.main([*arguments, "--verify"]) == 0
        cache = open_cache(open_dataset(own_shards), layer, 64, network=network)
        assert (cache.folder.name, cache.manifest["network"]) == (f"{network}-{layer}-64", network)
        assert open_features(own_shards, "train-000000", cache.folder.name)[0].shape == shape
    assert {path: path.read_bytes() for path in own_shards.rglob("*.tar")} == shards_before
    command = "python -m slotscops.features .* --teacher resnet18 --layer layer2 --size 64"
    with pytest.raises(UserError, match=command):
        open_cache(open_dataset(own_shards), "layer2", 64, network="resnet18")


def test_features_with_negative_numbers_are_kept_dense_and_noted(
    own_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shards", str(own_shards), "--teacher", "resnet18", "--layer", "layer1.0.bn2"]
    assert features.main([*arguments, *TEACHER]) == 0
    assert "hold negative numbers" in " ".join(capsys.readouterr().out.split())
    assert open_features(own_shards, "train-000000", "resnet18-layer1.0.bn2-64").encoding == "dense"


def test_a_run_on_another_teacher_is_trained_scored_and_segments_with_that_teacher(
    own_shards: Path, tmp_path: Path
) -> None:
    teacher = ["--teacher", "resnet18", "--layer", "layer3"]
    assert features.main(["--shards", str(own_shards), *teacher, *TEACHER]) == 0
    settings = ["teacher.network=resnet18", "teacher.layer=layer3", "teacher.weights=random:0", "train.total_steps=2"]
    done = train([sys.executable], own_shards, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--shards", str(own_shards)]) == 0
    parts = slotscops.load(tmp_path / "run").segment(Image.new("RGB", (80, 60)))
    assert parts.labels.shape == (60, 80)


def test_a_cache_of_other_weights_is_never_continued(own_shards: Path) -> None:
    with pytest.raises(UserError, match="weights"):
        build_cache(open_dataset(own_shards), Teacher("relu5_4", "random:1"), 64)


def edit_manifest(shards: Path, **changes: object) -> None:
    path = folder_of(shards) / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    del manifest["digest"]
    path.write_text(json.dumps(manifest | {"digest": sha256_of_json(manifest)}))


@pytest.mark.parametrize("field", ["layer", "input_size", "shard_digest"])
def test_a_field_that_differs_is_named_with_the_command_that_rebuilds(own_shards: Path, field: str) -> None:
    edit_manifest(own_shards, **{field: "other"})
    with pytest.raises(UserError, match=f"{field} is other.*python -m slotscops.features"):
        opened(own_shards)


def test_other_weights_than_the_settings_want_are_refused(toy_shards: Path) -> None:
    dataset = open_dataset(toy_shards)
    right = Teacher("relu5_4", "random:0").fingerprint
    assert open_cache(dataset, "relu5_4", 64, right).is_random
    with pytest.raises(UserError, match="weights_sha256"):
        open_cache(dataset, "relu5_4", 64, Teacher("relu5_4", "random:1").fingerprint)


def test_missing_cut_and_swapped_files_are_found_at_opening(own_shards: Path) -> None:
    path = folder_of(own_shards) / "train-000001.safetensors"
    content = path.read_bytes()
    for damaged in (None, content[:-1]):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-000001.*python -m slotscops.features"):
            opened(own_shards)


def test_a_flipped_bit_is_found_by_verifying(own_shards: Path) -> None:
    assert features.main(["--shards", str(own_shards), "--verify"]) == 0
    path = folder_of(own_shards) / "train-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="train-000001"):
        features.main(["--shards", str(own_shards), "--verify"])


def test_training_at_another_size_than_the_cache_is_one_line_with_the_command(toy_shards: Path, tmp_path: Path) -> None:
    settings = [f"data.shards={toy_shards}", "data.size=64", "teacher.size=96", f"run_dir={tmp_path / 'run'}"]
    done = python("launch/train.py", "encoder.name=features", *settings)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "vgg19-relu5_4-96" in done.stderr
    assert f"python -m slotscops.features --shards {toy_shards} --layer relu5_4 --size 96" in done.stderr
    assert not (tmp_path / "run").exists()


def test_real_features_are_sparse_and_take_a_tenth_of_the_space(real_data: Path, tmp_path: Path) -> None:
    from slotscops.shard import __main__ as shard

    weights = str(real_data / "weights" / "vgg19_features.safetensors")
    arguments = ["--root", str(real_data / "pascal_part"), "--out", str(tmp_path), "--teacher-weights", weights]
    assert shard.main(arguments) == 0
    entry = open_dataset(tmp_path).splits["train"][0]
    cached = open_features(tmp_path, entry.name)
    assert cached.encoding == "sparse"
    assert cached.shape == (512, 8, 8)
    zeros = np.mean([float((cached[row] == 0).float().mean()) for row in range(len(cached))])
    assert 0.9 < zeros < 0.98
    manifest = json.loads((tmp_path / "features" / "vgg19-relu5_4-128" / "manifest.json").read_text())
    assert manifest["weights"] == "vgg19_features.safetensors"
