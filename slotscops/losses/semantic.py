"""The semantic consistency loss of SCOPS as a pure function, computed exactly at pixel resolution.

Shapes: B images, S slots (slot 0 the background), K = S - 1 parts, C teacher channels, logits and features on
h x w grids, which may differ from each other, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.core.constants import made_once
from slotscops.model.maps import both_matrices, interpolation_matrix, part_maps


def semantic_consistency(
    logits: Tensor,
    features: Tensor,
    basis: Tensor,
    size: tuple[int, int],
    mask: Tensor | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Mean squared error between the features that the parts rebuild and the teacher's, at pixel resolution.

        L = 1/(B H W C) sum |P W - m U f|^2

    P are the part maps, W the basis, U the bilinear upsampling to H x W, f the features, m the mask. Because U is
    linear, we can compute the same number without a tensor of B C H W numbers:

        sum |P W - m U f|^2 = <W W^T, P P^T> - 2 <U^T m P, W f> + sum m^2 |U f|^2.

    The three terms are summed separately, so the rounding error is relative to the largest of them, not to L.

    Args:
        logits: (B, S, h, w) slot logits. Both the logits and the basis receive gradients.
        features: (B, C, h, w) teacher features of any floating dtype; their grid may differ from that of the logits.
            They are a target and receive no gradient, even if they require one.
        basis: (K, C) part basis, after its ReLU if it has one, or (B, K, C), one for each image.
        size: H, W in pixels.
        mask: (B, H, W) or (B, 1, H, W), bool or floating weights. As in SCOPS it multiplies the target only,
            so outside the mask the parts have to rebuild zeros. It receives no gradient.
        align_corners: how the two grids are aligned with the pixels, as in `torch.nn.functional.interpolate`.

    Returns:
        Scalar, in squared units of the features. It is float64 if any of the first three inputs is float64, else
        float32, even under autocast.

    Raises:
        ValueError: if the shapes do not fit each other, or the mask is neither bool nor floating point.

    Source: SCOPS (arXiv:1905.01298), semantic consistency loss. The low-rank form is our own.
    """
    _check_shapes(logits, features, basis, size, mask)
    dtype = torch.float32
    for tensor in (logits, features, basis):
        dtype = torch.promote_types(dtype, tensor.dtype)
    (height, width), num_channels = size, features.shape[1]
    with torch.autocast(logits.device.type, enabled=False):
        target = features.detach().to(dtype)  # (B, C, h, w)
        weights = None if mask is None else mask.detach().reshape(-1, 1, height, width).to(dtype)  # (B, 1, H, W)
        rows = basis.to(dtype)  # (K, C) or (B, K, C)
        maps = part_maps(logits.to(dtype), size, align_corners)[:, 1:]  # (B, K, H, W)

        pixels = maps.flatten(2)  # (B, K, H*W)
        shares = pixels @ pixels.mT  # (B, K, K)
        rebuilt = ((shares.sum(0) if rows.ndim == 2 else shares) * (rows @ rows.mT)).sum()
        overlap = (rows @ target.flatten(2)).unflatten(2, target.shape[2:])  # (B, K, h, w)
        masked = maps if weights is None else maps * weights
        agreement = (_gather_onto_grid(masked, target.shape[2:], align_corners) * overlap).sum()
        total = rebuilt - 2 * agreement + _target_energy(target, size, weights, align_corners)
        mean: Tensor = total / (len(features) * num_channels * height * width)
    return mean


def _gather_onto_grid(maps: Tensor, grid: tuple[int, ...], align_corners: bool) -> Tensor:
    """Computes U^T maps, (..., H, W) -> (..., h, w). U^T is the adjoint of bilinear upsampling."""
    height, width = maps.shape[-2:]
    down, across = both_matrices(grid, (height, width), align_corners, maps.dtype, maps.device)
    return (down.T @ maps) @ across


