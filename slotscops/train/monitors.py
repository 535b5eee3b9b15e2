"""Monitors of a training: they find losses that are not finite and signs that the slots collapse.

Signs of collapse are how unevenly the slots share an image and how similar the rows of the basis are. Each has a likely
cause.

Shapes: B images, S slots (slot 0 the background), K = S - 1 parts, C teacher channels, h x w grid of the logits.
"""

import math

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slotscops.config import Config
from slotscops.core.errors import RunError

# A slot that wins a smaller share is dead. For 16 crops on a 16 x 16 grid this is 4 cells; eyes win more.
DEAD_SHARE = 0.001
_ALL = 0.95  # a slot that wins a larger share has taken everything
_UNDECIDED = 0.98  # maps with more entropy, as a share of that of equal maps, are undecided
_ALIKE = 0.98  # cosine of two basis rows that stand for the same part
_GRACE_STEPS = 100  # in its first 100 steps, and in its first tenth, every run looks collapsed


def watch(logits: Tensor, basis: Tensor) -> dict[str, Tensor]:
    """The monitored values, each a float32 scalar on the device of the logits; nothing here waits for the device.

    Args:
        logits: (B, S, h, w) before the softmax over slots.
        basis: (K, C), or (B, K, C), in which case the worst image counts.

    Returns:
        slot_share_0 ...: share of the grid's cells that each slot wins; they sum to 1.
        background_share: share of slot 0.
        dead_slots: number of slots, including the background, that win less than 0.1 %.
        map_entropy: mean entropy of the slots at a cell, divided by that of equal maps: 0 decided, 1 undecided.
        basis_cosine: largest cosine between two different basis rows; 0 with a single row.
        zero_basis_rows: number of rows that are all zero; ReLU passes no gradient to them.
    """
    logits = logits.float()
    num_slots = logits.shape[1]
    winners = functional.one_hot(logits.argmax(dim=1), num_slots)  # (B, h, w, S)
    shares = winners.float().mean(dim=(0, 1, 2))  # (S,)
    log_maps = logits.log_softmax(dim=1)
    entropy = -(log_maps.exp() * log_maps).sum(dim=1).mean() / math.log(num_slots)
    rows = functional.normalize(basis.float(), dim=-1, eps=1e-12)
    cosines = rows @ rows.mT  # of a zero row: 0
    cosines = cosines - cosines.diagonal(dim1=-2, dim2=-1).diag_embed()
    return {
        **{f"slot_share_{slot}": share for slot, share in enumerate(shares)},
        "background_share": shares[0],
        "dead_slots": (shares < DEAD_SHARE).sum().float(),
        "map_entropy": entropy,
        "basis_cosine": cosines.max(),
        "zero_basis_rows": (basis == 0).all(dim=-1).sum(dim=-1).max().float(),
    }


def dead_parts(counts: NDArray[np.int64]) -> list[int]:
    """The slots from 1 that win less than 0.1 % of the pixels of every class, such as those of an evaluation.

    Args:
        counts: (G, S) pixels by class and slot; (1, S) if all classes share their slots. A class without pixels says
            nothing. Without any pixel, no slot is dead.
    """
    seen = counts[counts.sum(axis=1) > 0]
    if not len(seen):
        return []
    shares = seen / seen.sum(axis=1, keepdims=True)  # (classes seen, S)
    return [slot for slot in range(1, counts.shape[1]) if (shares[:, slot] < DEAD_SHARE).all()]


