"""Mirrored photos in training: their features, and the choice of mirrored samples by seed, epoch and sample alone."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import metrics, train
from forks import ranks
from hypothesis import given
from hypothesis import strategies as st

from slotscops.core.errors import UserError
from slotscops.evaluate.__main__ import main as evaluate_main
from slotscops.features import __main__ as features
from slotscops.features.cache import FeatureCache, open_cache, open_features
from slotscops.features.manifest import read_manifest, write_manifest
from slotscops.features.teacher import Teacher, compute_features
from slotscops.loader import plan
from slotscops.loader.batches import evaluation_batches, training_batches
from slotscops.loader.plan import TrainingPlan
from slotscops.loader.split import Split
from slotscops.shard.index import open_dataset
from slotscops.shard.reader import ShardReader

MIRRORED = ["--teacher-weights", "random:0", "--mirrored"]
PYTHON = [sys.executable]


@pytest.fixture(scope="module")
def shards(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy shards with mirrored features beside the others. Not to be changed."""
    out = Path(shutil.copytree(toy_shards, tmp_path_factory.mktemp("mirrored") / "shards"))
    assert features.main(["--shards", str(out), *MIRRORED]) == 0
    return out


def opened(shards: Path) -> FeatureCache:
    return open_cache(open_dataset(shards), "relu5_4", 64, mirrored=True)


def open_split(shards: Path, name: str = "train", labels: bool = False) -> Split:
    return Split(open_dataset(shards), name, opened(shards), with_labels=labels)


def test_the_mirrored_cache_holds_the_teachers_answer_to_the_mirrored_crop_and_leaves_the_other_alone(
    shards: Path, toy_shards: Path
) -> None:
    dataset, teacher = open_dataset(shards), Teacher("relu5_4", "random:0")
    mirrored = opened(shards).mirrored
    assert mirrored is not None
    assert mirrored.manifest["mirrored"] is True
    for entry in dataset.splits["train"]:
        crops = ShardReader(dataset, entry).read_images(range(entry.num_samples))
        expected = compute_features(teacher, crops.flip(-1), 64).half()
        came = mirrored.open_shard(entry).read_rows(range(entry.num_samples))
        torch.testing.assert_close(came, expected, rtol=2e-3, atol=2e-3)
        # Turning the cached map instead would be far off.
        plain = open_features(shards, entry.name).read_rows(range(entry.num_samples)).flip(-1)
        assert (plain - came).float().norm() > 0.05 * came.float().norm()
    plain_files, before = opened(shards).folder, toy_shards / "features" / "vgg19-relu5_4-64"
    assert {path.name: path.read_bytes() for path in plain_files.iterdir()} == {
        path.name: path.read_bytes() for path in before.iterdir()
    }


