import pickle
import shutil
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from commands import python
from safetensors.numpy import load_file, save

from slotscops.core.errors import DamageError, RunError, SilentLoaderError
from slotscops.core.records import Batch, decode_image
from slotscops.features.cache import open_cache
from slotscops.features.rows import FeatureShard, encode
from slotscops.loader.batches import _next_batch, evaluation_batches, training_batches
from slotscops.loader.plan import TrainingPlan, samples_at
from slotscops.loader.split import Split
from slotscops.shard import reader
from slotscops.shard.index import open_dataset
from slotscops.shard.reader import ShardReader


def open_split(shards: Path, name: str = "train", labels: bool = True) -> Split:
    dataset = open_dataset(shards)
    return Split(dataset, name, open_cache(dataset, "relu5_4", 64), with_labels=labels)


def plan_of(split: Split, rank: int = 0, ranks: int = 1, accumulation: int = 1, steps: int = 5) -> TrainingPlan:
    return TrainingPlan(len(split), 7, 8, rank, ranks, accumulation, 16, 16 + steps * 8)


def assert_same(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys
    for name in ("images", "features", "part_labels", "part_labels_small", "object_masks", "class_ids"):
        mine, other = getattr(first, name), getattr(second, name)
        assert (mine is None and other is None) or torch.equal(mine, other), name


def test_a_batch_holds_exactly_what_the_tar_and_the_cache_hold(toy_shards: Path) -> None:
    split = open_split(toy_shards)
    order = np.random.default_rng(0).permutation(len(split))
    batch = split.read(order)
    assert batch.part_labels is not None
    assert batch.part_labels_small is not None
    assert batch.object_masks is not None
    assert batch.features is not None
    rows = [(entry, row) for entry in split.dataset.splits["train"] for row in range(entry.num_samples)]
    for place, sample in enumerate(order):
        entry, row = rows[sample]
        reader = split._readers[split.dataset.splits["train"].index(entry)]
        assert batch.keys[place] == split.key(int(sample)) == reader.index.key(row)
        description = reader.read_description(row)
        assert split.dataset.class_names[int(batch.class_ids[place])] == description["class"]
        pixels = decode_image(reader.read_member(row, "jpg"))
        assert (batch.images[place].permute(1, 2, 0).numpy() == pixels).all()
        assert (batch.part_labels[place].numpy() == reader.read_part_labels(row)).all()
        assert (batch.part_labels_small[place].numpy() == reader.read_part_labels(row, smallest_on_top=True)).all()
        assert (batch.object_masks[place].numpy() == reader.read_object_mask(row)).all()
        assert split.cache is not None
        assert torch.equal(batch.features[place], split.cache.open_shard(entry)[row])


def test_a_sparse_batch_becomes_the_dense_one_where_it_arrives(toy_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_shards, shards)
    order = np.arange(len(open_split(shards)))[::-1]
    as_they_are = replace(open_split(shards), sparse_features=True).read(order)
    assert as_they_are.features is not None  # the features of a random teacher are stored dense

    split = open_split(shards)
    assert split.cache is not None
    for path in split.cache.folder.glob("*.safetensors"):
        whole = FeatureShard(path)
        features = whole.read_rows(range(len(whole))).numpy()
        path.write_bytes(encode(np.where(features > 1.5, features, np.float16(0)), whole.label))
    batch, dense = replace(split, sparse_features=True).read(order), split.read(order)
    assert dense.features is not None
    assert dense.features.any()
    assert batch.features is None
    assert batch.feature_values is not None
    assert batch.feature_values.nbytes < dense.features.nbytes / 2
    assert_same(batch.to(torch.device("cpu")), dense)


def sparser(toy_shards: Path, folder: Path, share: float) -> Split:
    """A copy of the shards in whose features a share of the values is not 0, read sparse where that is smaller."""
    split = open_split(Path(shutil.copytree(toy_shards, folder / "shards")), labels=False)
    assert split.cache is not None
    for path in split.cache.folder.glob("*.safetensors"):
        whole = FeatureShard(path)
        features = whole.read_rows(range(len(whole))).numpy()
        kept = np.where(features > np.quantile(features, 1 - share), features, np.float16(0))
        path.write_bytes(encode(kept, whole.label))
        assert FeatureShard(path).encoding == "sparse"  # 4 bytes a value on disk, 6 in a batch
    return replace(split, sparse_features=True)


def test_a_batch_that_would_be_larger_sparse_than_dense_is_read_once_and_dense(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = sparser(toy_shards, tmp_path, 0.4)
    monkeypatch.setattr(FeatureShard, "read_sparse_row", None)
    batch = split.read(np.arange(4))
    assert batch.feature_values is None
    assert_same(batch, replace(split, sparse_features=False).read(np.arange(4)))


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_damaged_row_is_found_whether_its_batch_is_sparse_or_dense(
    toy_shards: Path, tmp_path: Path, share: float
) -> None:
    split = sparser(toy_shards, tmp_path, share)
    assert split.cache is not None
    path = split.cache.folder / "train-000000.safetensors"
    arrays, label = load_file(path), FeatureShard(path).label
    arrays["values"][arrays["ends"][0]] += 1  # the first value of row 1
    path.write_bytes(save(arrays, {"label": label}))
    with pytest.raises(DamageError, match=r"train-000000\.safetensors: row 1 is damaged \(crc32 differs\)"):
        split.read(np.arange(4))
    batch = replace(split, replace_damaged=True).read(np.arange(4))
    assert list(batch.damaged) == [split.key(1)]
    assert (batch.features is None) == (share < 1 / 3)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_training_batches_follow_the_plan_with_any_number_of_workers(toy_shards: Path, num_workers: int) -> None:
    split = open_split(toy_shards, labels=False)
    batches = list(training_batches(split, plan_of(split), num_workers, pin_memory=False))
    samples = samples_at(np.arange(16, 56), len(split), seed=7).reshape(5, 8)
    assert [batch.keys for batch in batches] == [[split.key(int(s)) for s in row] for row in samples]
    for batch, row in zip(batches, samples, strict=True):
        assert_same(batch, split.read(row))
        assert batch.part_labels is None


def test_a_thread_that_pins_batches_and_has_died_is_not_waited_for() -> None:
    class Iterator:
        """What the DataLoader's iterator does on a GPU if that thread died of an error of its own."""

        def __init__(self, receiver: Thread) -> None:
            self._pin_memory_thread = receiver

        def __next__(self) -> Batch:
            raise RuntimeError("DataLoader timed out after 5 seconds")

    with pytest.raises(SilentLoaderError, match=r"receives the batches .* has ended, .* open files"):
        _next_batch(Iterator(Thread()), timeout_s=0)  # type: ignore[arg-type]


def test_the_microbatches_of_all_ranks_make_up_the_global_batch(toy_shards: Path) -> None:
    split = open_split(toy_shards, labels=False)
    per_rank = [
        list(training_batches(split, plan_of(split, rank, 2, accumulation=2, steps=1), 0, pin_memory=False))
        for rank in range(2)
    ]
    keys = [key for batches in per_rank for batch in batches for key in batch.keys]
    whole = next(iter(training_batches(split, plan_of(split), 0, pin_memory=False)))
    assert keys == whole.keys
    assert keys == [split.key(sample) for sample in plan_of(split).global_batch(16).tolist()]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 50])
