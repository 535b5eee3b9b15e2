"""The part basis: one vector of teacher features for each part, and how it is initialised.

Shapes: B images, K parts, C teacher channels, G classes of objects.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import BasisKind, Config
from slotscops.loader.split import Split
from slotscops.model.clusters import find_centres, find_uneven_centres, sample_vectors
from slotscops.model.starts import rows_of_classes
from slotscops.model.target import TargetTransform


class PartBasis(nn.Module):
    """K learned rows of C channels. The part maps times the basis should rebuild the teacher's features.

    Source: SCOPS (arXiv:1905.01298), semantic part basis.
    """

    def __init__(
        self, num_parts: int, feature_channels: int, kind: BasisKind = "relu", num_classes: int | None = None
    ) -> None:
        """
        Args:
            kind: `relu` sets negative numbers to 0; `free` keeps them.
            num_classes: G, if each class of objects has rows of its own. None if all classes share them.
        """
        super().__init__()
        self.num_parts, self.kind, self.num_classes = num_parts, kind, num_classes
        self.basis_parameter = nn.Parameter(torch.randn((num_classes or 1) * num_parts, feature_channels).abs())

    def forward(self, class_ids: Tensor | None = None) -> Tensor:
        """Returns the basis (K, C). If each class has rows of its own, class_ids (B,) are needed; returns (B, K, C)."""
        rows = self.basis_parameter if self.kind == "free" else functional.relu(self.basis_parameter)  # (G * K, C)
        if self.num_classes is None:
            return rows
        assert class_ids is not None, "each class has rows of its own; give class_ids"
        return rows_of_classes(rows.unflatten(0, (self.num_classes, -1)), class_ids)


def needs_features(config: Config) -> bool:
    """Whether the target's scales or the basis start from a sample of the cached features."""
    return config.basis.init != "random" or config.teacher.transform == "channel_standardised"


def start_from_features(basis: PartBasis, target: TargetTransform, split: Split, config: Config) -> None:
    """Initialises the target's scales and the basis from a sample of the cached features.

    The basis holds vectors of the transformed target. The sample and the clusters depend only on the data, the
    settings and `config.seed`.
    """
    if not needs_features(config):
        return
    # If object masks multiply the target, the parts rebuild only features inside the objects.
    inside_objects = config.losses.target_mask == "object"
    vectors = sample_vectors(split, config.seed, inside_objects=inside_objects)
    target.measure(vectors)
    if config.basis.init == "random":
        return
    find = find_centres if config.basis.init == "kmeans" else find_uneven_centres
    for class_id, rows in enumerate(basis.basis_parameter.data.split(basis.num_parts)):
        if basis.num_classes is not None:
            vectors = sample_vectors(split, config.seed, inside_objects=inside_objects, class_id=class_id)
        if len(vectors) >= basis.num_parts:  # A class with fewer vectors than parts keeps its random rows.
            rows.copy_(find(target(vectors), basis.num_parts, config.seed))
