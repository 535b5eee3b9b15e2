"""Baselines without network training, scored on the same crops and features with the same code as runs.

- `position`: k-means of the coordinates of grid cells. Its score shows how much the alignment of the crops explains.
- `kmeans`: k-means of the teacher's features.
- `dff`: non-negative factorisation of the features, Deep Feature Factorization (Collins et al., ECCV 2018).

Each baseline is fit twice on the training split. G clusters on whole crops give the labels with the method's own
background. No cluster is fit to be the background, so label 0 matches it only by chance. G - 1 clusters on the objects
alone give the labels for the protocol with a given object mask.

Shapes: B images, C channels on an h x w grid, H x W pixels, G clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.config import BaselineTransform
from slotscops.core.records import Batch
from slotscops.loader.split import Split
from slotscops.metrics.protocols import Prediction
from slotscops.model.clusters import cached_features, find_centres, find_factors, sample_vectors
from slotscops.model.refinement import refine_maps
from slotscops.model.target import TargetTransform

NAMES = ("position", "kmeans", "dff")
_POSITION_GRID = 16
_NNLS_STEPS = 50  # on real faces, after 30 steps fewer than 1 in 2,000 cells change their largest factor
_EPSILON = 1e-9
_LEAST_SHARE = 1e-8  # keeps the log of a share of 0 finite


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline. Called with a batch, it predicts its labels; see `Prediction`."""

    vectors_of: Callable[[Batch], Tensor]  # (B, C, h, w) of a batch
    own: Callable[[Tensor], Tensor]  # vectors -> (B, G, h, w) scores; the cluster with the largest one wins
    without_background: Callable[[Tensor], Tensor]  # the same for G - 1 clusters of objects alone
    refine: bool

    def __call__(self, batch: Batch) -> Prediction:
        labels, best = (self._maps(score, batch).argmax(dim=1) for score in (self.own, self.without_background))
        return Prediction(labels, best + 1)

    def logits(self, batch: Batch) -> Tensor:
        """(B, G, h, w) scores of the clusters before they are upsampled, or logs of the refined shares of pixels."""
        if self.refine:
            return self._maps(self.own, batch).clamp_min(_LEAST_SHARE).log()
        return self.own(self.vectors_of(batch))

    def _maps(self, score: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """(B, G, H, W) scores, or shares if they are refined."""
        size = batch.images.shape[-2:]
        maps = functional.interpolate(score(self.vectors_of(batch)), size, mode="bilinear", align_corners=True)
        return refine_maps(_one_hot(maps), batch.images) if self.refine else maps


def fit(
    name: str,
    train: Split,
    num_clusters: int,
    seed: int = 0,
    transform: BaselineTransform = "none",
    refine: bool = False,
) -> Baseline:
    """Fits a baseline on the training split.

    Args:
        name: one of `NAMES`.
        train: must be read with labels, because the second fit samples inside the object masks.
        num_clusters: G, at least 2.
        seed: for the sampled vectors and the starts of the clusters.
        transform: applied to the features, see `TargetTransform`. `sqrt` reduces the weight of a few strong channels.
        refine: refine the labels with `refine_maps`, as networks do with `decoder.refinement: pamr`.
    """
    vectors_of = _positions if name == "position" else partial(transformed_features, transform=transform)
    own, without_background = (
        _score_maps(name, train, num_clusters - int(inside), seed, vectors_of, inside) for inside in (False, True)
    )
    return Baseline(vectors_of, own, without_background, refine)


def _score_maps(
    name: str,
    train: Split,
    num_clusters: int,
    seed: int,
    vectors_of: Callable[[Batch], Tensor],
    inside_objects: bool,
) -> Callable[[Tensor], Tensor]:
    """A function from (B, C, h, w) vectors to (B, G, h, w) scores. The cluster with the largest score wins."""
    if name == "position" and not inside_objects:
        vectors = _grid().flatten(1).T  # the cells of all crops are the same, so one crop is enough
    else:
        vectors = sample_vectors(train, seed, vectors_of, inside_objects)
    if name == "dff":
        return partial(factor_weights, factors=find_factors(vectors, num_clusters, seed))
    return partial(nearness, centres=find_centres(vectors, num_clusters, seed))


def nearness(vectors: Tensor, centres: Tensor) -> Tensor:
    """(B, G, h, w) scores that are largest for the nearest of (G, C) centres to each of the (B, C, h, w) vectors f.

    The score is f.c - |c|^2 / 2, from |f - c|^2 = |f|^2 - 2 f.c + |c|^2. The term |f|^2 is the same for all centres.
    Without it the score is linear in f, so upsampling the scores gives the same result as upsampling the features.
    """
    return torch.einsum("bchw,gc->bghw", vectors, centres) - 0.5 * centres.square().sum(1)[:, None, None]


def factor_weights(vectors: Tensor, factors: Tensor) -> Tensor:
    """(B, G, h, w) non-negative weights W for (G, C) factors H, such that W H approximates (B, C, h, w) vectors X.

    It runs multiplicative updates W <- W * (X H^T) / (W H H^T) (Lee and Seung, 2001), which only need products of
    size G.
    """
    wanted = torch.einsum("bchw,gc->bghw", vectors, factors)
    gram = factors @ factors.T
    weights = wanted.clone()
    for _ in range(_NNLS_STEPS):
        weights = weights * wanted / (torch.einsum("bghw,gk->bkhw", weights, gram) + _EPSILON)
    return weights


def _one_hot(scores: Tensor) -> Tensor:
    """(B, G, H, W) 1 for the cluster with the largest score, else 0.

    `refine_maps` averages shares, and the scores themselves are not shares.
    """
    winner = scores.argmax(dim=1)
    return functional.one_hot(winner, scores.shape[1]).movedim(-1, 1).float()


def transformed_features(batch: Batch, transform: BaselineTransform) -> Tensor:
    """(B, C, h, w) float32 cached features of the batch after the transform; see `TargetTransform`."""
    features = cached_features(batch)
    transformed: Tensor = TargetTransform(transform, features.shape[1])(features)
    return transformed


def _positions(batch: Batch) -> Tensor:
    """(B, 2, h, w) y and x of each grid cell in [0, 1], the same for every image."""
    return _grid().expand(len(batch), -1, -1, -1)


def _grid() -> Tensor:
    """(2, h, w) y and x of each grid cell in [0, 1]."""
    line = torch.linspace(0, 1, _POSITION_GRID)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))
