"""The training losses: they turn part maps into one number to minimise."""

from slotscops.losses.mixture import mixture_loss
from slotscops.losses.semantic import semantic_consistency

__all__ = ["mixture_loss", "semantic_consistency"]
