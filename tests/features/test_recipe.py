"""`--config`: the commands that compute features take sizes and teacher from the settings of the training."""

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from slotscops.config import Config
from slotscops.core.errors import UserError
from slotscops.features import __main__ as features
from slotscops.features.cache import FeatureCache
from slotscops.shard import __main__ as shard
from slotscops.train import __main__ as training
from slotscops.train.processes import open_training_data

TOY = ["--toy", "--toy-train", "6", "--toy-val", "3", "--teacher-weights", "random:0"]
SETTINGS = {
    "data": {"size": 48, "mirror": True, "shards": "elsewhere"},
    "teacher": {"network": "vgg11", "layer": "relu3_2", "size": 64, "components": 6, "store": "int8"},
    "basis": {"kind": "free"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture
def shards(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to add to, with crops of 64 px."""
    return Path(shutil.copytree(toy_shards, tmp_path / "shards"))


def read_as_told(printed: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, FeatureCache]:
    """What the printed training command would train on."""
    (line,) = [line for line in printed.splitlines() if line.startswith("train with: ")]
    words = shlex.split(line.removeprefix("train with: "))
    assert words[:4] == ["accelerate", "launch", "-m", "slotscops.train"]
    trained: list[Config] = []
    monkeypatch.setattr("slotscops.train.fit.fit", lambda config, *_: trained.append(config))
    training.main(words[4:])
    return trained[0], open_training_data(trained[0])[1]


def test_shards_and_features_are_those_that_the_printed_training_reads(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my shards"
    assert shard.main([*TOY, "--out", str(out), "--config", str(recipe), "data.mirror=false"]) == 0
    config, cache = read_as_told(capsys.readouterr().out, monkeypatch)
    assert (config.data.size, config.data.mirror, str(config.data.shards)) == (48, False, str(out))
    assert cache.folder == out / "features" / "vgg11-relu3_2-64-pca6-int8"
    assert cache.mirrored is None


def test_features_follow_the_recipe_and_an_option_wins(
    recipe: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--shards", str(shards), "--teacher-weights", "random:0", "--config", str(recipe)]
    assert features.main([*command, "--layer", "relu2_1", "--size", "32", "teacher.store=float16"]) == 0
    config, cache = read_as_told(capsys.readouterr().out, monkeypatch)
    assert (config.data.size, config.teacher.size, config.teacher.store) == (64, 32, "float16")
    assert cache.folder == shards / "features" / "vgg11-relu2_1-32-pca6"
    assert cache.mirrored is not None


def test_without_a_recipe_no_training_is_suggested(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert features.main(["--shards", str(shards), "--teacher-weights", "random:0"]) == 0
    printed = capsys.readouterr().out
    assert "vgg19-relu5_4-64" in printed
    assert "train with: accelerate" not in printed


@pytest.mark.parametrize("command", [features.main, shard.main])
def test_settings_need_a_recipe(command: object, tmp_path: Path) -> None:
    assert callable(command)
    place = ["--shards", str(tmp_path)] if command is features.main else ["--toy", "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"teacher\.size=64: settings NAME=VALUE go with --config FILE or RECIPE"):
        command([*place, "teacher.size=64"])
    with pytest.raises(UserError, match=r"did you mean 'teacher\.size'"):
        command([*place, "--config", "toy", "teacher.siz=64"])
    assert not list(tmp_path.iterdir())
