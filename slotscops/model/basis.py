"""The part basis: one vector of teacher features for each part, and how it is initialised.

Shapes: B images, K parts with M directions each, M_0 directions of the background, C teacher channels, G classes of
objects.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import BasisKind, Config
from slotscops.loader.split import Split
from slotscops.model.clusters import find_centres, find_single_centres, find_uneven_centres, sample_vectors
from slotscops.model.directions import Numbers, find_directions, sample_cells, unit_vectors
from slotscops.model.facings import find_facings, join, sample_places
from slotscops.model.object_guess import ObjectGuess, find_background
from slotscops.model.starts import rows_of_classes
from slotscops.model.target import TargetTransform

_FIND = {"kmeans": find_centres, "uneven_kmeans": find_uneven_centres, "single_kmeans": find_single_centres}


class Directions(NamedTuple):
    """The directions of the mixture loss, of any length, without or with an image's own as the first axis."""

    parts: Tensor  # (K, M, C) or (B, K, M, C)
    background: Tensor  # (M_0, C) or (B, M_0, C)
    places: Tensor | None = None  # (K, 2) or (B, K, 2) places in the object's frame; None if parts have none


class PartBasis(nn.Module):
    """K learned rows of C channels. The part maps times the basis should rebuild the teacher's features.

    For the mixture loss each part has M rows, its directions, and the background has M_0 of its own. If parts have
    places, each has one in the frame of the object (see `model.object_frame`).

    Source: SCOPS (arXiv:1905.01298), semantic part basis.
    """

    background_parameter: nn.Parameter | None  # (G * M_0, C); None without the mixture loss
    place_parameter: nn.Parameter | None  # (G * K, 2) y and x; None if parts have no places

    def __init__(
        self,
        num_parts: int,
        feature_channels: int,
        kind: BasisKind = "relu",
        num_classes: int | None = None,
        num_each: int = 1,
        num_background: int = 0,
        has_places: bool = False,
    ) -> None:
        """
        Args:
            kind: `relu` sets negative numbers to 0; `free` keeps them.
            num_classes: G, if each class of objects has rows of its own. None if all classes share them.
            num_each: M, the number of rows of each part.
            num_background: M_0. 0 for losses under which the background has no directions.
            has_places: whether each part has a place in the object.
        """
        super().__init__()
        self.num_parts, self.kind, self.num_classes = num_parts, kind, num_classes
        self.num_each, self.num_background = num_each, num_background
        num_sets = num_classes or 1
        self.basis_parameter = nn.Parameter(torch.randn(num_sets * num_parts * num_each, feature_channels).abs())
        if num_background:
            self.background_parameter = nn.Parameter(torch.randn(num_sets * num_background, feature_channels).abs())
        else:
            self.background_parameter = None
        self.place_parameter = nn.Parameter(torch.zeros(num_sets * num_parts, 2)) if has_places else None

    def forward(self, class_ids: Tensor | None = None) -> Tensor:
        """Returns the basis (K, C), of each part the mean of its rows.

        If each class has rows of its own, class_ids (B,) are needed, and the result is (B, K, C).
        """
        rows = self._rows(self.basis_parameter, class_ids)  # (K * M, C) or (B, K * M, C)
        return rows if self.num_each == 1 else rows.unflatten(-2, (self.num_parts, self.num_each)).mean(-2)

    def directions(self, class_ids: Tensor | None = None) -> Directions | None:
        """The directions of the mixture loss. None if the background has none. class_ids as in `forward`."""
        if self.background_parameter is None:
            return None
        rows = self._rows(self.basis_parameter, class_ids).unflatten(-2, (self.num_parts, self.num_each))
        places = None if self.place_parameter is None else self._of_class(self.place_parameter, class_ids)
        return Directions(rows, self._rows(self.background_parameter, class_ids), places)

    def _rows(self, parameter: Tensor, class_ids: Tensor | None) -> Tensor:
        """As `_of_class`, without negative numbers if the basis may have none."""
        return self._of_class(parameter if self.kind == "free" else functional.relu(parameter), class_ids)

    def _of_class(self, rows: Tensor, class_ids: Tensor | None) -> Tensor:
        """(G * R, C) -> the class's rows (R, C), or (B, R, C) if each class has rows of its own."""
        if self.num_classes is None:
            return rows
        assert class_ids is not None, "each class has rows of its own; give class_ids"
        return rows_of_classes(rows.unflatten(0, (self.num_classes, -1)), class_ids)


