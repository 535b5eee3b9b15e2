"""What a method without training finds, on the same crops and features and through the same scorer.

- `position`: k-means of the coordinates of grid cells. What it scores is what aligned crops give away.
- `kmeans`: k-means of the teacher's features.
- `dff`: non-negative factorisation of the features, Deep Feature Factorization (Collins et al., ECCV 2018).

Each is fit twice on the training split: G clusters on whole crops for the model's own background, which clusters bear
only by chance, and G - 1 on the objects alone for the protocol that gives the object mask away.

Shapes: B images, C channels on an h x w grid, H x W pixels, G clusters.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.config import BaselineTransform
from slotscops.core.records import Batch
from slotscops.loader.split import Split
from slotscops.metrics.protocols import Prediction, Predictor
from slotscops.model.clusters import cached_features, find_centres, find_factors, sample_vectors
from slotscops.model.refinement import refine_maps
from slotscops.model.target import TargetTransform

NAMES = ("position", "kmeans", "dff")
_POSITION_GRID = 16
_NNLS_STEPS = 50  # measured on real faces: beyond 30 fewer than one cell in 2,000 changes its largest factor
_EPSILON = 1e-9


def fit(
    name: str,
    train: Split,
    num_clusters: int,
    seed: int = 0,
    transform: BaselineTransform = "none",
    refine: bool = False,
) -> Predictor:
    """Clusters the training split's vectors.

    Args:
        name: one of `NAMES`.
        train: read with labels, whose object masks decide what the second fit sees.
        num_clusters: G, at least 2.
        transform: of the features, as `TargetTransform`; `sqrt` lets a few strong channels decide less.
        refine: give the labels to `refine_maps`, as a network's maps where `decoder.refinement` is `pamr`.
    """
    vectors_of = _positions if name == "position" else partial(transformed_features, transform=transform)
    own, parts = (
        _score_maps(name, train, num_clusters - int(inside), seed, vectors_of, inside) for inside in (False, True)
    )

    def predict(batch: Batch) -> Prediction:
        size = batch.images.shape[-2:]
        scores = (
            functional.interpolate(maps(vectors_of(batch)), size, mode="bilinear", align_corners=True)
            for maps in (own, parts)
        )
        if refine:
            scores = (refine_maps(_one_hot(maps), batch.images) for maps in scores)
        labels, best = (maps.argmax(dim=1) for maps in scores)
        return Prediction(labels, best + 1)

    return predict


def _score_maps(
    name: str,
    train: Split,
    num_clusters: int,
    seed: int,
    vectors_of: Callable[[Batch], Tensor],
    inside_objects: bool,
) -> Callable[[Tensor], Tensor]:
    """A function from (B, C, h, w) vectors to (B, G, h, w) scores, of which the largest wins."""
    if name == "position" and not inside_objects:
        vectors = _grid().flatten(1).T  # the cells of every crop are the same
    else:
        vectors = sample_vectors(train, seed, vectors_of, inside_objects)
    if name == "dff":
        return partial(factor_weights, factors=find_factors(vectors, num_clusters, seed))
    return partial(nearness, centres=find_centres(vectors, num_clusters, seed))


def nearness(vectors: Tensor, centres: Tensor) -> Tensor:
    """(B, G, h, w): largest for the nearest of (G, C) centres, and linear in the (B, C, h, w) vectors.

    |f - c|^2 = |f|^2 - 2 f.c + |c|^2; the first is the same for all centres and is left out, so that upsampling the
    scores is upsampling the features.
    """
    return torch.einsum("bchw,gc->bghw", vectors, centres) - 0.5 * centres.square().sum(1)[:, None, None]


def factor_weights(vectors: Tensor, factors: Tensor) -> Tensor:
    """(B, G, h, w) non-negative weights W of (G, C) factors H, so that W H is close to the (B, C, h, w) vectors X.

    Multiplicative updates W <- W * (X H^T) / (W H H^T) (Lee and Seung, 2001), which only need products of size G.
    """
    wanted = torch.einsum("bchw,gc->bghw", vectors, factors)
    gram = factors @ factors.T
    weights = wanted.clone()
    for _ in range(_NNLS_STEPS):
        weights = weights * wanted / (torch.einsum("bghw,gk->bkhw", weights, gram) + _EPSILON)
    return weights


def _one_hot(scores: Tensor) -> Tensor:
    """(B, G, H, W) 1 where a cluster's score is the largest, else 0: scores are no shares that could be averaged."""
    winner = scores.argmax(dim=1)
    return functional.one_hot(winner, scores.shape[1]).movedim(-1, 1).float()


def transformed_features(batch: Batch, transform: BaselineTransform) -> Tensor:
    """(B, C, h, w) float32"""
    features = cached_features(batch)
    transformed: Tensor = TargetTransform(transform, features.shape[1])(features)
    return transformed


def _positions(batch: Batch) -> Tensor:
    """(B, 2, h, w)"""
    return _grid().expand(len(batch), -1, -1, -1)


def _grid() -> Tensor:
    """(2, h, w) y and x of each grid cell in [0, 1]."""
    line = torch.linspace(0, 1, _POSITION_GRID)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))
