"""NaN and infinity in a cache or a model are named where they are, and no score is made of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import photo, save_feature_run
from torch import nn

from slotscops.config import load_config
from slotscops.core.errors import DamageError, RunError, UserError
from slotscops.core.files import sha256_of_file
from slotscops.core.pretrained import load_tensors
from slotscops.evaluate import __main__ as evaluate
from slotscops.features import __main__ as features
from slotscops.features.cache import open_cache, open_features
from slotscops.features.manifest import read_manifest, write_manifest
from slotscops.features.rows import encode
from slotscops.loader.split import Split
from slotscops.metrics.scoring import evaluate_split
from slotscops.model.saved_names import saved_parameter_names
from slotscops.segment.segmenter import load
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.train.build import build_model, build_optimizer
from slotscops.train.run.checkpoint import optimizer_tensors, restore_optimizer

CACHE, SHARD, ROW = "vgg19-relu5_4-64", "train-000000", 2


def spoiled(toy_shards: Path, folder: Path, value: float, encoding: str) -> Path:
    """A copy of the shards in which one feature of one row is `value`, and all hashes fit."""
    shards = Path(shutil.copytree(toy_shards, folder / "shards"))
    rows = open_features(shards, SHARD)
    maps = rows.read_rows(range(len(rows))).numpy()
    if encoding == "sparse":
        maps[:, 100:] = 0
    maps[ROW, 300, 1, 2] = value
    path = shards / "features" / CACHE / f"{SHARD}.safetensors"
    path.write_bytes(encode(maps, rows.label))
    assert open_features_encoding(path) == encoding
    manifest = read_manifest(path.parent / "manifest.json")
    files, shape = dict(manifest.pop("files")), tuple(manifest.pop("shape"))
    files[SHARD] |= {"bytes": path.stat().st_size, "sha256": sha256_of_file(path), "encoding": encoding}
    write_manifest(path.parent / "manifest.json", manifest, shape, files)
    return shards


def open_features_encoding(path: Path) -> str:
    return "dense" if "features" in load_file(path) else "sparse"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", ["sparse", "dense"])
def test_a_feature_that_is_not_finite_is_named_with_shard_and_row(
    toy_shards: Path, tmp_path: Path, value: float, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = spoiled(toy_shards, tmp_path, value, encoding)
    rows = open_features(shards, SHARD)
    assert rows.rows_not_finite() == [ROW]
    with pytest.raises(DamageError, match=rf"{SHARD}\.safetensors: row {ROW} is damaged \(it holds NaN or infinity\)"):
        rows.read_rows([ROW])
    rows.read_rows([other for other in range(len(rows)) if other != ROW] * 2)
    dataset = open_dataset(shards)
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    key = split.key(ROW)
    with pytest.raises(DamageError, match=rf"{SHARD}\.safetensors: row {ROW} "):
        split.read(np.arange(len(split)))
    batch = replace(split, replace_damaged=True).read(np.arange(len(split)))  # as training reads
    assert list(batch.damaged) == [key]
    assert batch.features is not None
    assert batch.features.isfinite().all()
    for verify in (
        lambda: shard.main(["--verify", str(shards), "--workers", "1"]),
        lambda: features.main(["--shards", str(shards), "--size", "64", "--verify"]),
    ):
        with pytest.raises(RunError):
            verify()
        assert f"{SHARD}.safetensors: row {ROW} ({key}) holds NaN or infinity; remove" in capsys.readouterr().out


def test_no_score_is_made_of_features_that_are_not_finite(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = spoiled(toy_shards, tmp_path, np.nan, "sparse")
    run = save_feature_run(tmp_path / "run")
    for method in (["--checkpoint", str(run)], ["--baseline", "kmeans"]):
        with pytest.raises(DamageError, match=rf"{SHARD}\.safetensors: row {ROW} "):
            evaluate.main([*method, "--shards", str(shards), "--split", "train"])
        assert "NMI" not in capsys.readouterr().out


def test_a_model_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_feature_run(tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["basis_parameter"][1, 2] = torch.inf
    save_file(tensors, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[path.name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for command in (lambda: load(run, "random:0"), lambda: evaluate.main(["--checkpoint", str(run), *on(toy_shards)])):
        with pytest.raises(UserError, match=r"step-1: basis_parameter holds NaN or infinity; use an older checkpoint"):
            command()
    assert "NMI" not in capsys.readouterr().out


def on(shards: Path) -> list[str]:
    return ["--shards", str(shards)]


def test_an_optimizer_that_is_not_finite_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    config = load_config(None, ["encoder.name=features", "data.size=64"])
    network = build_model(config, 512)
    optimizer, names = build_optimizer(config, network), saved_parameter_names(network)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, names)
    restore_optimizer(optimizer, names, tensors, tmp_path)
    tensors["basis_parameter/exp_avg"] = torch.full_like(tensors["basis_parameter/exp_avg"], torch.nan)
    with pytest.raises(UserError, match="basis_parameter/exp_avg holds NaN or infinity"):
        restore_optimizer(optimizer, names, tensors, tmp_path)


def test_part_maps_that_are_not_finite_give_no_score_and_no_labels(toy_shards: Path, tmp_path: Path) -> None:
    model = load(save_feature_run(tmp_path / "run"), "random:0")
    with torch.no_grad():
        for parameter in model.network.part_logits.parameters():
            parameter.mul_(1e30)
    dataset = open_dataset(toy_shards)
    split = Split(dataset, "val", open_cache(dataset, "relu5_4", 64), with_labels=True)
    with pytest.raises(RunError, match=rf"^{split.key(0)}: the network's part maps are not finite, so there are no sc"):
        evaluate_split(model.network, split)
    with pytest.raises(RunError, match="step-1: its part maps are not finite"):
        model.segment(photo((40, 30)))


def test_weights_that_are_not_finite_are_refused_by_the_name_of_their_tensor() -> None:
    with pytest.raises(UserError, match=r"weights w\.pth: weight holds NaN or infinity; get the file again"):
        load_tensors(
            nn.Linear(2, 2), {"weight": torch.tensor([[0, 1], [2, torch.nan]]), "bias": torch.zeros(2)}, "w.pth"
        )
