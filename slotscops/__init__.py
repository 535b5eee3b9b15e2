"""Discover the parts of objects from photos without part labels: SCOPS with Slot Attention, trained at scale."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `slotscops shard` does not import the model, and a loader worker imports neither
    # the model nor torchvision.
    if name == "load":
        from slotscops.segment.segmenter import load

        return load
    raise AttributeError(f"module 'slotscops' has no attribute '{name}'")
