"""The mixture loss as a pure function: a mixture of von Mises-Fisher distributions, exact at pixel resolution.

Shapes: B images, S slots (slot 0 the background), K = S - 1 parts, M_0 directions of the background, M directions of
each part, D = M_0 + K M directions in total, C teacher channels, logits and features on h x w grids, which may differ
from each other, H x W pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slotscops.model.maps import both_matrices
from slotscops.model.object_frame import Densities

_EPSILON = 1e-6  # a feature vector of zeros stays zero, and is then equally likely in every slot
_MAX_NUMBERS = 2**25  # of the largest tensor: 128 MB. 16 crops of 128 px with 11 directions take 2.9 million numbers


def mixture_loss(
    logits: Tensor,
    features: Tensor,
    parts: Tensor,
    background: Tensor,
    size: tuple[int, int],
    kappa: float = 10.0,
    align_corners: bool = True,
    max_numbers: int = _MAX_NUMBERS,
    densities: Densities | None = None,
) -> Tensor:
    """How unlikely the teacher's features are if each slot has directions and the part maps are the mixing shares.

        L = -1/(B N) sum_b sum_u log sum_s p_bs(u) (1/M_s) sum_m exp(kappa <w_sm, (U f_b)(u)>),   N = H W

    p are the part maps, w the directions and f the features, both scaled to length 1 here, U the bilinear upsampling to
    H x W. The logarithm is largest if every pixel belongs to the one slot whose directions fit best, so the loss needs
    no entropy term. The background has directions of its own and need not rebuild zeros, so features may be negative.

    Because U is linear, <w, U f> = U <w, f>. The inner products are therefore taken on the features' grid, and only D
    maps are upsampled, not C. If these maps hold more than `max_numbers` numbers, the loss is computed for some rows of
    pixels at a time, and again in the backward pass, so that memory does not grow with the number of pixels.

    Args:
        logits: (B, S, h, w) slot logits. The logits and both kinds of directions receive gradients.
        features: (B, C, h, w) teacher features of any floating dtype; their grid may differ from that of the logits.
            They are a target and receive no gradient, even if they require one.
        parts: (K, M, C) directions of the parts, of any length, or (B, K, M, C), others for each image.
        background: (M_0, C) directions of the background, or (B, M_0, C).
        size: H, W in pixels.
        kappa: the concentration, shared by all directions. The larger, the less a direction tolerates other features.
        align_corners: how the two grids are aligned with the pixels, as in `torch.nn.functional.interpolate`.
        max_numbers: the most numbers in a tensor at pixel resolution, but one row of pixels is always computed at once.
        densities: of each slot at each pixel, rows (B, S, H) and columns (B, S, W). If given, what a slot explains in
            the features is multiplied by them, so that of two parts that look alike the one whose place is near counts.

    Returns:
        Scalar in nats, at least -kappa. It is float64 if any of the first four inputs is float64, else float32, even
        under autocast. The normaliser of the distribution is left out: all slots share it, so it is a constant.

    Raises:
        ValueError: if the shapes do not fit each other.

    Source: mixtures of von Mises-Fisher distributions, Banerjee et al. (JMLR 6, 2005), with the mixing shares of each
    pixel predicted by the network. The form at pixel resolution is our own.
    """
    _check_shapes(logits, features, parts, background, size)
    dtype = torch.float32
    for tensor in (logits, features, parts, background):
        dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.autocast(logits.device.type, enabled=False):
        likeness = kappa * _cosines(features.detach().to(dtype), parts.to(dtype), background.to(dtype))
        if densities is not None:
            densities = Densities(*(side.to(dtype) for side in densities))
        total = _sum_over_pixels(
            logits.to(dtype), likeness, parts.shape[-2], size, align_corners, max_numbers, densities
        )
    return -total / (len(logits) * size[0] * size[1])


def _sum_over_pixels(
    logits: Tensor,
    likeness: Tensor,
    num_each: int,
    size: tuple[int, int],
    align_corners: bool,
    max_numbers: int,
    densities: Densities | None,
) -> Tensor:
    """`_log_likelihood` of all pixels, for some rows of pixels at a time if there are many numbers.

    Args:
        logits: (B, S, h, w).
        likeness: (B, D, h, w) kappa <w, f>.
        num_each: M.
    """
    (num_images, num_slots), num_directions = logits.shape[:2], likeness.shape[1]
    down_logits, across_logits = both_matrices(logits.shape[2:], size, align_corners, logits.dtype, logits.device)
    down_features, across_features = both_matrices(likeness.shape[2:], size, align_corners, logits.dtype, logits.device)
    num_background = num_directions - (num_slots - 1) * num_each
    wide = (logits @ across_logits.T, likeness @ across_features.T)  # (B, S, h, W), (B, D, h, W)
    num_rows = max(1, max_numbers // (num_images * max(num_directions, num_slots) * size[1]))
    sums = []
    for first in range(0, size[0], num_rows):
        rows = slice(first, first + num_rows)
        part = None if densities is None else Densities(densities.rows[:, :, rows], densities.columns)
        arguments = (down_logits[rows], down_features[rows], *wide, num_background, num_each, part)
        if num_rows >= size[0]:
            return _log_likelihood(*arguments)
        sums.append(checkpoint(_log_likelihood, *arguments, use_reentrant=False))
    total: Tensor = torch.stack(sums).sum()
    return total


def _cosines(features: Tensor, parts: Tensor, background: Tensor) -> Tensor:
    """(B, D, h, w) inner products of the scaled directions and features, of the background's directions first."""
    directions = torch.cat([background, parts.flatten(-3, -2)], dim=-2)  # (D, C) or (B, D, C)
    directions = functional.normalize(directions, dim=-1, eps=_EPSILON)
    target = functional.normalize(features, dim=1, eps=_EPSILON).flatten(2)  # (B, C, h*w)
    cosines: Tensor = (directions @ target).unflatten(2, features.shape[2:])
    return cosines


