"""Guesses from the teacher's features alone which pixels of a crop belong to the object.

Shapes: B images, V sampled vectors of C teacher channels, G clusters, features on an h x w grid, H x W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.core.errors import UserError
from slotscops.model.clusters import find_centres, thin_out
from slotscops.model.maps import upsample

NUM_CLUSTERS = 40  # on faces, guesses from 40 clusters were nearer to the true masks than those from 11, 20 or 80
_KAPPA = 20.0  # how sharply a feature belongs to its nearest cluster
_SMALLEST_SHARE = 0.02  # added to each share before the logarithm: a cluster that is never on the border has share 0


class BackgroundClusters(NamedTuple):
    """Clusters of feature vectors, and which of them are background."""

    centres: Tensor  # (G, C) float32
    is_background: Tensor  # (G,) bool

    def contain(self, vectors: Tensor) -> Tensor:
        """(V,) bool: whether the nearest cluster of each of the vectors (V, C) is background."""
        return self.is_background[nearest(vectors, self.centres)]


def find_background(
    vectors: Tensor, is_on_border: Tensor, seed: int, num_clusters: int = NUM_CLUSTERS
) -> BackgroundClusters | None:
    """Finds the clusters that are background: those that lie on the crops' border far more often than the others.

    Objects are in the middle of their crops, so the border shows the background more often than the middle does. The
    share of a cluster's cells that lie on the border is therefore high for background and low for parts. Otsu's
    threshold, of the logarithm of these shares, separates the two kinds.

    Args:
        vectors: (V, C) vectors of length 1.
        is_on_border: (V,) bool.

    Returns:
        None if there are fewer vectors than clusters.

    Sources: Zhu et al. (CVPR 2014), Saliency Optimization from Robust Background Detection, for the border as evidence
    of background; Otsu (IEEE Trans. SMC, 1979) for the threshold. The clusters of a whole data set are our own.
    """
    if len(vectors) < num_clusters:
        return None
    centres = find_centres(thin_out(vectors), num_clusters, seed)
    members = functional.one_hot(nearest(vectors, centres), num_clusters).double()  # (V, G)
    sizes = members.sum(0)
    shares = (is_on_border.double() @ members) / sizes.clamp_min(1)  # (G,)
    logarithms = (shares + _SMALLEST_SHARE).log()
    return BackgroundClusters(centres, logarithms > otsu_threshold(logarithms, sizes))


def otsu_threshold(values: Tensor, weights: Tensor) -> float:
    """The threshold that cuts (G,) weighted values into two groups whose means differ most, by Otsu's criterion.

    It lies halfway between the two values that it separates. Equal values have no threshold: then it is infinity.
    """
    order = values.argsort()
    values, weights = values[order], weights[order]
    below, total = weights.cumsum(0)[:-1], weights.sum()  # (G - 1,)
    sums = (values * weights).cumsum(0)
    means_below, means_above = sums[:-1] / below, (sums[-1] - sums[:-1]) / (total - below)
    between = below * (total - below) * (means_above - means_below) ** 2
    between = torch.where(values[1:] > values[:-1], between, -1.0).nan_to_num(-1.0)
    if not len(between) or between.max() < 0:
        return float("inf")
    cut = int(between.argmax())
    return float((values[cut] + values[cut + 1]) / 2)


class ObjectGuess(nn.Module):
    """Clusters of the teacher's features that are background; they say where the object of a photo is.

    The clusters are found once, at the start of a run, and saved with the model, so that a resumed run goes on with the
    same ones. Nothing here trains.
    """

    centres: Tensor  # (G, C) of length 1
    is_object: Tensor  # (G,) 1 for clusters of objects, 0 for background

    def __init__(self, num_channels: int, num_clusters: int = NUM_CLUSTERS) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(num_clusters, num_channels))
        self.register_buffer("is_object", torch.ones(num_clusters))

    def clusters(self) -> BackgroundClusters:
        """The clusters as `measure` found them, but of length 1."""
        return BackgroundClusters(self.centres, self.is_object == 0)

    @torch.no_grad()
    def measure(self, vectors: Tensor, is_on_border: Tensor, seed: int) -> None:
        """Finds the clusters from (V, C) vectors of length 1 and their (V,) places; see `find_background`.

        Raises:
            UserError: if there are fewer vectors than clusters.
        """
        found = find_background(vectors, is_on_border, seed, len(self.centres))
        if found is None:
            raise UserError(
                f"losses.target_mask is guessed, which needs {len(self.centres)} cells of features, but the training "
                f"split has {len(vectors)}; add photos, or set losses.target_mask=none"
            )
        self.centres.copy_(functional.normalize(found.centres, dim=1))
        self.is_object.copy_(~found.is_background)

    @torch.no_grad()
    def forward(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """The guessed object masks.

        Args:
            target: (B, C, h, w) features, transformed as the parts rebuild them.
            size: H, W in pixels.

        Returns:
            (B, H, W) bool, True inside the object.
        """
        with torch.autocast(target.device.type, enabled=False):
            unit = functional.normalize(target.float(), dim=1).flatten(2)  # (B, C, h*w)
            shares = (_KAPPA * (self.centres @ unit)).softmax(dim=1)  # (B, G, h*w)
            inside = (self.is_object @ shares).view(len(target), 1, *target.shape[2:])
            return upsample(inside, size)[:, 0] > 0.5


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """(V,) number of the nearest of the centres (G, C) for vectors (V, C)."""
    return (vectors @ centres.T - centres.square().sum(1) / 2).argmax(1)
