"""Gives terms that compare photos of the whole batch what the other processes hold, with its gradient.

Shapes: P processes, B images of each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """What all processes hold, by rank, and where the own share begins."""

    everyone: Tensor  # (P * B, ...)
    first: int  # number of this process's first row


Gather = Callable[[Tensor], Gathered]


def keep_own(mine: Tensor) -> Gathered:
    """(B, ...) -> the same: the batch is what this process holds."""
    return Gathered(mine, 0)


def gather_processes(mine: Tensor) -> Gathered:
    """(B, ...) of each process -> (P * B, ...). All processes must call it with equal shapes.

    A process's loss may depend on the rows of all. In the backward pass each process therefore receives the sum of all
    processes' gradients of its own rows. DDP then takes the mean over the processes, and what remains is the gradient
    of the mean of their losses. Nothing here makes a GPU's host wait.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return keep_own(mine)
    everyone: Tensor = _AllGather.apply(mine.contiguous())
    return Gathered(everyone, dist.get_rank() * len(mine))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, mine: Tensor) -> Tensor:
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