def likely_causes(row: dict[str, float], step: int, config: Config) -> dict[str, str]:
    """Signs of collapse in a logged step: cause -> what was seen, why, and what to change. Usually empty.

    Args:
        row: the values of `watch`.
        step: steps done; the first tenth of a run and its first 100 steps give no warnings.
        config: of the run. No change is advised that it has made already.
    """
    if step < max(_GRACE_STEPS, config.train.total_steps // 10):
        return {}
    kmeans = (config.basis.init == "random", "set basis.init=kmeans")
    fewer = (config.slots.num_parts > 1, "lower slots.num_parts")
    slower_basis = (True, "lower train.basis_learning_rate")
    weaker_entropy = (config.losses.entropy > 0, "lower losses.entropy")
    later_entropy = (config.losses.entropy > 0, "raise losses.entropy_ramp_steps")
    shares = [value for name, value in row.items() if name.startswith("slot_share_")]
    causes = {}
    if row["map_entropy"] > _UNDECIDED:
        causes["undecided"] = (
            f"all slots share every cell about equally (map_entropy {row['map_entropy']:.3f}), as they do if they all "
            "start alike or learn too slowly: "
            + _advice((config.slots.init != "learned", "set slots.init=learned"), (True, "raise train.learning_rate"))
        )
    elif max(shares) > _ALL:
        slot = shares.index(max(shares))
        who = "the background" if slot == 0 else f"slot {slot}"
        causes["one slot takes all"] = (
            f"{who} wins {100 * max(shares):.1f} % of all cells; the basis fits too little of the features for the "
            "other slots to win anything, or an entropy loss decided too early: "
            + _advice(
                kmeans, weaker_entropy, (config.train.optimizer == "sgd", "set train.optimizer=adamw"), slower_basis
            )
        )
    elif shares[0] < DEAD_SHARE:
        causes["no background"] = (
            f"the background wins {100 * shares[0]:.2f} % of all cells, so a part has taken its place; this "
            "happens if there are more slots than the features fill: " + _advice(fewer, kmeans, slower_basis)
        )
    dead = [slot for slot, share in enumerate(shares) if slot and share < DEAD_SHARE]
    if dead and not causes:
        causes["dead slots"] = (
            f"slot(s) {', '.join(map(str, dead))} win nothing; their basis rows fit no feature, or an entropy loss "
            "decided before they had found one: " + _advice(later_entropy, kmeans, fewer, slower_basis)
        )
    if row["zero_basis_rows"] >= 1:
        causes["zero basis rows"] = (
            f"{row['zero_basis_rows']:.0f} row(s) of the basis are all zero and get no gradient any more: "
            + _advice(slower_basis)
        )
    # With places, two parts may look alike and differ in where they lie, as front and hind legs do.
    if row["basis_cosine"] > _ALIKE and config.decoder.places == "none":
        causes["rows alike"] = (
            f"two rows of the basis are alike (cosine {row['basis_cosine']:.3f}), so two slots share one part: "
            + _advice(fewer, kmeans, slower_basis)
        )
    return causes


def _advice(*remedies: tuple[bool, str]) -> str:
    """The remedies that are still open, as one text."""
    *others, last = [text for is_open, text in remedies if is_open]
    return f"{', '.join(others)}, or {last}" if others else last


class FiniteWatch:
    """Remembers the first step at which the loss of a process, or the gradient, was not finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._first_bad_steps = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # loss, gradient; 0: none

    def note(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        # Kept on the device, because reading the numbers here would make every step wait for it.
        bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(grad_norm)])
        self._first_bad_steps = torch.where(bad & (self._first_bad_steps == 0), step, self._first_bad_steps)

    def check(self) -> None:
        """Checks all processes together, so that all stop if one must.

        Raises:
            RunError: on every process, if something was not finite; names rank and step.
        """
        bad_losses, bad_gradients = self._accelerator.gather(self._first_bad_steps[None]).T.tolist()
        if not any(bad_losses + bad_gradients):
            return
        since = min(step for step in bad_losses + bad_gradients if step)
        # All processes share the gradient, so only the loss shows which process was not finite.
        ranks = ", ".join(str(rank) for rank, step in enumerate(bad_losses) if step == since)
        what = f"the loss of rank {ranks}" if ranks else "the gradient"
        raise RunError(
            f"{what} has not been finite since step {since}; lower train.learning_rate or train.clip_norm and continue "
            "from the last checkpoint, which was saved before that step"
        )
