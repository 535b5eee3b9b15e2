"""Refines coarse part maps with the photo, so that their borders move to where the colours change.

Shapes: B images, S slots, H x W pixels, P neighbours of a pixel.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_SMALL = 128  # pixels; smaller photos have the same dilations
_NUM_ITERATIONS = 10
_BANDWIDTH = 0.1  # as a share of the standard deviation of the colours around a pixel
_EPSILON = 1e-8  # avoids division by 0 where all neighbours have one colour; they then get equal weights


def refine_maps(
    maps: Tensor, images: Tensor, num_iterations: int = _NUM_ITERATIONS, dilations: Sequence[int] | None = None
) -> Tensor:
    """Repeatedly replaces each pixel's shares by a mean over its neighbours, weighted by similarity of colour.

        a_ij = softmax over j of  mean over colours of -|I_i - I_j| / (0.1 s_i),    m_i <- sum_j a_ij m_j

    The neighbours j of a pixel are the eight around it, at each of the dilations. s_i is the standard deviation of the
    colours of the pixel and its neighbours. Nothing is trained. The shares still sum to 1 over slots.

    Args:
        maps: (B, S, H, W) soft maps.
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1].
        num_iterations: how often the shares are replaced.
        dilations: distances in pixels from a pixel to its neighbours. The border's pixels repeat beyond the border.
            None takes `dilations_for` the size of the photos.

    Returns:
        (B, S, H, W) float32.

    Source: pixel-adaptive mask refinement (PAMR), Araslanov and Roth (CVPR 2020, arXiv:2005.08104). The bandwidth
    of a tenth of the deviation and the dilations are our choice.
    """
    dilations = dilations_for(maps.shape[-2], maps.shape[-1]) if dilations is None else dilations
    colours = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    with torch.autocast(maps.device.type, enabled=False):
        weights = _affinities(colours, dilations)  # (B, P, H, W)
        refined = maps.float()
        for _ in range(num_iterations):
            total = torch.zeros_like(refined)
            for number, moved in enumerate(_neighbours(refined, dilations)):
                total = total + weights[:, number : number + 1] * moved
            refined = total
    return refined


def dilations_for(height: int, width: int) -> list[int]:
    """Distances to neighbours in pixels: 1, 2, 4, ... up to a sixteenth of the shorter side, which is the last one.

    Photos of up to 128 pixels have 1, 2, 4 and 8, those of 224 pixels also 14. Refined maps therefore look the same at
    any size.
    """
    farthest = max(_SMALL, min(height, width)) // 16
    dilations = [1]
    while 2 * dilations[-1] < farthest:
        dilations.append(2 * dilations[-1])
    return [*dilations, farthest]


def _affinities(colours: Tensor, dilations: Sequence[int]) -> Tensor:
    """(B, P, H, W) weight of each neighbour of a pixel, summing to 1 over P, for colours (B, 3, H, W)."""
    around = torch.stack(list(_neighbours(colours, dilations)), dim=1)  # (B, P, 3, H, W)
    deviation = torch.cat([around, colours[:, None]], dim=1).std(dim=1, keepdim=True)  # (B, 1, 3, H, W)
    likeness = -(around - colours[:, None]).abs() / (_EPSILON + _BANDWIDTH * deviation)
    return likeness.mean(dim=2).softmax(dim=1)


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yields the maps (B, C, H, W) P times, each time shifted so that one neighbour lies on its pixel."""
    height, width = maps.shape[-2:]
    margin = max(dilations)
    padded = functional.pad(maps, (margin,) * 4, mode="replicate")
    for dilation in dilations:
        for down in (-dilation, 0, dilation):
            for across in (-dilation, 0, dilation):
                if down or across:
                    top, left = margin + down, margin + across
                    yield padded[..., top : top + height, left : left + width]