def _log_likelihood(
    down_logits: Tensor,
    down_features: Tensor,
    logits: Tensor,
    likeness: Tensor,
    num_background: int,
    num_each: int,
    densities: Densities | None,
) -> Tensor:
    """Sum over images and R rows of pixels of log sum_s p_s (1/M_s) sum_m exp(kappa <w_sm, U f>).

    Args:
        down_logits, down_features: (R, h) shares of the grid's rows in each row of pixels, for both grids.
        logits: (B, S, h, W) as wide as the pixels, but not yet as high.
        likeness: (B, D, h, W) kappa <w, U f>, as wide as the pixels; the background's directions come first.
        num_background: M_0.
        num_each: M.
        densities: of these rows, added to the slots' log likelihoods.
    """
    logits, likeness = down_logits @ logits, down_features @ likeness  # (B, S, R, W), (B, D, R, W)
    of_slots = _of_slots(likeness, num_background, num_each)  # (B, S, R, W)
    if densities is not None:
        of_slots = of_slots + densities.over_grid()
    # log sum_s p_s a_s = logsumexp(l + log a) - logsumexp(l), because p is the softmax of the logits l.
    total: Tensor = ((logits + of_slots).logsumexp(1) - logits.logsumexp(1)).sum()
    return total


def _of_slots(likeness: Tensor, num_background: int, num_each: int) -> Tensor:
    """(B, D, ...) kappa <w, f> -> (B, S, ...) log of the mean over a slot's directions of exp(kappa <w, f>)."""
    of_background = likeness[:, :num_background].logsumexp(1, keepdim=True) - math.log(num_background)
    of_parts = likeness[:, num_background:]  # (B, K M, ...)
    if num_each > 1:
        of_parts = of_parts.unflatten(1, (-1, num_each)).logsumexp(2) - math.log(num_each)
    return torch.cat([of_background, of_parts], dim=1)


def slot_likelihoods(features: Tensor, parts: Tensor, background: Tensor, kappa: float) -> Tensor:
    """How likely each feature is in each slot: (B, S, h, w) logarithms on the features' grid, in float32.

    Args as for `mixture_loss`.
    """
    with torch.autocast(features.device.type, enabled=False):
        likeness = kappa * _cosines(features.float(), parts.float(), background.float())
        return _of_slots(likeness, background.shape[-2], parts.shape[-2])


def _check_shapes(logits: Tensor, features: Tensor, parts: Tensor, background: Tensor, size: tuple[int, int]) -> None:
    shapes = {"logits": logits, "features": features, "parts": parts, "background": background}
    came = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items())
    if logits.ndim != 4 or features.ndim != 4 or len(features) != len(logits):
        raise ValueError(f"{came}: needed logits (B, S, h, w) and features (B, C, h, w) of as many images")
    (num_images, num_slots), num_channels = logits.shape[:2], features.shape[1]
    wanted = (num_slots - 1, parts.shape[-2] if parts.ndim > 1 else 0, num_channels)
    if num_slots < 2 or parts.numel() == 0 or parts.shape not in (wanted, (num_images, *wanted)):
        raise ValueError(f"{came}: needed parts (K, M, C), K one less than the slots and C the features' channels")
    wanted_background = (background.shape[-2] if background.ndim > 1 else 0, num_channels)
    leading = parts.shape[:-3]
    if background.numel() == 0 or background.shape != (*leading, *wanted_background):
        raise ValueError(f"{came}: needed background (M_0, C), or (B, M_0, C) if the parts are those of each image")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size {tuple(size)}: needed height and width in pixels, at least 1")
