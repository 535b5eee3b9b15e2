"""The loss terms of Choudhury et al. as pure functions. They compute in float32, even under autocast.

Shapes: B images, K parts, C teacher channels on an h x w grid, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.model.maps import averaging_matrix

_EPSILON = 1e-8  # keeps the mean of a part without mass finite


def part_contrast(part_maps: Tensor, features: Tensor, class_ids: Tensor, temperature: float) -> Tensor:
    """Contrastive loss: the mean feature of a part should resemble that of the same part in another photo.

        z_bk = sum_u p_bk(u) f_b(u) / sum_u p_bk(u),  then to length 1
        L = mean over b, k of  -log( exp(z_bk . z_b'k / t) / sum_j exp(z_bk . z_b'j / t) )

    Photos 2i and 2i + 1 of the batch form a fixed pair and are compared in both directions. If each process holds an
    even number of photos, it holds whole pairs. The mean over processes is then the mean over the whole batch, and no
    features have to be exchanged. A pair of photos of different classes contributes 0 and still counts in the mean.

    Args:
        part_maps: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        features: (B, C, h, w) teacher features; no gradient. The maps are averaged down to their grid.
        class_ids: (B,) integer class of each photo.
        temperature: t in the equation.

    Returns:
        Scalar between 0 and log K + 2 / t.

    Raises:
        ValueError: if the number of images is odd.

    Source: after Choudhury et al. (NeurIPS 2021), contrastive loss over parts of different images. The fixed pairs
    and the two directions are our choice. We have not yet compared this with the paper's equation.
    """
    num_images = len(part_maps)
    if num_images % 2:
        raise ValueError(f"{num_images} images: part contrast needs pairs, an even number")
    with torch.autocast(part_maps.device.type, enabled=False):
        dtype = torch.promote_types(part_maps.dtype, torch.float32)
        sizes = zip(part_maps.shape[2:], features.shape[2:], strict=True)
        down, across = (averaging_matrix(pixels, cells, dtype, part_maps.device) for pixels, cells in sizes)
        shares = (down @ (part_maps.to(dtype) @ across.T)).flatten(2)  # (B, K, h*w)
        target = features.detach().to(dtype).flatten(2)  # (B, C, h*w)
        means = shares @ target.mT / (shares.sum(2, keepdim=True) + _EPSILON)  # (B, K, C)
        means = functional.normalize(means, dim=2, eps=_EPSILON)
        products = means[0::2] @ means[1::2].mT / temperature  # (B/2, K, K)
        # The softmax is over the parts of the first photo, then over those of the second. The diagonal pairs each part
        # with itself.
        there, back = (-products.log_softmax(dim).diagonal(dim1=1, dim2=2) for dim in (1, 2))  # (B/2, K)
        counts = (class_ids[0::2] == class_ids[1::2]).to(dtype)[:, None]  # (B/2, 1)
        mean: Tensor = ((there + back) / 2 * counts).mean()
    return mean


def visual_consistency(part_maps: Tensor, images: Tensor) -> Tensor:
    """How much the colours vary within each part.

        L = 1/(B H W) sum_bk sum_u p_bk(u) |I_b(u) - m_bk|^2,   m_bk = sum_u p_bk(u) I_b(u) / sum_u p_bk(u)

    Args:
        part_maps: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1].

    Returns:
        Scalar in [0, 3/4], in squared units of the colour range.

    Source: after Choudhury et al. (NeurIPS 2021), visual consistency loss. We have not yet compared this
    with the paper's equation.
    """
    with torch.autocast(part_maps.device.type, enabled=False):
        dtype = torch.promote_types(part_maps.dtype, torch.float32)
        colours = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        shares, colours = part_maps.to(dtype).flatten(2), colours.flatten(2)  # (B, K, H*W), (B, 3, H*W)
        mass = shares.sum(2) + _EPSILON  # (B, K)
        means = shares @ colours.mT / mass[:, :, None]  # (B, K, 3)
        # This computes sum p |I - m|^2 without a B x K x 3 x H x W tensor.
        # A product with a single column would be a matrix product of inner size 1 in the backward pass.
        squares = (shares * colours.square().sum(1, keepdim=True)).sum(2)  # (B, K)
        spread: Tensor = (squares - mass * means.square().sum(2)).sum() / (len(part_maps) * shares.shape[2])
    return spread
