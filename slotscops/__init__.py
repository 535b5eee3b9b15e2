"""Discover the parts of objects from photos without part labels: SCOPS with Slot Attention, trained at scale."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late, so that `python -m slotscops.shard` and the loader's workers need not import the networks.
    if name == "load":
        from slotscops.segment.segmenter import load

        return load
    raise AttributeError(f"module 'slotscops' has no attribute '{name}'")
