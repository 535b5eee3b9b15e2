"""Fits the projection of a compact cache to the features of some crops. `features.compact` says what a projection is.

Shapes: B images, C teacher channels on an h x w grid, D components, V vectors.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from slotscops.core import console
from slotscops.core.errors import RunError
from slotscops.features.compact import Projection
from slotscops.features.teacher import Teacher, compute_features
from slotscops.shard.index import ShardDataset, ShardEntry
from slotscops.shard.reader import ShardReader

_SAMPLE_IMAGES = 256  # to which the projection is fitted: 65,536 vectors of a 16 x 16 grid
_BATCH_SIZE = 16  # as in `writer`


def fit_projection(dataset: ShardDataset, teacher: Teacher, size: int, num_components: int) -> Projection:
    """Fits the projection to the features of at most 256 crops that lie evenly in the training split.

    Without a training split, the crops of the first split are taken. Sums are in float64, so that their order does not
    matter much; still, two machines may differ in the last bits, and one process fits the matrix for all.

    Raises:
        RunError: a feature is not finite.
    """
    moment = torch.zeros(teacher.num_channels, teacher.num_channels, dtype=torch.float64)  # sum of f f^T
    total = torch.zeros(teacher.num_channels, dtype=torch.float64)
    count = 0
    for images in _sample_images(dataset):
        features = compute_features(teacher, images, size).cpu().double()
        vectors = features.permute(0, 2, 3, 1).flatten(0, 2)  # (V, C)
        moment += vectors.T @ vectors
        total += vectors.sum(0)
        count += len(vectors)
    if not moment.isfinite().all():
        raise RunError("the teacher's features are not finite; check the teacher's weights")
    moment, mean = moment / count, total / count
    matrix = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :num_components]  # the largest eigenvalues come last
    largest = matrix.abs().argmax(0)
    matrix = matrix * matrix.gather(0, largest[None]).sign()  # an eigenvector's sign is arbitrary
    covariance = moment - torch.outer(mean, mean)
    kept = (matrix * (covariance @ matrix)).sum() / covariance.trace().clamp_min(torch.finfo(torch.float64).tiny)
    return Projection(matrix.float().contiguous(), round(float(kept), 6))


def _sample_images(dataset: ShardDataset) -> Iterator[Tensor]:
    """Yields (B, 3, S, S) uint8 crops of the sample, at most 16 at a time."""
    split = "train" if dataset.num_samples("train") else next(iter(dataset.splits))
    total = dataset.num_samples(split)
    wanted = np.unique(np.linspace(0, total - 1, min(total, _SAMPLE_IMAGES)).round().astype(np.int64))
    rows_of: list[tuple[ShardEntry, list[int]]] = []
    first = 0
    for entry in dataset.split(split):
        rows = wanted[(wanted >= first) & (wanted < first + entry.num_samples)] - first
        first += entry.num_samples
        rows_of += [(entry, rows[start : start + _BATCH_SIZE].tolist()) for start in range(0, len(rows), _BATCH_SIZE)]
    what = f"fitting the projection to {len(wanted)} crops, batches of {_BATCH_SIZE}"
    for entry, some in console.track(rows_of, len(rows_of), what):
        yield ShardReader(dataset, entry).read_images(some)
