"""Part maps against true parts, as papers count."""

from slotscops.metrics.scores import PartScores

__all__ = ["PartScores"]
