"""Training on damaged shards: damaged samples are replaced, counted and reported, and too many end the run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import metrics, train
from damages import CACHE, OTHER, ROW, flip, index_of, offset, tar, tensor_offset, values_name
from forks import ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from slotscops.core.errors import DamageError, RunError
from slotscops.evaluate.__main__ import main as evaluate
from slotscops.features.cache import open_cache
from slotscops.loader.batches import evaluation_batches, training_batches
from slotscops.loader.plan import TrainingPlan, substitutes
from slotscops.loader.split import Split
from slotscops.shard.index import ShardIndex, open_dataset

ALLOWED = "data.max_damaged_share=0.5"


@pytest.fixture(scope="module")
def damaged_shards(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of one shard and a row of features of another are damaged. Not to be changed."""
    shards = Path(shutil.copytree(toy_shards, tmp_path_factory.mktemp("damaged") / "shards"))
    flip(tar(shards), offset(shards) + 20)
    features = shards / "features" / CACHE / f"{OTHER}.safetensors"
    flip(features, tensor_offset(features, values_name(shards)) + 9)
    return shards


def damaged_keys(shards: Path) -> set[str]:
    return {index_of(shards).key(ROW), ShardIndex.read(shards / "index" / f"{OTHER}.safetensors").key(0)}


def open_split(shards: Path, replace_damaged: bool = True, with_labels: bool = False) -> Split:
    dataset = open_dataset(shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels, replace_damaged)


@given(sample=st.integers(0, 10**7), num_samples=st.integers(1, 10**7))
def test_substitutes_are_other_samples_of_the_split_and_always_the_same(sample: int, num_samples: int) -> None:
    drawn = substitutes(sample % num_samples, num_samples)
    assert drawn == substitutes(sample % num_samples, num_samples)
    assert all(0 <= other < num_samples and other != sample % num_samples for other in drawn)


def test_a_damaged_sample_is_replaced_the_same_way_whoever_reads_it_and_however(
    toy_shards: Path, damaged_shards: Path
) -> None:
    whole, wanted = open_split(toy_shards), damaged_keys(damaged_shards)
    keys = [whole.key(sample) for sample in range(len(whole))]
    one_by_one = [open_split(damaged_shards).read(np.array([sample])) for sample in range(len(whole))]
    for order in (np.arange(len(whole)), np.random.default_rng(0).permutation(len(whole))):
        split = open_split(damaged_shards)
        for _ in range(2):  # what is damaged is not known, then known
            batch = split.read(order)
            assert set(batch.damaged) == wanted
            for place, sample in enumerate(order.tolist()):
                mine = one_by_one[sample]
                assert batch.keys[place] == mine.keys[0]
                assert (batch.keys[place] == keys[sample]) == (keys[sample] not in wanted)
                assert batch.keys[place] not in wanted
                assert torch.equal(batch.images[place], mine.images[0])
                assert batch.features is not None
                assert mine.features is not None
                assert torch.equal(batch.features[place], mine.features[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_stream_gets_shorter_and_every_rank_hears_of_its_damage(damaged_shards: Path, num_workers: int) -> None:
    split, found = open_split(damaged_shards), {}
    for rank in range(2):
        plan = TrainingPlan(len(split), 7, 8, rank, 2, 1, 0, 8 * 5)
        batches = list(training_batches(split, plan, num_workers, pin_memory=False))
        assert [len(batch) for batch in batches] == [4] * 5
        for batch in batches:
            found |= batch.damaged
    assert set(found) == damaged_keys(damaged_shards)
    assert all("is damaged" in reason for reason in found.values())


def test_where_hardly_anything_is_whole_reading_ends_instead_of_searching_on(toy_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    for path in shards.glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(RunError, match="--verify"):
        open_split(shards).read(np.arange(4))


def test_evaluation_never_replaces_but_ends_with_the_damaged_members_name(
    toy_shards: Path, damaged_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DamageError, match="is damaged"):
        list(evaluation_batches(open_split(damaged_shards, replace_damaged=False), 4))
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    split = Split(open_dataset(shards), "val", None, with_labels=True)
    flip(shards / "val-000000.tar", int(split._index(0).offsets[1, 1]) + 9)
    with pytest.raises(DamageError, match=rf"{split.key(1)}\.parts\.png is damaged"):
        evaluate(["--baseline", "position", "--shards", str(shards)])


@pytest.fixture(scope="module")
def damaged_run(damaged_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption."""
    folder = tmp_path_factory.mktemp("run")
    done = train([sys.executable], damaged_shards, folder, ALLOWED)
    assert done.returncode == 0, done.stderr
    for key in damaged_keys(damaged_shards):
        assert done.stderr.count(f"sample {key} is damaged, another takes its place") == 1
    return folder


def test_a_run_counts_reports_and_lists_what_is_damaged_and_keeps_its_order(
    damaged_shards: Path, damaged_run: Path
) -> None:
    rows = metrics(damaged_run)
    counts = [row["damaged_samples"] for row in rows]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    listed = json.loads((damaged_run / "damaged.json").read_text())
    assert set(listed) == damaged_keys(damaged_shards)
    assert [sum(row["step"] <= step for row in listed.values()) for step in range(1, 7)] == counts


def test_resuming_over_damage_is_exact_and_reports_nothing_twice(
    damaged_shards: Path, damaged_run: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        done = train(
            [sys.executable], damaged_shards, tmp_path, ALLOWED, "train.stop_after_steps=3", "data.num_workers=1"
        )
        assert done.returncode == 0, done.stderr
    for name in ("model", "optimizer"):
        path = Path("checkpoints") / "step-6" / f"{name}.safetensors"
        mine, other = load_file(tmp_path / path), load_file(damaged_run / path)
        assert all(torch.equal(tensor, other[key]) for key, tensor in mine.items())
    for mine_row, other_row in zip(metrics(tmp_path), metrics(damaged_run), strict=True):
        for name in ("loss", "batch_digest", "damaged_samples"):
            assert mine_row[name] == other_row[name]


def test_two_processes_count_together_and_train_on_the_same_samples(
    damaged_shards: Path, damaged_run: Path, tmp_path: Path
) -> None:
    done = train(ranks(2), damaged_shards, tmp_path, ALLOWED)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(metrics(tmp_path), metrics(damaged_run), strict=True):
        assert mine["batch_digest"] == other["batch_digest"]
        assert mine["damaged_samples"] == other["damaged_samples"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert done.stderr.count("another takes its place") == 2


def test_above_the_budget_all_processes_stop_with_the_list(damaged_shards: Path, tmp_path: Path) -> None:
    done = train(ranks(2), damaged_shards, tmp_path, "data.num_workers=1")  # 0.1 % of a small split: none at all
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "data.max_damaged_share=0.001 allows" in line]
    assert [line.split(":")[1] for line in sorted(lines)] == [" rank 0", " rank 1"]
    assert "is damaged (crc" in lines[0]
    assert not list((tmp_path / "checkpoints").iterdir())
