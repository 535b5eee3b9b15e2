"""Random numbers that follow from a seed, without a trace in the generators of the caller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the CPU and `device` draw the numbers of `torch.manual_seed(seed)`. Outside, nothing was drawn.

    `torch.manual_seed` also seeds every GPU, and `torch.random.fork_rng` gives back only the states that it saved.

    Args:
        device: a GPU on which numbers are drawn too; None or the CPU leaves the generators of all GPUs alone.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
