"""The target that the parts rebuild: the teacher's features, unchanged or with their large values reduced.

Shapes: B images, C teacher channels on an h x w grid, M sampled vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import Transform

_EPSILON = 1e-6  # on real photos VGG19 has positions and channels that are all zero


class TargetTransform(nn.Module):
    """Turns cached features f into the target of the semantic loss, on the teacher's own grid.

    none                  f
    sqrt                  sign(f) sqrt |f|
    channel_standardised  f_c / std_c, with std_c over a sample of the cache. No mean is subtracted, so that
                          non-negative features stay non-negative and a ReLU basis can rebuild them
    l2                    f / |f| at each position
    sqrt_l2               sqrt first, then l2

    If the features are those of several layers, each layer may have a weight, by which they are multiplied before l2.
    """

    scale: Tensor  # (C,) 1 / std of each channel; a buffer, so that it is saved and loaded with the model
    channel_weights: Tensor  # (C,) the weight of each channel's layer; likewise

    def __init__(self, kind: Transform, num_channels: int, layer_weights: Sequence[float] | None = None) -> None:
        """
        Args:
            layer_weights: the weight of each layer. They act once `weigh_layers` was told which channels are whose.
        """
        super().__init__()
        self.kind = kind
        self.layer_weights = layer_weights
        if layer_weights is not None:
            self.register_buffer("channel_weights", torch.ones(num_channels))
        if kind == "channel_standardised":
            self.register_buffer("scale", torch.ones(num_channels))

    def weigh_layers(self, channels_of_layers: Sequence[int]) -> None:
        """Sets the weight of each channel, for the number of channels of each layer, in order."""
        assert self.layer_weights is not None
        weights = torch.tensor(self.layer_weights).repeat_interleave(torch.tensor(channels_of_layers))  # (C,)
        self.channel_weights.copy_(weights)

    @torch.no_grad()
    def measure(self, vectors: Tensor) -> None:
        """Measures the channels' deviations on (M, C) feature vectors. It does nothing for the other kinds."""
        if self.kind == "channel_standardised":
            # In float64, so that the order of summation does not change the float32 result.
            deviation = vectors.double().std(dim=0, correction=0)
            # A channel that is constant in the sample keeps scale 1, so that a rare value cannot become a huge target.
            self.scale.copy_(torch.where(deviation > _EPSILON, 1 / deviation.clamp_min(_EPSILON), 1.0))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) features or (M, C) vectors of any floating dtype -> the same shape in float32."""
        features = features.float()
        if self.kind in ("sqrt", "sqrt_l2"):
            features = features.sign() * features.abs().sqrt()
        if self.kind == "channel_standardised":
            features = features * _along_channels(self.scale, features)
        if self.layer_weights is not None:
            features = features * _along_channels(self.channel_weights, features)
        if self.kind in ("l2", "sqrt_l2"):
            return functional.normalize(features, dim=1, eps=_EPSILON)
        return features


def _along_channels(numbers: Tensor, features: Tensor) -> Tensor:
    """(C,) -> a view that is multiplied with the channels of features (B, C, h, w) or (M, C)."""
    return numbers.view(-1, *[1] * (features.ndim - 2))
