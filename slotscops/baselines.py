"""What a method without training finds: k-means clusters of positions or of teacher features.

The clusters bear no order, so cluster 0 is background only by name; scores do not depend on names.

Shapes: B images, C channels on an h x w grid, H x W pixels, G clusters.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.clusters import find_centres, sample_vectors
from slotscops.loader import Split
from slotscops.records import Batch

NAMES = ("position", "kmeans")
_POSITION_GRID = 16


def fit(name: str, train: Split, num_clusters: int, seed: int = 0) -> Callable[[Batch], Tensor]:
    """Clusters the training split's vectors.

    Args:
        name: `position` clusters the coordinates of grid cells, `kmeans` the teacher's features.

    Returns:
        A predictor: batch -> (B, H, W) cluster of each pixel, by the bilinearly upsampled vectors.
    """
    vectors = _positions(1)[0].flatten(1).T if name == "position" else sample_vectors(train, seed)
    centres = find_centres(vectors, num_clusters, seed)
    return _nearest_centre_predictor(centres, use_position=name == "position")


def _nearest_centre_predictor(centres: Tensor, use_position: bool) -> Callable[[Batch], Tensor]:
    def predict(batch: Batch) -> Tensor:
        if use_position:
            vectors = _positions(len(batch))
        else:
            assert batch.features is not None
            vectors = batch.features.float()
        # |f - c|^2 = |f|^2 - 2 f.c + |c|^2; the first is the same for all centres, the rest is linear in f, so that
        # upsampling it is upsampling the features.
        scores = torch.einsum("bchw,gc->bghw", vectors, centres) - 0.5 * centres.square().sum(1)[:, None, None]
        size = batch.images.shape[-2:]
        return functional.interpolate(scores, size, mode="bilinear", align_corners=True).argmax(dim=1)

    return predict


def _positions(num_images: int) -> Tensor:
    """(B, 2, h, w) y and x of each grid cell in [0, 1]."""
    line = torch.linspace(0, 1, _POSITION_GRID)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    return grid.expand(num_images, -1, -1, -1)
