import platform

import pytest
import torch
from commands import python

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.train.processes import start_accelerator, warn_of_small_share

SCRIPT = """
import resource
import torch
from slotscops.core.machine import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(64_000_000, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()  # the first one is still handed out by the system
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_large_tensors_take_the_memory_of_those_before_them() -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 200
    assert kept < given_back / 20


def test_a_gpu_with_few_images_at_a_time_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    few = load_config(None, ["train.batch_size=64"])
    for settings, device, processes in (
        ([], "cuda", 1),
        ([], "cpu", 8),
        (["train.compile=true"], "cuda", 8),
        (["encoder.name=features"], "cuda", 8),
    ):
        warn_of_small_share(load_config(None, ["train.batch_size=64", *settings]), torch.device(device), processes)
    assert capsys.readouterr().err == ""
    warn_of_small_share(few, torch.device("cuda"), 8)
    said = " ".join(capsys.readouterr().err.split())
    assert "each GPU takes 8 images at a time" in said
    assert "train.compile=true, train.batch_size=512, or fewer processes" in said


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_a_precision_from_the_launcher_that_training_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(
        UserError, match=rf"asks for {asked}, needed one of no, bf16; launch with --mixed_precision bf16"
    ):
        start_accelerator(load_config(None))
