"""Clusters of the teacher's feature vectors: a baseline, and a start for the part basis.

Shapes: M sampled vectors of C channels, G clusters.
"""

import numpy as np
import torch
from torch import Tensor

from slotscops.loader import Split
from slotscops.plan import permutation

_BATCH_SIZE = 32
_MAX_IMAGES = 2_000  # a fixed sample of the split: reading a million images would take minutes
_MAX_VECTORS = 50_000


def sample_vectors(split: Split, seed: int) -> Tensor:
    """(M, C) float32 feature vectors of grid cells, the same ones for the same seed, from at most 2,000 images."""
    images = permutation(len(split), seed, epoch=0)[:_MAX_IMAGES]
    per_image = max(1, _MAX_VECTORS // len(images))
    generator = np.random.default_rng(seed)
    vectors = []
    for start in range(0, len(images), _BATCH_SIZE):
        features = split.read(images[start : start + _BATCH_SIZE]).features
        assert features is not None
        for cells in features.flatten(2).transpose(1, 2):
            vectors.append(cells[generator.permutation(len(cells))[:per_image]])
    return torch.cat(vectors).float()


def find_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of k-means (scikit-learn, best of four starts)."""
    from sklearn.cluster import KMeans  # here, because it takes a second that a usual training need not wait

    centres = KMeans(num_clusters, n_init=4, random_state=seed).fit(vectors.numpy()).cluster_centers_
    return torch.from_numpy(centres).float()
