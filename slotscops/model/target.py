"""What of the teacher's features the parts must rebuild: the features as they are, or with their large values tamed.

Shapes: B images, C teacher channels on an h x w grid, M sampled vectors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import Transform

_EPSILON = 1e-6  # VGG19 gives positions, and channels, that are all zero on real photos


class TargetTransform(nn.Module):
    """Cached features -> target of the semantic loss, on the teacher's own grid.

    none                  f
    sqrt                  sign(f) sqrt |f|
    channel_standardised  f_c / std_c over a sample of the cache; nothing is subtracted, so that what is not
                          negative stays so and a ReLU basis can rebuild it
    l2                    f / |f| at each position
    sqrt_l2               both: sqrt, then to length 1
    """

    scale: Tensor  # (C,) 1 / std of each channel; a buffer, so that a resumed or loaded model has the training's

    def __init__(self, kind: Transform, num_channels: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "channel_standardised":
            self.register_buffer("scale", torch.ones(num_channels))

    @torch.no_grad()
    def measure(self, vectors: Tensor) -> None:
        """Takes the channels' deviations from a sample (M, C) of feature vectors; of no effect on the other kinds."""
        if self.kind == "channel_standardised":
            deviation = vectors.double().std(dim=0, correction=0)  # float64: the same number in any order of sums
            # A channel that never fires in the sample keeps its scale: one stray value must not become a huge target.
            self.scale.copy_(torch.where(deviation > _EPSILON, 1 / deviation.clamp_min(_EPSILON), 1.0))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) of any floating dtype -> (B, C, h, w) float32; or (M, C) -> (M, C)."""
        features = features.float()
        if self.kind in ("sqrt", "sqrt_l2"):
            features = features.sign() * features.abs().sqrt()
        if self.kind == "channel_standardised":
            return features * self.scale.view(-1, *[1] * (features.ndim - 2))
        if self.kind in ("l2", "sqrt_l2"):
            return functional.normalize(features, dim=1, eps=_EPSILON)
        return features
