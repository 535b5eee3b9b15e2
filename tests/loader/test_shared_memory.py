"""Shared memory that is too small: refused before the first step with what to set; full later, it hangs nothing."""

import subprocess
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from commands import PYTHON, run, sabotaged, training

from slotscops.core.errors import UserError
from slotscops.features.cache import open_cache
from slotscops.loader import shared_memory
from slotscops.loader.split import Split
from slotscops.shard.index import open_dataset

Usage = namedtuple("Usage", "free")


@pytest.fixture
def split(toy_shards: Path) -> Split:
    dataset = open_dataset(toy_shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), with_labels=False, with_object_masks=True)


@pytest.fixture
def small_shared_memory() -> list[str]:
    """The start of a command that sees a /dev/shm of 1 MB, as in a container that was given no more."""
    command = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "bash"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    return command


def test_the_bytes_of_a_batch_are_those_of_its_tensors(split: Split) -> None:
    batch = split.read(torch.arange(3).numpy())
    tensors = [batch.images, batch.features, batch.object_masks, batch.class_ids]
    assert sum(split.batch_bytes(3).values()) == sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_too_little_shared_memory_for_all_processes_of_the_host_is_refused(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    # 2 workers x 4 batches and 2 that train; 64 samples of 64 px, features of 512 x 4 x 4, masks and class numbers.
    needed = 3 * 10 * (64 * 64 * 64 * (3 + 1) + 64 * 512 * 4 * 4 * 2 + 4096)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: Usage(needed))
    shared_memory.check_shared_memory(split, 64, 2)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: Usage(needed - 1))
    shared_memory.check_shared_memory(split, 64, 0)
    with pytest.raises(UserError, match=r"/dev/shm: has 60 MB .* needed 61 MB .*=2 in each of 3 .*--shm-size=61m .*=0"):
        shared_memory.check_shared_memory(split, 64, 2)


def test_training_with_too_little_shared_memory_ends_in_one_line(
    toy_shards: Path, tmp_path: Path, small_shared_memory: list[str]
) -> None:
    done = run([*small_shared_memory, *training(PYTHON, toy_shards, tmp_path / "run", "data.num_workers=2")])
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()  # after the warning of the toy's random teacher
    assert line.startswith("slotscops: /dev/shm: has 1 MB of shared memory free, needed 3 MB")
    assert "--shm-size=3m" in line
    assert "data.num_workers=0" in line


def test_shared_memory_that_fills_up_later_ends_the_run_at_once(
    toy_shards: Path, tmp_path: Path, small_shared_memory: list[str]
) -> None:
    script = sabotaged(
        tmp_path,
        "if step == 3: subprocess.run('cat /dev/zero > /dev/shm/filler', shell=True, stderr=subprocess.DEVNULL)",
    )
    script.write_text("import subprocess\n" + script.read_text())
    settings = ("data.num_workers=1", "train.batch_size=1", "train.total_steps=100000")
    began = time.monotonic()
    done = run([*small_shared_memory, *training(PYTHON, toy_shards, tmp_path / "run", *settings, script=script)])
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    assert "a loader worker cannot hand a batch over" in done.stderr
    assert "a loader worker died" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