@torch.no_grad()
def _target_energy(features: Tensor, size: tuple[int, int], weights: Tensor | None, align_corners: bool) -> Tensor:
    """Sum of m^2 |U f|^2 over images, pixels and channels.

    Without weights it is <U^T U f, f>, and U^T U separates into one matrix for each axis.

    With weights it is summed from inner products of neighbouring grid cells. Along one axis a pixel mixes cells i and
    i + 1 with shares a_i and a_i+1. Its squared norm is therefore sum_i a_i^2 <f_i, f_i> + 2 a_i a_i+1 <f_i, f_i+1>.
    This is linear in the products, and the two axes separate.

    Args:
        features: (B, C, h, w).
        weights: (B, 1, H, W) mask m, or None for all ones.
    """
    (height, width), (h, w) = size, features.shape[2:]
    like = (align_corners, features.dtype, features.device)
    if weights is None:
        squared: Tensor = _overlaps(h, height, *like) @ (features @ _overlaps(w, width, *like))  # U^T U f
        return (squared * features).sum()
    pairs_down, pairs_across = _pair_shares(h, height, *like), _pair_shares(w, width, *like)  # (H, 2h), (W, 2w)
    pair_weights = pairs_down.T @ weights[:, 0].square() @ pairs_across  # (B, 2h, 2w)
    return (pair_weights * _neighbour_products(features)).sum()


@made_once
def _overlaps(in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(in, in) matrix M^T M of the interpolation matrix M along one axis."""
    matrix = interpolation_matrix(in_size, out_size, align_corners, torch.float64, device)
    return (matrix.T @ matrix).to(dtype)


@made_once
def _pair_shares(in_size: int, out_size: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(out, 2 in) shares of pairs of cells in each pixel: a_i^2 for (i, i), then 2 a_i a_i+1 for (i, i + 1)."""
    matrix = interpolation_matrix(in_size, out_size, align_corners, dtype, device)  # (out, in)
    with_next = functional.pad(2 * matrix[:, :-1] * matrix[:, 1:], (0, 1))
    return torch.cat([matrix.square(), with_next], dim=1)


def _neighbour_products(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 2h, 2w) inner products over C of each cell with its neighbours.

    The four h x w blocks are: with itself (top left), with the cell to the right (top right), with the cell below
    (bottom left), and the mean of the two diagonal products (bottom right).
    """
    padded = functional.pad(features, (0, 1, 0, 1))
    here, right = padded[:, :, :-1, :-1], padded[:, :, :-1, 1:]
    below, diagonal = padded[:, :, 1:, :-1], padded[:, :, 1:, 1:]
    # The two diagonals of a 2 x 2 square of cells have the same shares, so their mean is enough.
    crossed = ((here * diagonal).sum(1) + (below * right).sum(1)) / 2
    upper = torch.cat([(here * here).sum(1), (here * right).sum(1)], dim=2)
    lower = torch.cat([(here * below).sum(1), crossed], dim=2)
    return torch.cat([upper, lower], dim=1)


def _check_shapes(logits: Tensor, features: Tensor, basis: Tensor, size: tuple[int, int], mask: Tensor | None) -> None:
    if logits.ndim != 4 or logits.shape[1] < 2:
        raise ValueError(f"logits {_shape(logits)}: needed (B, S, h, w) with a background and at least one part")
    num_images, num_slots = logits.shape[:2]
    if features.ndim != 4 or len(features) != num_images:
        raise ValueError(f"features {_shape(features)}: needed ({num_images}, C, h, w) beside logits {_shape(logits)}")
    wanted = (num_slots - 1, features.shape[1])
    if basis.shape not in (wanted, (num_images, *wanted)):
        raise ValueError(
            f"basis {_shape(basis)}: needed {wanted}, one row for each part and one column for each channel"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size {tuple(size)}: needed height and width in pixels, at least 1")
    if mask is None:
        return
    if mask.shape not in ((num_images, *size), (num_images, 1, *size)):
        raise ValueError(f"mask {_shape(mask)}: needed {(num_images, *size)} or {(num_images, 1, *size)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask of {mask.dtype}: needed bool or floating weights, so that 255 is not taken for a weight"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
