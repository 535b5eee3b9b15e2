"""Loss terms that need no features of the teacher, as pure functions in float32, even under autocast.

Each term over images but `presence` is the mean over B of a number computed for each image alone. If processes hold
equally many images, the mean over processes is therefore the mean over the whole batch.

Shapes: B images, S slots (slot 0 the background), K = S - 1 parts, C teacher channels, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.losses.gathering import Gather, keep_own
from slotscops.model.maps import upsample

_WINDOW = 3  # cells on each side of the window of `presence`
_EPSILON = 1e-8  # avoids division by 0 for a part without mass or a row of zeros


def part_centres(part_maps: Tensor) -> Tensor:
    """The centre of mass of each part.

        c_bk = sum_yx p_bk(y,x) (x, y) / sum_yx p_bk(y,x)

    Args:
        part_maps: (B, K, H, W) soft part maps in [0, 1].

    Returns:
        (B, K, 2) mean x and y, [-1, 1] across the image. A part without mass gets 0, the middle of the image.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        part_maps = _at_least_float32(part_maps)
        x, y = _axes(part_maps)
        mass = part_maps.sum((2, 3)) + _EPSILON  # (B, K)
        return torch.stack([(part_maps.sum(2) * x).sum(2), (part_maps.sum(3) * y).sum(2)], dim=2) / mass[:, :, None]


def concentration(part_maps: Tensor) -> Tensor:
    """How far each part spreads around its own centre, averaged over parts and images.

        L = 1/(B K) sum_bk  sum_yx p_bk(y,x) |(y,x) - c_bk|^2 / sum_yx p_bk(y,x)

    Args:
        part_maps: (B, K, H, W) soft part maps in [0, 1], background already dropped.

    Returns:
        Scalar, in squared half-image units ([-1, 1] across the image). A part without mass contributes 0.

    Source: SCOPS (arXiv:1905.01298), geometric concentration loss. Their code divides by B twice; we do not.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        part_maps = _at_least_float32(part_maps)
        x, y = _axes(part_maps)
        centres = part_centres(part_maps)  # (B, K, 2)
        # We do not use E x^2 - (E x)^2, because subtracting two nearly equal numbers loses precision.
        across = (part_maps.sum(2) * (x - centres[:, :, :1]).square()).sum(2)  # (B, K)
        down = (part_maps.sum(3) * (y - centres[:, :, 1:]).square()).sum(2)
        mean: Tensor = ((across + down) / (part_maps.sum((2, 3)) + _EPSILON)).mean()
    return mean


def entropy(maps: Tensor) -> Tensor:
    """How undecided the pixels are, averaged over pixels and images.

        L = -1/(B H W) sum_byx sum_s p_bs(y,x) log p_bs(y,x)

    Args:
        maps: (B, S, H, W) soft maps that sum to 1 over slots, background included.

    Returns:
        Scalar in nats, from 0 (every pixel belongs to one slot) to log S.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = _at_least_float32(maps)
        mean: Tensor = -torch.special.xlogy(maps, maps.clamp_min(_EPSILON)).sum(1).mean()
    return mean


def presence(part_maps: Tensor, gather: Gather = keep_own) -> Tensor:
    """How far the parts are from being seen at all: each should be sure of some small region of some photo.

        L = 1 - 1/K sum_k  max over photos and cells of  a_bk(y,x),   a_bk the mean of p_bk over 3 x 3 cells

    A part need not be in every photo, but in one of the batch. A single cell is not enough for it.

    Args:
        part_maps: (B, K, h, w) soft part maps in [0, 1] on the grid of the logits, background dropped.
        gather: gives the photos of the whole batch. Every process then has the loss of the whole batch.

    Returns:
        Scalar in [0, 1], 0 if each part is sure of a window in some photo.

    Source: PDiscoFormer (arXiv:2407.04538), presence loss of the parts. Theirs of the background is not included.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        part_maps = _at_least_float32(part_maps)
        window = [min(_WINDOW, side) for side in part_maps.shape[2:]]
        largest = functional.avg_pool2d(part_maps, window, stride=1).amax((0, 2, 3))  # (K,)
        mean: Tensor = 1 - gather(largest[None]).everyone.amax(0).mean()
    return mean


def total_variation(maps: Tensor) -> Tensor:
    """How long and how sharp the borders between the slots are, over cells and images.

        L = 1/(B h w) sum_bs sum_yx |p_bs(y+1,x) - p_bs(y,x)| + |p_bs(y,x+1) - p_bs(y,x)|

    Unlike `concentration` it does not mind if a part has several regions.

    Args:
        maps: (B, S, h, w) soft maps on the grid of the logits, background included.

    Returns:
        Scalar in [0, 4), 0 if every map is constant.

    Source: PDiscoFormer (arXiv:2407.04538), total variation loss.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = _at_least_float32(maps)
        num_images, _, height, width = maps.shape
        total: Tensor = maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()
    return total / (num_images * height * width)


def background_cross_entropy(logits: Tensor, masks: Tensor, align_corners: bool = True) -> Tensor:
    """How far the background's map is from the complement of the object mask.

        L = -1/(B H W) sum_byx  m_b(y,x) log(1 - p_b0(y,x)) + (1 - m_b(y,x)) log p_b0(y,x)

    It is computed from the upsampled logits, so that it is finite and has a gradient where p_b0 rounds to 0 or 1.

    Args:
        logits: (B, S, h, w) slot logits. They receive gradients.
        masks: (B, H, W) bool, True inside the object.
        align_corners: how the grid is aligned with the pixels, as in `torch.nn.functional.interpolate`.

    Returns:
        Scalar in nats, 0 if background and object are told apart exactly and surely.

    Source: the binary cross-entropy. It takes the place of the zeros that SCOPS puts outside its saliency map.
    """
    with torch.autocast(logits.device.type, enabled=False):
        height, width = masks.shape[-2:]
        logits = upsample(logits, (height, width), align_corners)  # (B, S, H, W)
        wanted = torch.where(masks, logits[:, 1:].logsumexp(1), logits[:, 0])  # (B, H, W)
        mean: Tensor = (logits.logsumexp(1) - wanted).mean()
    return mean


def orthonormality(basis: Tensor) -> Tensor:
    """How far the rows of the basis, scaled to length 1, are from being orthogonal to each other.

        L = 1/K^2 |w w^T - I|_F^2,   w_k = W_k / |W_k|

    Args:
        basis: (K, C) part basis, or (B, K, C), one for each image. The loss is then the mean over images.

    Returns:
        Scalar in [0, 1]. A row of zeros stays a row of zeros and does not give NaN.

    Source: SCOPS (arXiv:1905.01298), orthonormal constraint. They sum over the K^2 products; we take the mean.
    """
    with torch.autocast(basis.device.type, enabled=False):
        rows = functional.normalize(_at_least_float32(basis), dim=-1, eps=_EPSILON)
        products = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
        mean: Tensor = products.square().mean()
    return mean


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _axes(part_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates x (W,) and y (H,) of the pixels: -1 at the centre of the first pixel, 1 at that of the last one."""
    height, width = part_maps.shape[-2:]
    return (
        torch.linspace(-1, 1, width, dtype=part_maps.dtype, device=part_maps.device),
        torch.linspace(-1, 1, height, dtype=part_maps.dtype, device=part_maps.device),
    )
