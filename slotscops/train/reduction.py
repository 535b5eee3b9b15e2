"""Sums gradients in a fixed order, which gives the same bits for any number of processes.

DDP adds gradients in an order that depends on the number of processes, and a sum of floating point numbers depends on
its order. Here the global batch is cut into M logical microbatches, which are the same for any number of processes that
divides M. Every process receives all M gradients and adds them from the first to the last.

Shapes: P processes, M microbatches, V values in all gradients together.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slotscops.config import Reduction

_CHUNK = 1 << 22  # numbers gathered at once: 16 MB from each process


def choose_kernels(reduction: Reduction) -> None:
    """Chooses the kernels of a GPU: those that give the same bits in every run for `deterministic`, else the fastest.

    It must be called before CUDA starts, because cuBLAS reads its environment variable only then. cuDNN tries its
    kernels for each new shape and keeps the fastest, which another run may find to be another one.
    """
    is_fixed = reduction == "deterministic"
    if is_fixed:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_fixed)
    # No tensor is read before it is written, so that none needs to be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = is_fixed
    torch.backends.cudnn.benchmark = not is_fixed


def seed_microbatch(seed: int, step: int, number: int) -> None:
    """Seeds the generators for one microbatch, so that slots that start from random numbers draw the same ones.

    Args:
        step: steps done before.
        number: of the microbatch in the global batch, over all processes.
    """
    drawn = np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(drawn) >> 1)  # 63 bits


@torch.no_grad()
def take_first_process_tensors(network: nn.Module) -> None:
    """Gives every process the parameters and buffers of the first one, as DDP does.

    They come from the same seed, but another GPU or processor may compute other last bits.
    """
    if _num_processes() == 1:
        return
    for tensor in [*network.parameters(), *network.buffers()]:
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


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