@pytest.mark.parametrize("limit", [None, 3])
def test_evaluation_sees_every_sample_once_over_all_processes(
    toy_shards: Path, num_ranks: int, limit: int | None
) -> None:
    split = open_split(toy_shards, "val")
    keys = [
        key
        for rank in range(num_ranks)
        for batch in evaluation_batches(split, 2, rank, num_ranks, limit)
        for key in batch.keys
    ]
    assert keys == [split.key(sample) for sample in range(len(split))][:limit]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_payload_is_found_by_its_crc_and_named(toy_shards: Path, tmp_path: Path, num_workers: int) -> None:
    import shutil

    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    dataset = open_dataset(shards)
    entry = dataset.splits["train"][0]
    index = dataset.read_index(entry)
    content = bytearray(dataset.tar_path(entry).read_bytes())
    content[int(index.offsets[2, 0]) + 20] ^= 1
    dataset.tar_path(entry).write_bytes(content)
    split = open_split(shards)
    with pytest.raises(RunError, match=rf"{index.key(2)}\.jpg is damaged"):
        list(training_batches(split, plan_of(split), num_workers, pin_memory=False))


@pytest.mark.parametrize(
    ("flags", "members"),
    [
        ({"with_labels": False}, {"jpg"}),
        ({"with_labels": False, "with_object_masks": True}, {"jpg", "object.png"}),
        ({"with_labels": True}, {"jpg", "object.png", "parts.png", "parts_small.png"}),
    ],
)
def test_a_split_reads_the_members_it_is_told_to_and_no_other(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], members: set[str]
) -> None:
    read = Counter[str]()
    plain = ShardReader.read_member

    def count(self: ShardReader, row: int, member: str) -> bytes:
        read[member] += 1
        return plain(self, row, member)

    monkeypatch.setattr(ShardReader, "read_member", count)
    split = Split(open_dataset(toy_shards), "train", None, **flags)
    batch = split.read(np.array([0, 3, len(split) + 1]))  # the last one mirrored
    assert read == dict.fromkeys(members, 3)
    assert (batch.object_masks is not None) == ("object.png" in members)
    whole = Split(split.dataset, "train", None, with_labels=True).read(np.array([0, 3, len(split) + 1]))
    for name in ("part_labels", "part_labels_small", "object_masks"):
        assert getattr(batch, name) is None or torch.equal(getattr(batch, name), getattr(whole, name))


