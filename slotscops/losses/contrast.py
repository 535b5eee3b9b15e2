"""The loss terms of Choudhury et al. as pure functions. They compute in float32, even under autocast.

Shapes: B images, N photos of the whole batch, K parts, C teacher channels on an h x w grid, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.core.pixels import rgb_to_lab
from slotscops.losses.gathering import Gather, keep_own
from slotscops.model.maps import averaging_matrix

_EPSILON = 1e-8  # keeps the mean of a part without mass finite


def part_contrast(
    part_maps: Tensor, features: Tensor, class_ids: Tensor, temperature: float, gather: Gather = keep_own
) -> Tensor:
    """Contrastive loss: the mean feature of a part resembles that of the same part in another photo of the batch.

        z_bk = sum_u p_bk(u) f_b(u) / sum_u p_bk(u),  then to length 1
        e_bk = exp(z_bk . z_b'k / t)
        L = -1/(N K) sum_bk log( e_bk / (e_bk + sum_i sum_{j != k} exp(z_bk . z_ij / t)) )

    b' is one other photo. The sum over i covers all photos of the batch, b itself included, so that the parts of one
    photo are pushed apart too. In a batch of several classes both b' and i are photos of the same class as b. A photo
    that is alone with its class contributes 0 and still counts in the mean.

    Args:
        part_maps: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        features: (B, C, h, w) teacher features; no gradient. The maps are averaged down to their grid.
        class_ids: (B,) integer class of each photo.
        temperature: t in the equation.
        gather: gives the photos of the whole batch. The mean over processes is then the loss of the whole batch.

    Returns:
        Scalar between 0 and log(1 + N (K - 1)) + 2 / t, where N is the number of photos in the batch.

    Source: Choudhury et al. (NeurIPS 2021), equations 1 and 3. They choose b' at random. The order of photos in a batch
    is random already, so we take the next one, and the first after the last. They do not say whether z is scaled; we
    scale it, so that t means the same for every teacher. They sum over b and k, and we take the mean.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        mine = part_features(part_maps, features)  # (B, K, C)
        everyone, first = gather(mine)  # (N, K, C)
        classes, _ = gather(class_ids)  # (N,)
        num_images, num_photos, num_parts = len(mine), len(everyone), mine.shape[1]
        products = mine.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # (B * K, N * K)
        products = products.view(num_images, num_parts, num_photos, num_parts)
        is_same_class = class_ids[:, None] == classes  # (B, N)
        # How many places after the photo each other one comes, going on from the first photo after the last.
        own = torch.arange(first, first + num_images, device=mine.device)
        after = (torch.arange(num_photos, device=mine.device) - own[:, None]) % num_photos  # (B, N), 0 for itself
        after = torch.where(is_same_class & (after > 0), after, num_photos)
        nearest = after.amin(dim=1, keepdim=True)  # (B, 1)
        has_partner = nearest < num_photos
        is_partner = (after == nearest) & has_partner  # (B, N)
        is_same_part = torch.eye(num_parts, dtype=torch.bool, device=mine.device)[:, None]  # (K, 1, K)
        of_class, of_partner = is_same_class[:, None, :, None], is_partner[:, None, :, None]  # (B, 1, N, 1)
        counts = torch.where(is_same_part, of_partner, of_class)  # (B, K, N, K)
        # The smallest number, not minus infinity: the gradient stays finite where nothing counts.
        log_sums = products.masked_fill(~counts, torch.finfo(products.dtype).min).flatten(2).logsumexp(2)  # (B, K)
        partners = (products.diagonal(dim1=1, dim2=3) * is_partner[:, :, None]).sum(1)  # (B, K) z_bk . z_b'k / t
        mean: Tensor = ((log_sums - partners) * has_partner).mean()
    return mean


def part_features(part_maps: Tensor, features: Tensor) -> Tensor:
    """(B, K, C) mean features of each part, scaled to length 1; zeros for a part without mass. See `part_contrast`."""
    dtype = torch.promote_types(part_maps.dtype, torch.float32)
    sizes = zip(part_maps.shape[2:], features.shape[2:], strict=True)
    down, across = (averaging_matrix(pixels, cells, dtype, part_maps.device) for pixels, cells in sizes)
    shares = (down @ (part_maps.to(dtype) @ across.T)).flatten(2)  # (B, K, h*w)
    target = features.detach().to(dtype).flatten(2)  # (B, C, h*w)
    means = shares @ target.mT / (shares.sum(2, keepdim=True) + _EPSILON)  # (B, K, C)
    return functional.normalize(means, dim=2, eps=_EPSILON)


def visual_consistency(part_maps: Tensor, images: Tensor) -> Tensor:
    """How much the colours vary within each part.

        L = 1/(B H W) sum_bk sum_u p_bk(u) |I_b(u) - m_bk|^2,   m_bk = sum_u p_bk(u) I_b(u) / sum_u p_bk(u)

    Args:
        part_maps: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1].

    Returns:
        Scalar in [0, 3/4], in squared units of the colour range.

    Source: Choudhury et al. (NeurIPS 2021), equation 4, but in RGB and divided by the area of the crop. Small objects
    therefore weigh less than large ones; see `visual_consistency_lab`.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        dtype = torch.promote_types(part_maps.dtype, torch.float32)
        colours = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        spread, _ = _spread_and_area(part_maps.to(dtype), colours)
        mean: Tensor = spread.sum() / (len(part_maps) * part_maps.shape[2] * part_maps.shape[3])
    return mean


def visual_consistency_lab(part_maps: Tensor, images: Tensor, masks: Tensor | None = None) -> Tensor:
    """How much the colours vary within each part, as the eye sees them, on average over the foreground.

        L = 1/B sum_b  sum_k sum_u p_bk(u) |I_b(u) - m_bk|^2 / sum_k sum_u p_bk(u),   m_bk as in `visual_consistency`

    Args:
        part_maps: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1]. They are converted to CIE Lab, divided by 100.
        masks: (B, H, W) bool, True inside the object. If given, only pixels inside count. The divisor is the area of
            the mask if the parts fill it, as they do in the paper.

    Returns:
        Scalar, at least 0: the mean squared distance in Lab, where 1 is the distance of black and white. An image whose
        parts have no mass contributes 0.

    Source: Choudhury et al. (NeurIPS 2021), equation 4. They divide by the area of the true foreground, which we know
    only if masks are given; without, we divide by the area that the parts take.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        dtype = torch.promote_types(part_maps.dtype, torch.float32)
        shares = part_maps.to(dtype)
        if masks is not None:
            shares = shares * masks[:, None]
        spread, area = _spread_and_area(shares, rgb_to_lab(images).to(dtype) / 100)
        mean: Tensor = (spread.sum(1) / area.sum(1)).mean()
    return mean


def _spread_and_area(part_maps: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) sum_u p_bk(u) |I_b(u) - m_bk|^2 and (B, K) sum_u p_bk(u), which is kept above 0.

    Args:
        part_maps: (B, K, H, W).
        colours: (B, 3, H, W) in the same dtype.
    """
    shares, colours = part_maps.flatten(2), colours.flatten(2)  # (B, K, H*W), (B, 3, H*W)
    mass = shares.sum(2) + _EPSILON  # (B, K)
    means = shares @ colours.mT / mass[:, :, None]  # (B, K, 3)
    # This computes sum p |I - m|^2 without a B x K x 3 x H x W tensor.
    # A product with a single column would be a matrix product of inner size 1 in the backward pass.
    squares = (shares * colours.square().sum(1, keepdim=True)).sum(2)  # (B, K)
    return squares - mass * means.square().sum(2), mass
