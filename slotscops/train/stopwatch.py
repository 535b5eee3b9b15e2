"""Measures the speed of training, the time it waits for data, and its peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Counts images and waiting time since the last reading. Time spent paused does not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Sets all counts to zero and starts anew."""
        self._start = time.perf_counter()
        self.waited_s = 0.0
        self._paused_s = 0.0
        self._images = 0

    def count(self, images: int) -> None:
        """Adds images, of all processes, that were trained on."""
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside, such as that of evaluation or writing a checkpoint."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """`images_per_second` over all processes, and `data_wait`, the share of the time spent waiting for data."""
        elapsed_s = max(time.perf_counter() - self._start - self._paused_s, 1e-9)
        return {"images_per_second": self._images / elapsed_s, "data_wait": self.waited_s / elapsed_s}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the GPU, or of this process if the device is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
