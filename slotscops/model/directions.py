"""The first directions of the mixture loss: k-means clusters of the cached features, of background and parts.

Shapes: V sampled vectors of C teacher channels, K parts with M directions each, M_0 directions of the background.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.core.records import Batch
from slotscops.loader.split import Split
from slotscops.model.clusters import cached_features, cells_of_objects, find_centres, sample_vectors, thin_out
from slotscops.model.object_guess import nearest
from slotscops.model.target import TargetTransform

_EPSILON = 1e-6  # a vector of zeros stays zero, as in the loss
_FindCentres = Callable[[Tensor, int, int], Tensor]


class Numbers(NamedTuple):
    """How many directions are wanted."""

    parts: int  # K
    each: int  # M
    background: int  # M_0


def sample_cells(split: Split, seed: int, with_masks: bool, class_id: int | None = None) -> tuple[Tensor, Tensor]:
    """Samples feature vectors, and of each whether its cell lies in an object or, without masks, on the crop's border.

    Args:
        with_masks: whether the split is read with object masks, and these are used.
        seed, class_id: see `sample_vectors`.

    Returns:
        vectors: (V, C) float32 cached features, not transformed; (0, 0) if there are no images.
        flags: (V,) bool.
    """

    def features_and_flags(batch: Batch) -> Tensor:
        features = cached_features(batch)  # (B, C, h, w)
        flags = torch.zeros_like(features[:, 0])  # (B, h, w)
        if with_masks:
            assert batch.object_masks is not None
            flags[cells_of_objects(batch.object_masks, features.shape[-2:])] = 1
        else:
            flags[:, [0, -1], :] = 1
            flags[:, :, [0, -1]] = 1
        return torch.cat([features, flags[:, None]], dim=1)

    sampled = sample_vectors(split, seed, features_and_flags, class_id=class_id)  # (V, C + 1)
    return sampled[:, :-1], sampled[:, -1:].flatten() > 0


def find_directions(
    vectors: Tensor, is_background: Tensor, numbers: Numbers, seed: int, find: _FindCentres = find_centres
) -> tuple[Tensor, Tensor] | None:
    """Finds directions of the background among its cells, and of the parts among all others.

    Args:
        vectors: (V, C) vectors of length 1.
        is_background: (V,) bool.
        find: the kind of k-means that finds the parts.

    Returns:
        parts: (K * M, C) centres, the M of a part together.
        background: (M_0, C) centres.
        None if there are fewer cells of the background or of the objects than centres to find.
    """
    inside, outside = vectors[~is_background], vectors[is_background]
    if len(inside) < numbers.parts or len(outside) < numbers.background:
        return None
    centres = find(inside, numbers.parts, seed)  # (K, C)
    if numbers.each > 1:
        labels = nearest(inside, centres)
        of_parts = [inside[labels == part] for part in range(numbers.parts)]
        centres = torch.cat(
            [
                find_centres(thin_out(own), numbers.each, seed)
                if len(own) >= numbers.each
                else centre.expand(numbers.each, -1)
                for own, centre in zip(of_parts, centres, strict=True)
            ]
        )
    return centres, find_centres(thin_out(outside), numbers.background, seed)


def unit_vectors(vectors: Tensor, target: TargetTransform) -> Tensor:
    """(V, C) cached features -> (V, C) vectors of the target, scaled to length 1."""
    return functional.normalize(target(vectors), dim=1, eps=_EPSILON)
