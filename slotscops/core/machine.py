"""Describes the machine and software that a figure was measured with."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def own_device() -> torch.device:
    """The device of this process: among the GPUs of its node the one of its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


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
