"""Averaged weights: an exponential moving average of a network's parameters over the steps."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


class WeightAverage(Generic[Network]):
    """A second copy of the network whose parameters are the moving average of the trained ones.

        average <- decay * average + (1 - decay) * parameter

    Source: Polyak and Juditsky (1992); with a constant decay, as in Tarvainen and Valpola (arXiv:1703.01780).
    """

    def __init__(self, network: Network, decay: float) -> None:
        """
        Args:
            decay: share of the old average that stays at each step, in [0, 1).
        """
        self.network: Network = copy.deepcopy(network).requires_grad_(False).eval()
        self._followed = network
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average; call it after each step of the optimizer."""
        # torch's AveragedModel around this function would read its step counter back from the device at each step.
        self._update(list(self.network.parameters()), list(self._followed.parameters()), 1)

    def restart(self) -> None:
        """Sets the average to the current parameters."""
        self.network.load_state_dict(self._followed.state_dict())
