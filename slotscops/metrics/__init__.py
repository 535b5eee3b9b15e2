"""Scores of part maps, against true parts with the protocols that papers use, or without labels."""

from slotscops.metrics.scores import PartScores

__all__ = ["PartScores"]