def test_a_build_begun_without_the_mirrored_half_finishes_with_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(shards, tmp_path / "shards"))
    folder = again / "features" / "vgg19-relu5_4-64-mirrored"
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("manifest.json", "train-000001.safetensors"):
        (folder / name).unlink()
    assert features.main(["--shards", str(again), *MIRRORED]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert features.main(["--shards", str(again), "--mirrored", "--verify"]) == 0


def test_training_without_mirrored_features_is_refused_by_name_with_a_command_that_mends_it(
    toy_shards: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    done = train(PYTHON, shards, tmp_path / "run", "data.mirror=true", "train.total_steps=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "data.mirror" in done.stderr
    command = done.stderr.split("build with: python -m slotscops.features ")[1].split()
    assert features.main(command) == 0
    assert opened(shards).mirrored is not None


def test_mirrored_features_of_other_weights_are_refused(shards: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(shards, tmp_path / "shards"))
    path = other / "features" / "vgg19-relu5_4-64-mirrored" / "manifest.json"
    manifest = read_manifest(path)
    identity = manifest | {"weights_sha256": "of others"}
    write_manifest(path, identity, tuple(manifest["shape"]), manifest["files"])
    with pytest.raises(UserError, match="weights_sha256"):
        opened(other)


@given(st.integers(1, 60), st.integers(0, 2**40), st.sampled_from([1, 2, 4]), st.integers(0, 200))
def test_what_is_mirrored_depends_on_seed_epoch_and_sample_alone(
    num_samples: int, seed: int, ranks: int, start: int
) -> None:
    def plans(mirror: bool) -> list[int]:
        per_rank = [
            list(TrainingPlan(num_samples, seed, 8, r, ranks, 2, start, start + 40, mirror)) for r in range(ranks)
        ]
        return [
            sample
            for step in range(5)
            for microbatches in per_rank
            for samples in microbatches[2 * step : 2 * step + 2]
            for sample in samples
        ]

    numbers = plans(mirror=True)
    assert [number % num_samples for number in numbers] == plans(mirror=False)
    for place, number in enumerate(numbers, start):
        sample = np.array([number % num_samples])
        assert (number >= num_samples) == plan.mirrored_in(sample, seed, place // num_samples)[0]


def test_half_of_the_samples_are_mirrored_and_others_in_each_epoch() -> None:
    first, second = (plan.mirrored_in(np.arange(10_000), 0, epoch) for epoch in (0, 1))
    assert 4_800 < first.sum() < 5_200
    assert 4_800 < (first != second).sum() < 5_200
    # The numbers are fixed here, like the order of samples: a resumed run must mirror the same samples.
    assert plan.mirrored_in(np.arange(12), seed=3, epoch=1).astype(int).tolist() == PINNED


PINNED = [1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0]


def test_photos_masks_and_features_are_mirrored_together(shards: Path) -> None:
    split = open_split(shards, labels=True)
    order = np.arange(len(split))
    plain, turned = split.read(order), split.read(order + len(split))
    assert plain.keys == turned.keys
    assert torch.equal(plain.class_ids, turned.class_ids)
    for name in ("images", "part_labels", "object_masks"):
        assert torch.equal(getattr(plain, name).flip(-1), getattr(turned, name)), name
    expected = compute_features(Teacher("relu5_4", "random:0"), turned.images, 64).half()
    assert turned.features is not None
    torch.testing.assert_close(turned.features, expected, rtol=2e-3, atol=2e-3)
    mixed = split.read(np.array([3, 3 + len(split)]))
    assert torch.equal(mixed.images[0], plain.images[3])
    assert torch.equal(mixed.images[1], turned.images[3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_number_of_workers_mirrors_the_same_and_evaluation_nothing(shards: Path, num_workers: int) -> None:
    split = open_split(shards)
    training_plan = TrainingPlan(len(split), 7, 8, 0, 1, 1, 16, 56, mirror=True)
    batches = list(training_batches(split, training_plan, num_workers, pin_memory=False))
    for batch, numbers in zip(batches, training_plan, strict=True):
        expected = split.read(np.array(numbers))
        assert batch.keys == expected.keys == [split.key(number % len(split)) for number in numbers]
        assert torch.equal(batch.images, expected.images)
    if num_workers == 0:
        val = open_split(shards, "val", labels=True)
        seen = torch.cat([batch.images for batch in evaluation_batches(val, 2)])
        assert torch.equal(seen, val.read(np.arange(len(val))).images)


def test_resuming_on_two_processes_goes_on_with_the_same_mirrored_samples(shards: Path, tmp_path: Path) -> None:
    settings = ["train.total_steps=4", "data.mirror=true"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(PYTHON, shards, whole, *settings).returncode == 0
    assert train(PYTHON, shards, parts, *settings, "train.stop_after_steps=2").returncode == 0
    done = train(ranks(2), shards, parts, *settings)
    assert done.returncode == 0, done.stderr
    losses, digests = (
        {folder: [row[name] for row in metrics(folder)] for folder in (whole, parts)}
        for name in ("loss", "batch_digest")
    )
    assert digests[whole] == digests[parts]
    assert losses[parts] == pytest.approx(losses[whole], rel=1e-5)
    assert evaluate_main(["--checkpoint", str(parts), "--shards", str(shards)]) == 0
