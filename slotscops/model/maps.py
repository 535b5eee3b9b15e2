"""Part maps at pixel resolution: upsamples the logits bilinearly, then takes the softmax over slots.

Shapes: B images, S slots (slot 0 the background), logits on an h x w grid, H x W pixels.
"""

from functools import lru_cache

import torch
from torch import Tensor

from slotscops.core.constants import made_once

# Enough for all pairs of sizes in one run: rows and columns of logits and features, in training and evaluation.
_CACHED_MATRICES = 64


def part_maps(logits: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """The share of each slot in each pixel: the softmax over slots of the upsampled logits.

    Args:
        logits: (B, S, h, w) slot logits.
        size: H, W in pixels.

    Returns:
        (B, S, H, W) in [0, 1], summing to 1 over slots. float64 for float64 logits, else float32, even under autocast.

    Source: SCOPS (arXiv:1905.01298).
    """
    with torch.autocast(logits.device.type, enabled=False):
        return upsample(logits, size, align_corners).softmax(dim=1)


def upsample(maps: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """Bilinear upsampling, (..., h, w) -> (..., H, W), in at least float32. Call it with autocast switched off."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    # Two matrix products are 5 times as fast as F.interpolate, forward and backward (8 x 6 maps from 8 x 8 to
    # 128 x 128, on two CPU cores). We widen the small grid first, so that the larger product has long rows.
    down, across = both_matrices(maps.shape[-2:], size, align_corners, dtype, maps.device)
    return down @ (maps.to(dtype) @ across.T)


def interpolation_matrix(
    in_size: int,
    out_size: int,
    align_corners: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bilinear interpolation along one axis as a matrix.

        x(o) = o (in - 1) / (out - 1)                  with align_corners
        x(o) = max(0, (o + 1/2) in / out - 1/2)        without
        M[o, floor x] = 1 - (x - floor x),   M[o, floor x + 1] = x - floor x

    Returns:
        (out_size, in_size), rows sum to 1. It gives the result of `torch.nn.functional.interpolate` without
        antialiasing. All callers share one cached tensor, so do not write to it.

    Raises:
        ValueError: if a size is below 1.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"interpolation from {in_size} to {out_size}: both sizes must be at least 1")
    return _interpolation_matrix(in_size, out_size, align_corners, dtype, torch.device(device))


@lru_cache(maxsize=_CACHED_MATRICES)
def _interpolation_matrix(
    in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # Training cannot use tensors made in inference mode, and the first caller may be an evaluation.
    with torch.inference_mode(False), torch.no_grad():
        output = torch.arange(out_size, device="cpu")
        # x is a fraction of integers, so that a position at the centre of a cell is exact.
        if align_corners:
            numerator, denominator = output * (in_size - 1), max(out_size - 1, 1)
        else:
            numerator, denominator = ((2 * output + 1) * in_size - out_size).clamp_min(0), 2 * out_size
        left = numerator // denominator
        right = (left + 1).clamp_max(in_size - 1)
        share = (numerator - left * denominator).double() / denominator
        matrix = torch.zeros(out_size, in_size, dtype=torch.float64, device="cpu")
        matrix[output, left] += 1 - share
        matrix[output, right] += share  # at the far edge left and right are the same cell, which gets both shares
        return matrix.to(device, dtype)


@made_once
def averaging_matrix(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(out, in) means over windows along one axis: output o averages the inputs from o in / out to (o + 1) in / out.

    Both ends are rounded outwards, as in `torch.nn.functional.adaptive_avg_pool2d`, whose gradient on a GPU is not the
    same in every run.
    """
    output, inputs = torch.arange(out_size, device=device)[:, None], torch.arange(in_size, device=device)
    window = (inputs >= output * in_size // out_size) & (inputs < -(-(output + 1) * in_size // out_size))
    return (window.double() / window.sum(dim=1, keepdim=True)).to(dtype)


def both_matrices(
    grid: tuple[int, ...], size: tuple[int, int], align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The interpolation matrices (H, h) for rows and (W, w) for columns, from a grid (h, w) to a size (H, W)."""
    (h, w), (height, width) = grid, size
    return (
        interpolation_matrix(h, height, align_corners, dtype, device),
        interpolation_matrix(w, width, align_corners, dtype, device),
    )
