"""The training losses: they turn part maps into one number to minimise."""

from slotscops.losses.semantic import semantic_consistency

__all__ = ["semantic_consistency"]
