"""What a method without training finds: k-means clusters of positions or of teacher features.

The clusters bear no order, so cluster 0 is background only by name; scores do not depend on names.

Shapes: B images, C channels on an h x w grid, H x W pixels, G clusters.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slotscops.loader import Split, evaluation_batches
from slotscops.records import Batch

NAMES = ("position", "kmeans")
_BATCH_SIZE = 32
_MAX_FITTED_VECTORS = 50_000  # a fixed sample of all grid cells
_POSITION_GRID = 16


def fit(name: str, train: Split, num_clusters: int, seed: int = 0) -> Callable[[Batch], Tensor]:
    """Clusters the training split's vectors.

    Args:
        name: `position` clusters the coordinates of grid cells, `kmeans` the teacher's features.

    Returns:
        A predictor: batch -> (B, H, W) cluster of each pixel, by the bilinearly upsampled vectors.
    """
    from sklearn.cluster import KMeans  # here, because it takes a second that training need not wait

    vectors = _positions(1)[0].flatten(1).T.numpy() if name == "position" else _sample_vectors(train, seed)
    centres = KMeans(num_clusters, n_init=4, random_state=seed).fit(vectors).cluster_centers_
    return _nearest_centre_predictor(torch.from_numpy(centres).float(), use_position=name == "position")


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


def _sample_vectors(train: Split, seed: int) -> NDArray[np.float32]:
    """At most 50,000 grid cells' feature vectors, the same ones for the same seed."""
    vectors: list[NDArray[np.float32]] = []
    generator = np.random.default_rng(seed)
    per_image = max(1, _MAX_FITTED_VECTORS // max(len(train), 1))
    for batch in evaluation_batches(train, _BATCH_SIZE):
        assert batch.features is not None
        for features in batch.features.float().flatten(2).transpose(1, 2).numpy():
            chosen = generator.permutation(len(features))[:per_image]
            vectors.append(features[chosen])
    return np.concatenate(vectors)
