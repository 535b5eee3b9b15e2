"""Clusters of the teacher's feature vectors, used by the baselines and to initialise the part basis.

Shapes: B images, M sampled vectors of C channels on an h x w grid, G clusters.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from slotscops.core.records import Batch
from slotscops.loader.plan import permute
from slotscops.loader.split import Split

_BATCH_SIZE = 32
_MAX_IMAGES = 2_000  # size of a fixed sample of the split, because reading a million images would take minutes
_MAX_VECTORS = 50_000
_MAX_SHUFFLED = 1_000_000
_NMF_ITERATIONS = 200
_NUM_STARTS = 20  # runs of k-means, of which the one with the least even clusters is taken
_MAX_COMPARED = 20_000  # vectors that each run of k-means clusters
_INERTIA_SLACK = 1.005  # a run may have at most this multiple of the lowest inertia


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
    """Samples feature vectors of grid cells from at most 2,000 images of the split.

    Args:
        seed: the same seed gives the same vectors.
        vectors_of: maps a batch to (B, C, h, w).
        inside_objects: sample only cells that the object covers at least half (or the best covered cells of an image
            that has none). The split must be read with object masks.
        class_id: sample only images of this class.

    Returns:
        (M, C) float32 vectors, or (0, 0) if there are no images.
    """
    images = _sample_images(split, seed, class_id)
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
            is_wanted = cells_of_objects(batch.object_masks, maps.shape[-2:])
        for cells, wanted in zip(maps.flatten(2).transpose(1, 2), is_wanted.flatten(1), strict=True):
            inside = cells[wanted]
            vectors.append(inside[generator.permutation(len(inside))[:per_image]])
    return torch.cat(vectors).float()


def cells_of_objects(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, h, w) bool, the cells of a grid (h, w) that objects cover at least half, for bool masks (B, H, W).

    Every image has at least one: if no cell is covered so far, the best covered ones count.
    """
    height, width = grid
    covered = functional.adaptive_avg_pool2d(masks.float(), (height, width))
    return covered >= covered.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)


def thin_out(vectors: Tensor) -> Tensor:
    """At most 20,000 of (M, C) vectors in the order of the photos: every n-th one, so each photo keeps its share."""
    return vectors[:: max(1, -(-len(vectors) // _MAX_COMPARED))]


def _sample_images(split: Split, seed: int, class_id: int | None) -> NDArray[np.int64]:
    """(n,) at most 2,000 images of the split, or of one class, in random order."""
    # This order is the one that published scores were sampled with. It needs an array of all samples.
    shuffled = None
    if len(split) <= _MAX_SHUFFLED:
        key = np.random.SeedSequence([seed, 0])
        shuffled = np.random.Generator(np.random.Philox(key)).permutation(len(split))
    found: list[int] = []
    for start in range(0, len(split), _MAX_IMAGES):
        places = np.arange(start, min(start + _MAX_IMAGES, len(split)))
        images = permute(places, len(split), seed, epoch=0) if shuffled is None else shuffled[places]
        if class_id is not None:
            images = images[split.class_ids_of(images) == class_id]
        found += images.tolist()
        if len(found) >= _MAX_IMAGES:
            break
    return np.array(found[:_MAX_IMAGES], np.int64)


def find_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of k-means (scikit-learn) on (M, C) vectors, the best of ten starts.

    With only four starts, samples of the same real faces gave different partitions.
    """
    from sklearn.cluster import KMeans  # imported here: it takes a second, and most runs do not need it

    centres = KMeans(num_clusters, n_init=10, random_state=seed).fit(vectors.numpy()).cluster_centers_
    return torch.from_numpy(centres).float()


def find_single_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of k-means on (M, C) vectors from a single start.

    The best of ten starts is nearly the same for every seed. A single one differs from seed to seed.
    """
    from sklearn.cluster import KMeans  # imported here, as above

    centres = KMeans(num_clusters, n_init=1, random_state=seed).fit(thin_out(vectors).numpy()).cluster_centers_
    return torch.from_numpy(centres).float()


def move_centres(vectors: Tensor, centres: Tensor) -> Tensor:
    """(G, C) float32 centres of k-means on (M, C) vectors, from the given centres on."""
    from sklearn.cluster import KMeans  # imported here, as above

    found = KMeans(len(centres), init=centres.numpy(), n_init=1).fit(thin_out(vectors).numpy()).cluster_centers_
    return torch.from_numpy(found).float()


def find_uneven_centres(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(G, C) float32 centres of the run of k-means on (M, C) vectors whose clusters differ most in size.

    Runs of k-means on the same vectors give partitions of nearly the same inertia but of quite different meaning.
    K-means tends to cut large regions into even pieces, while the parts of an object have unequal sizes. We run it
    twenty times with one start each, keep the runs within 0.5 % of the lowest inertia, and take the one whose cluster
    sizes have the lowest entropy.
    """
    from sklearn.cluster import KMeans  # imported here, as above

    some = thin_out(vectors).numpy()
    seeds = [
        start % 2**32 for start in range(_NUM_STARTS * seed, _NUM_STARTS * (seed + 1))
    ]  # scikit-learn takes 32 bits
    runs = [KMeans(num_clusters, n_init=1, random_state=start).fit(some) for start in seeds]
    highest = min(run.inertia_ for run in runs) * _INERTIA_SLACK
    chosen = min((run for run in runs if run.inertia_ <= highest), key=lambda run: _entropy_of_sizes(run.labels_))
    return torch.from_numpy(chosen.cluster_centers_).float()


def _entropy_of_sizes(labels: NDArray[np.int32]) -> float:
    """Entropy in nats of the clusters' shares, for (M,) cluster numbers."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def find_factors(vectors: Tensor, num_factors: int, seed: int) -> Tensor:
    """(G, C) float32 rows of H, scaled to length 1, in the non-negative factorisation W H of (M, C) vectors.

    This uses scikit-learn's mini-batch algorithm, started from a non-negative double SVD. Collins et al. (ECCV 2018)
    factorise all vectors of a few images at once. We factorise a sample of the whole split, so that a factor means the
    same in every photo.
    """
    from sklearn.decomposition import MiniBatchNMF  # imported here, as above
    from sklearn.exceptions import ConvergenceWarning

    factorisation = MiniBatchNMF(
        num_factors, init="nndsvda", batch_size=2048, max_iter=_NMF_ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is limited on purpose
        factors = torch.from_numpy(factorisation.fit(vectors.numpy()).components_).float()
    return functional.normalize(factors, dim=1)
