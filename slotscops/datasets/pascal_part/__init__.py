"""PASCAL-Part: VOC2010 photos with the part masks of Chen et al. (CVPR 2014)."""

from slotscops.datasets.pascal_part.annotation import read_annotation

__all__ = ["read_annotation"]
