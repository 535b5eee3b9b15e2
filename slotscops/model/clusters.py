"""Clusters of the teacher's feature vectors: baselines, and a start for the part basis.

Shapes: B images, M sampled vectors of C channels on an h x w grid, G clusters.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slotscops.core.records import Batch
from slotscops.loader.plan import permutation
from slotscops.loader.split import Split

_BATCH_SIZE = 32
_MAX_IMAGES = 2_000  # a fixed sample of the split: reading a million images would take minutes
_MAX_VECTORS = 50_000
_NMF_ITERATIONS = 200
_NUM_STARTS = 20  # of which the least even is taken
_MAX_COMPARED = 20_000  # vectors, of which each start makes its own partition
_INERTIA_SLACK = 1.005  # how much more than the lowest inertia it may have


def cached_features(batch: Batch) -> Tensor:
    """(B, C, h, w) float32 features of the batch."""
    assert batch.features is not None
    return batch.features.float()


def sample_vectors(
    split: Split,
    seed: int,
    vectors_of: Callable[[Batch], Tensor] = cached_features,
    inside_objects: bool = False,
    class_id: int | None = None,
) -> Tensor:
    """(M, C) float32 vectors of grid cells, the same ones for the same seed, from at most 2,000 images.

    Args:
        vectors_of: batch -> (B, C, h, w).
        inside_objects: only from cells at least half covered by the object; needs a split read with labels.
        class_id: only from images of this class.
    """
    images = permutation(len(split), seed, epoch=0)
    if class_id is not None:
        images = images[split.class_ids()[images] == class_id]
    images = images[:_MAX_IMAGES]
    if not len(images):
        return torch.empty(0, 0)
    per_image = max(1, _MAX_VECTORS // len(images))
    generator = np.random.default_rng(seed)
    vectors = []
    for start in range(0, len(images), _BATCH_SIZE):
        batch = split.read(images[start : start + _BATCH_SIZE])
        maps = vectors_of(batch)
        is_wanted = torch.ones(len(batch), *maps.shape[2:], dtype=torch.bool)
        if inside_objects:
            assert batch.object_masks is not None
            height, width = maps.shape[-2:]
            covered = functional.adaptive_avg_pool2d(batch.object_masks.float(), (height, width))
            is_wanted = covered >= covered.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)  # at least one of each image
        for cells, wanted in zip(maps.flatten(2).transpose(1, 2), is_wanted.flatten(1), strict=True):
            inside = cells[wanted]
            vectors.append(inside[generator.permutation(len(inside))[:per_image]])
    return torch.cat(vectors).float()


def find_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of k-means (scikit-learn, best of ten starts).

    Of four starts, samples of the same real faces ended in different partitions.
    """
    from sklearn.cluster import KMeans  # here, because it takes a second that a usual training need not wait

    centres = KMeans(num_clusters, n_init=10, random_state=seed).fit(vectors.numpy()).cluster_centers_
    return torch.from_numpy(centres).float()


def find_uneven_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of the run of k-means whose clusters differ most in size.

    K-means of the same vectors ends in partitions of nearly the same inertia that mean quite different things; by its
    nature it cuts what is large into even pieces, while parts of an object are of unlike sizes. Of twenty runs, each
    from one start, those within 0.5 % of the lowest inertia are compared by the entropy of their clusters' sizes, and
    the lowest is taken.
    """
    from sklearn.cluster import KMeans  # as above

    some = vectors[:: -(-len(vectors) // _MAX_COMPARED)].numpy()  # in the order of the photos: the same share of each
    seeds = range(_NUM_STARTS * seed, _NUM_STARTS * (seed + 1))
    runs = [KMeans(num_clusters, n_init=1, random_state=start).fit(some) for start in seeds]
    highest = min(run.inertia_ for run in runs) * _INERTIA_SLACK
    chosen = min((run for run in runs if run.inertia_ <= highest), key=lambda run: _entropy_of_sizes(run.labels_))
    return torch.from_numpy(chosen.cluster_centers_).float()


def _entropy_of_sizes(labels: NDArray[np.int32]) -> float:
    """Of the share of each cluster, in nats."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def find_factors(vectors: Tensor, num_factors: int, seed: int) -> Tensor:
    """(G, C) float32 rows of H in the non-negative factorisation vectors = W H, each of length 1.

    scikit-learn's mini-batches, from non-negative double SVD. Collins et al. (ECCV 2018) factorise all vectors of a few
    images at once; here it is a sample of the split, so that factors mean the same in every photo.
    """
    from sklearn.decomposition import MiniBatchNMF  # as above
    from sklearn.exceptions import ConvergenceWarning

    factorisation = MiniBatchNMF(
        num_factors, init="nndsvda", batch_size=2048, max_iter=_NMF_ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # on a bounded number of passes, by intention
        factors = torch.from_numpy(factorisation.fit(vectors.numpy()).components_).float()
    return functional.normalize(factors, dim=1)
