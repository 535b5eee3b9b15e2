"""Losses and gradients that are not finite, noticed without a step waiting for the device."""

import torch
from accelerate import Accelerator
from torch import Tensor

from slotscops.core.errors import RunError


class FiniteWatch:
    """Since which step the loss of each process, or the gradient, has not been finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._first_bad_steps = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # loss, gradient; 0: none

    def note(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        # On the device: looking at the numbers here would make every step wait for it.
        bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(grad_norm)])
        self._first_bad_steps = torch.where(bad & (self._first_bad_steps == 0), step, self._first_bad_steps)

    def check(self) -> None:
        """All processes together, so that none goes on where another stops.

        Raises:
            RunError: on every process, if something was not finite; names rank and step.
        """
        bad_losses, bad_gradients = self._accelerator.gather(self._first_bad_steps[None]).T.tolist()
        if not any(bad_losses + bad_gradients):
            return
        since = min(step for step in bad_losses + bad_gradients if step)
        # A gradient is everyone's: who brought in what is not finite shows in the loss alone.
        ranks = ", ".join(str(rank) for rank, step in enumerate(bad_losses) if step == since)
        what = f"the loss of rank {ranks}" if ranks else "the gradient"
        raise RunError(
            f"{what} has not been finite since step {since}; lower train.learning_rate or train.clip_norm and go on "
            "from the last checkpoint, which is from before it"
        )
