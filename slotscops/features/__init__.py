"""What a frozen teacher sees of every crop, computed once and cached beside the shards."""

from slotscops.features.cache import open_features

__all__ = ["open_features"]
