"""Timing side by side: the contestants take turns, so that a machine whose speed drifts is fair to all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Fastest to slowest, ms."""
        return f"{1e3 * min(self.seconds):.1f} to {1e3 * max(self.seconds):.1f}"


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, Times]:
    """Runs all contestants in turn, `rounds` times after a warm-up, and times each with the device at rest."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, run in contestants.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(values) for name, values in seconds.items()}


def peak_extra_memory_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The peak memory while `run` runs once, minus the memory in use before.

    On a GPU, PyTorch's allocator reports it. On a CPU, PyTorch's profiler records what its operators have allocated and
    not yet freed, so memory that the allocator keeps for later does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
