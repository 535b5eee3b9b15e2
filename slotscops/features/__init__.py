"""The features of a frozen teacher for every crop, computed once and cached in the folder of the shards."""

from slotscops.features.cache import open_features

__all__ = ["open_features"]
