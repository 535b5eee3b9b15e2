"""Terms of Choudhury et al. as pure functions, in float32 also under autocast.

Shapes: B images, K parts, C teacher channels on an h x w grid, H x W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-8  # keeps the mean of a part without mass finite


def part_contrast(parts: Tensor, features: Tensor, class_ids: Tensor, temperature: float) -> Tensor:
    """Whether a part's mean feature in one photo is nearer to the same part's in another than to other parts'.

        z_bk = sum_u p_bk(u) f_b(u) / sum_u p_bk(u),  then to length 1
        L = mean over b, k of  -log( exp(z_bk . z_b'k / t) / sum_j exp(z_bk . z_b'j / t) )

    Photos are compared in fixed pairs, 2i with 2i + 1 of the order given, each in both directions. A share of the
    batch that holds an even number of photos holds whole pairs, so the mean over processes is that of the whole batch
    and no features have to travel. A pair of two classes counts 0, in the mean too.

    Args:
        parts: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        features: (B, C, h, w) teacher features; no gradient. The maps are averaged down to their grid.
        class_ids: (B,) whole numbers.
        temperature: t.

    Returns:
        Scalar, 0 to log K + 2 / t.

    Raises:
        ValueError: an odd number of images.

    Source: after Choudhury et al. (NeurIPS 2021), contrastive loss over parts of different images. The fixed pairs
    and both directions are ours; not yet compared with the paper's equation.
    """
    num_images, num_parts = parts.shape[:2]
    if num_images % 2:
        raise ValueError(f"{num_images} images: part contrast needs pairs, an even number")
    with torch.autocast(parts.device.type, enabled=False):
        dtype = torch.promote_types(parts.dtype, torch.float32)
        shares = functional.adaptive_avg_pool2d(parts.to(dtype), (features.shape[2], features.shape[3])).flatten(
            2
        )  # (B, K, h*w)
        target = features.detach().to(dtype).flatten(2)  # (B, C, h*w)
        means = shares @ target.mT / (shares.sum(2, keepdim=True) + _EPSILON)  # (B, K, C)
        means = functional.normalize(means, dim=2, eps=_EPSILON)
        products = means[0::2] @ means[1::2].mT / temperature  # (B/2, K, K)
        same = torch.arange(num_parts, device=parts.device).expand(num_images // 2, -1)  # (B/2, K)
        there = functional.cross_entropy(products, same, reduction="none")  # softmax over dim 1: from the second photo
        back = functional.cross_entropy(products.mT, same, reduction="none")
        counts = (class_ids[0::2] == class_ids[1::2]).to(dtype)[:, None]  # (B/2, 1)
        mean: Tensor = ((there + back) / 2 * counts).mean()
    return mean


def visual_consistency(parts: Tensor, images: Tensor) -> Tensor:
    """How much the colours differ within a part.

        L = 1/(B H W) sum_bk sum_u p_bk(u) |I_b(u) - m_bk|^2,   m_bk = sum_u p_bk(u) I_b(u) / sum_u p_bk(u)

    Args:
        parts: (B, K, H, W) soft part maps, background dropped. They receive gradients.
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1].

    Returns:
        Scalar in [0, 3/4], in squared units of the colour range.

    Source: after Choudhury et al. (NeurIPS 2021), visual consistency; not yet compared with the paper's equation.
    """
    with torch.autocast(parts.device.type, enabled=False):
        dtype = torch.promote_types(parts.dtype, torch.float32)
        colours = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        shares, colours = parts.to(dtype).flatten(2), colours.flatten(2)  # (B, K, H*W), (B, 3, H*W)
        mass = shares.sum(2) + _EPSILON  # (B, K)
        means = shares @ colours.mT / mass[:, :, None]  # (B, K, 3)
        # sum p |I - m|^2 without the B x K x 3 x H x W tensor.
        squares = (shares @ colours.square().sum(1, keepdim=True).mT)[:, :, 0]  # (B, K)
        spread: Tensor = (squares - mass * means.square().sum(2)).sum() / (len(parts) * shares.shape[2])
    return spread
