"""A run's tensors on their way into a checkpoint and back: network, averaged weights, optimizer, random numbers."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from slotscops.train.averaging import WeightAverage
from slotscops.train.build import parameter_names
from slotscops.train.run import checkpoint
from slotscops.train.run.checkpoint import Checkpoint


def take(
    network: nn.Module, average: WeightAverage[Any] | None, optimizer: Optimizer, accelerator: Accelerator
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of a checkpoint's files. Every process must call it: each has random numbers of its own."""
    generators: dict[str, Tensor] = {}
    for states in gather_object([checkpoint.rng_tensors(accelerator.process_index)]):
        generators |= states
    tensors = {
        "model": network.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(optimizer, parameter_names(network)),
        "rng": generators,
    }
    if average:
        tensors["ema"] = average.network.state_dict()
    return tensors


def restore(
    saved: Checkpoint, network: nn.Module, average: WeightAverage[Any] | None, optimizer: Optimizer, rank: int
) -> None:
    """The inverse. A checkpoint without averaged weights starts their average at the weights themselves.

    Raises:
        UserError: tensors of a model with other settings.
    """
    checkpoint.restore_model(network, saved.model, saved.path)
    checkpoint.restore_optimizer(optimizer, parameter_names(network), saved.optimizer)
    if average:
        average.restart()
        if saved.ema is not None:
            checkpoint.restore_model(average.network, saved.ema, saved.path)
    checkpoint.restore_rng(saved.rng, rank)
