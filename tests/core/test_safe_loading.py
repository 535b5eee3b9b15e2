"""A checkpoint or shards from a stranger cannot run code: nothing on the way to them unpickles."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # torch imports it at need, and its classes derive from pickle's, which these tests replace
from small_runs import save_feature_run, save_resnet_run

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.shard.index import open_dataset
from slotscops.train.build import load_model


@pytest.fixture
def unpickling_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("something was unpickled")

    for module in (pickle, pickle._Unpickler):  # type: ignore[attr-defined]
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)


@pytest.mark.usefixtures("unpickling_is_blocked")
def test_a_run_is_loaded_without_unpickling(tmp_path: Path) -> None:
    for save in (save_feature_run, save_resnet_run):
        trained = load_model(save(tmp_path / save.__name__))
        assert trained.network.num_slots == 6


@pytest.mark.usefixtures("unpickling_is_blocked")
def test_shards_and_features_are_read_without_unpickling(toy_shards: Path) -> None:
    dataset = open_dataset(toy_shards)
    split = Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=True)
    assert len(split.read(np.arange(len(split)))) == len(split)


def test_the_block_blocks(unpickling_is_blocked: None) -> None:
    with pytest.raises(AssertionError, match="was unpickled"):
        torch.load(io.BytesIO())
    with pytest.raises(AssertionError, match="was unpickled"):
        pickle.loads(b"")


def test_a_config_that_asks_yaml_to_call_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(tmp_path / "evil.yaml")
    assert not (tmp_path / "made").exists()