def needs_features(config: Config) -> bool:
    """Whether the target's scales, the guess of objects or the basis start from a sample of the cached features."""
    return (
        config.basis.init != "random"
        or config.teacher.transform == "channel_standardised"
        or config.losses.target_mask == "guessed"
    )


def start_from_features(
    basis: PartBasis, target: TargetTransform, split: Split, config: Config, guess: ObjectGuess | None = None
) -> None:
    """Initialises the target's scales, the guess of objects and the basis from a sample of the cached features.

    The basis holds vectors of the transformed target. The sample and the clusters depend only on the data, the
    settings and `config.seed`.

    Args:
        guess: needed if `losses.target_mask` is `guessed`.
    """
    if not needs_features(config):
        return
    # If object masks multiply the target, the parts rebuild only features inside the objects.
    inside_objects = config.losses.target_mask == "object"
    vectors = sample_vectors(split, config.seed, inside_objects=inside_objects)
    target.measure(vectors)
    if guess is not None:
        cached, flags = sample_cells(split, config.seed, with_masks=False)
        guess.measure(unit_vectors(cached, target), flags, config.seed)
    if config.basis.init == "random":
        return
    if basis.background_parameter is not None:
        _start_directions(basis, basis.background_parameter, target, split, config, guess)
        return
    find = _FIND[config.basis.init]
    for class_id, rows in enumerate(basis.basis_parameter.data.split(basis.num_parts)):
        if basis.num_classes is not None:
            vectors = sample_vectors(split, config.seed, inside_objects=inside_objects, class_id=class_id)
        if guess is not None and len(vectors):
            vectors = vectors[~guess.clusters().contain(unit_vectors(vectors, target))]
        if len(vectors) >= basis.num_parts:  # A class with fewer vectors than parts keeps its random rows.
            rows.copy_(find(target(vectors), basis.num_parts, config.seed))


def _start_directions(
    basis: PartBasis,
    background: nn.Parameter,
    target: TargetTransform,
    split: Split,
    config: Config,
    guess: ObjectGuess | None,
) -> None:
    """Initialises the directions of the mixture loss, of the background and of the parts.

    With object masks the background's cells are those outside the objects. Without, they are those of the clusters
    that `find_background` finds, in all cells or, without a guess of objects, in those of the class. The parts are
    clustered from the other cells. A class with too few cells keeps its random directions.
    """
    with_masks = config.losses.target_mask == "object"
    numbers = Numbers(basis.num_parts, basis.num_each, basis.num_background)
    rows_of_parts = basis.basis_parameter.data.split(basis.num_parts * basis.num_each)
    for class_id, (parts, outside) in enumerate(
        zip(rows_of_parts, background.data.split(basis.num_background), strict=True)
    ):
        only = None if basis.num_classes is None else class_id
        cached, flags = sample_cells(split, config.seed, with_masks, only)
        if not len(cached):
            continue
        vectors = unit_vectors(cached, target)
        if with_masks:
            is_background = ~flags
        else:
            clusters = find_background(vectors, flags, config.seed) if guess is None else guess.clusters()
            if clusters is None:
                continue
            is_background = clusters.contain(vectors)
        num_channels = vectors.shape[1]
        # exp(kappa <w, f>) N(p; q, spread^2) falls with kappa / 2 times |w - f|^2 + weight |p - q|^2.
        weight = 1 / (config.losses.mixture_kappa * config.decoder.place_spread**2)
        if basis.place_parameter is not None:
            places, images, inside = sample_places(split, config.seed, target, guess, only)
            facing = torch.ones_like(places[:, 0])
            if config.decoder.places == "facing":
                of_objects = vectors[inside], places[inside], images[inside]
                num_images = int(images.max()) + 1
                facing = find_facings(*of_objects, num_images, numbers.parts, weight, config.seed)[images]
            vectors = join(vectors, places * ~is_background[:, None], facing, weight)
        found = find_directions(vectors, is_background, numbers, config.seed, _FIND[config.basis.init])
        if found is None:
            continue
        parts.copy_(found[0][:, :num_channels])
        outside.copy_(found[1][:, :num_channels])
        if basis.place_parameter is not None:
            of_rows = found[0][:, num_channels:] / weight**0.5  # (K * M, 2)
            places_of_class = basis.place_parameter.data.unflatten(0, (-1, numbers.parts))[class_id]
            places_of_class.copy_(of_rows.unflatten(0, (numbers.parts, numbers.each)).mean(1))
