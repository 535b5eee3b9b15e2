"""Sums gradients in a fixed order, which gives the same bits for any number of processes.

DDP adds gradients in an order that depends on the number of processes, and a sum of floating point numbers depends on
its order. Here the global batch is cut into M logical microbatches, which are the same for any number of processes that
divides M. Every process receives all M gradients and adds them from the first to the last.

Shapes: P processes, M microbatches, V values in all gradients together.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_CHUNK = 1 << 22  # numbers gathered at once: 16 MB from each process


class FixedOrderReducer:
    """Collects one gradient for each microbatch and leaves the mean of all of them in `.grad`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._collected: list[Tensor] = []

    def collect(self) -> None:
        """Stores this microbatch's gradients and clears `.grad`."""
        flat = [
            parameter.new_zeros(parameter.numel()) if parameter.grad is None else parameter.grad.reshape(-1)
            for parameter in self._parameters
        ]
        self._collected.append(torch.cat(flat))  # (V,)
        for parameter in self._parameters:
            parameter.grad = None

    def reduce(self) -> None:
        """Sets `.grad` to the mean over the microbatches of all processes, added by rank and then in order."""
        mine = torch.stack(self._collected)  # (M / P, V)
        self._collected = []
        mean = torch.cat([_sum_in_order(chunk) for chunk in mine.split(_CHUNK, dim=1)])  # (V,)
        mean /= len(mine) * _num_processes()
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, mean.split(sizes), strict=True):
            # The gradient takes the parameter's layout, because the fused optimizers read both in memory order.
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))


def _sum_in_order(mine: Tensor) -> Tensor:
    """(M / P, V) of each process -> (V,), added one after another."""
    everyone = [mine.contiguous()]
    if _num_processes() > 1:
        everyone = [torch.empty_like(everyone[0]) for _ in range(_num_processes())]
        dist.all_gather(everyone, mine.contiguous())
    rows = [row for of_process in everyone for row in of_process]
    total: Tensor = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