def test_what_a_process_keeps_open_is_bounded_and_the_batches_are_the_same(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = np.random.default_rng(0).permutation(len(open_split(toy_shards)))
    expected = open_split(toy_shards).read(order)
    monkeypatch.setattr("slotscops.loader.split._MAX_INDEX_BYTES", 1)
    monkeypatch.setattr("slotscops.loader.split._MAX_FEATURE_SHARDS", 2)
    monkeypatch.setattr("slotscops.shard.reader._MAX_OPEN_SHARDS", 2)
    split = open_split(toy_shards)
    assert len(split.dataset.splits["train"]) > 2
    assert_same(split.read(order), expected)
    assert (len(split._indices), len(split._feature_shards), len(split._readers._open)) == (1, 2, 2)


def test_a_split_reaches_a_worker_with_every_field_and_without_open_files(toy_shards: Path) -> None:
    split = Split(open_dataset(toy_shards), "train", None, False, replace_damaged=True, with_object_masks=True)
    split.read(np.array([0]))
    sent = pickle.loads(pickle.dumps(split))
    assert vars(sent).keys() == {field.name for field in fields(Split)}
    assert all(getattr(sent, field.name) == getattr(split, field.name) for field in fields(Split))


@dataclass(frozen=True)
class BatchWithDepth(Batch):
    """A batch with a tensor that `Batch` knows nothing of."""

    depth: torch.Tensor | None = None


def test_a_split_of_some_samples_numbers_them_anew(toy_shards: Path) -> None:
    split, chosen = replace(open_split(toy_shards), cache=None), np.array([2, 9, 16])
    some = replace(split, only=chosen)
    assert len(some) == 3
    assert_same(some.read(np.array([2, 0])), split.read(np.array([16, 2])))
    assert_same(some.read(np.array([4])), split.read(np.array([len(split) + 9])))  # mirrored
    assert (some.class_ids() == split.class_ids()[chosen]).all()
    assert some.key(1) == split.key(9)


def test_a_tensor_field_that_is_added_to_a_batch_is_moved_and_kept_with_the_others(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_split(toy_shards).read(np.array([0, 1]))
    values = {field.name: getattr(plain, field.name) for field in fields(plain)} | {"damaged": {"a": "cut"}}
    batch = BatchWithDepth(**values, depth=torch.zeros(2, 8, 8))
    tensors = {"images", "features", "part_labels", "part_labels_small", "object_masks", "class_ids", "depth"}
    moved = batch.to(torch.device("meta"))
    assert {name for name in tensors if getattr(moved, name).device.type == "meta"} == tensors
    assert (moved.keys, moved.damaged) == (batch.keys, batch.damaged)
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor))
    batch.record_stream(None)  # type: ignore[arg-type]
    assert {id(tensor) for tensor in kept} == {id(getattr(batch, name)) for name in tensors}


def test_a_loader_worker_imports_no_network_and_sharding_no_model() -> None:
    listed = python(
        "-c",
        "import sys, slotscops.loader.batches\n"
        "print(*sys.modules)\n"
        "import slotscops.shard.__main__\n"
        "print(*sys.modules)",
    )
    worker, sharding = (set(line.split()) for line in listed.stdout.splitlines())
    assert "slotscops.loader.split" in worker
    assert not worker & {"torchvision", "accelerate", "slotscops.model", "slotscops.features.teacher"}
    assert not worker & {"pydantic", "slotscops.config", "slotscops.datasets"}
    assert "slotscops.shard.writer" in sharding
    assert "slotscops.model" not in sharding


def test_where_few_files_may_be_open_few_shards_are(toy_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.resource, "getrlimit", lambda _: (16, 16))
    split = open_split(toy_shards)
    assert len(split.dataset.splits["train"]) > 2
    split.read(np.arange(len(split)))
    assert len(split._readers._open) == 2
