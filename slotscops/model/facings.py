"""Which way the objects of a sample face, found together with the clusters of their parts, before training begins.

Shapes: V sampled cells with C teacher channels, K parts.
"""

import numpy as np
import torch
from torch import Tensor

from slotscops.core.records import Batch
from slotscops.loader.split import Split
from slotscops.model.clusters import (
    cached_features,
    cells_of_objects,
    find_single_centres,
    move_centres,
    sample_vectors,
)
from slotscops.model.object_frame import find_frame, in_frame
from slotscops.model.object_guess import ObjectGuess, nearest
from slotscops.model.target import TargetTransform

_NUM_STARTS = 3  # principal components of the features, one of which should differ between the two ends of an object
_MAX_TURNS = 20
_FEW = 0.002  # share of the photos that may still turn when the search ends


def sample_places(
    split: Split, seed: int, target: TargetTransform, guess: ObjectGuess | None, class_id: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The places of the cells that `sample_cells` samples with the same split, seed and class.

    Args:
        guess: gives the object masks; None reads them from the split.

    Returns:
        places: (V, 2) y and x in the frame of the photo's object, as if it faced right.
        images: (V,) int64 number of the photo.
        inside: (V,) bool, whether the cell lies in the object.
    """
    seen = 0

    def places_of(batch: Batch) -> Tensor:
        nonlocal seen
        features = cached_features(batch)  # (B, C, h, w)
        grid = (features.shape[2], features.shape[3])
        masks = batch.object_masks if guess is None else guess(target(features), grid)
        assert masks is not None
        inside = cells_of_objects(masks, grid).float()  # (B, h, w)
        numbers = torch.arange(seen, seen + len(batch))[:, None, None].expand_as(inside)
        seen += len(batch)
        rows, columns = in_frame(find_frame(inside), grid)
        y, x = rows[:, :, None].expand_as(inside), columns[:, None, :].expand_as(inside)
        return torch.stack([y, x, numbers.float(), inside], dim=1)

    sampled = sample_vectors(split, seed, places_of, class_id=class_id)  # (V, 4)
    if not len(sampled):
        return torch.empty(0, 2), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    return sampled[:, :2], sampled[:, 2].long(), sampled[:, 3] > 0


def find_facings(
    vectors: Tensor, places: Tensor, images: Tensor, num_images: int, num_parts: int, weight: float, seed: int
) -> Tensor:
    """Finds which way each photo's object faces, by k-means on features and places.

    Two steps alternate, as in k-means itself: centres move to the means of their cells, and each photo takes the facing
    under which its cells lie nearer to their centres. A search needs a first guess: for each of the first three
    principal components of the features, an object first faces the side on which that component is larger. Of the
    three searches the one with the smallest total distance counts.

    Args:
        vectors: (V, C) features of cells of objects, of length 1.
        places: (V, 2) y and x, as if all objects faced right.
        images: (V,) number of each cell's photo, below `num_images`.
        num_parts: number of centres K.
        weight: of a squared distance between places, where one between features weighs 1.

    Returns:
        (num_images,) 1 or -1; 1 for a photo without cells, and for all photos if there are fewer cells than centres.
    """
    if len(vectors) < num_parts:
        return torch.ones(num_images)
    centred = (vectors - vectors.mean(0)).double()
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -_NUM_STARTS:]  # (C, 3), the largest last
    best: tuple[float, Tensor] | None = None
    for component in components.flip(1).T:
        lean = _sum_by(images, (centred @ component) * places[:, 1], num_images)
        facings = torch.where(lean < 0, -1.0, 1.0)
        centres = find_single_centres(join(vectors, places, facings[images], weight), num_parts, seed)
        for _ in range(_MAX_TURNS):
            distances = []
            for sign in (1.0, -1.0):
                joined = join(vectors, places, torch.full_like(places[:, 0], sign), weight)
                own = centres[nearest(joined, centres)]
                distances.append(_sum_by(images, (joined - own).square().sum(1), num_images))
            turned = torch.where(distances[1] < distances[0], -1.0, 1.0)
            changed = (turned != facings).float().mean().item()
            facings = turned
            if changed <= _FEW:
                break
            centres = move_centres(join(vectors, places, facings[images], weight), centres)
        total = torch.minimum(*distances).sum().item()
        if best is None or total < best[0]:
            best = total, facings
    assert best is not None
    return best[1]


def join(vectors: Tensor, places: Tensor, facing: Tensor, weight: float) -> Tensor:
    """(V, C + 2) features and weighted places, with x turned by the facing (V,) of each cell's photo."""
    turned = torch.stack([places[:, 0], places[:, 1] * facing], dim=1)
    return torch.cat([vectors, np.sqrt(weight) * turned], dim=1)


def _sum_by(images: Tensor, values: Tensor, num_images: int) -> Tensor:
    """(num_images,) sums of (V,) values by photo, in float64, so that the order of the cells does not matter."""
    return torch.zeros(num_images, dtype=torch.float64).index_add_(0, images, values.double())
