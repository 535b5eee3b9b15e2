import platform

import pytest
from commands import python

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.train.processes import start_accelerator

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


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_a_precision_from_the_launcher_that_training_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(
        UserError, match=rf"asks for {asked}, needed one of no, bf16; launch with --mixed_precision bf16"
    ):
        start_accelerator(load_config(None))
