"""The machine: the device of this process, its memory allocator, and what a figure was measured with."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def own_device() -> torch.device:
    """The device of this process: among the GPUs of its node the one of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def keep_freed_memory() -> None:
    """Makes the C library (glibc) keep the memory of freed large tensors for the next ones.

    By default, glibc returns every freed tensor above 32 MB to the system, and each page costs a page fault when it is
    used again. This took 7 % of a step of ResNet-50 at 128 px, batch 16, on two cores. Other C libraries are left as
    they are.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt") and hasattr(allocator, "gnu_get_libc_version"):
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, -1)


def machine(device: torch.device) -> dict[str, str]:
    """Device, threads, versions and commit, which are published beside every figure."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {_cpu_name()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Short hash of the checkout, with + if it has uncommitted changes; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()
