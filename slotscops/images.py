"""Pixels on their way into an ImageNet network: the one place for channel order, range and normalisation.

Shapes: B images, H x W pixels.
"""

import torch
from torch import Tensor

# RGB mean and standard deviation of ImageNet, pixels in [0, 1]: what torchvision's networks were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise_images(images: Tensor) -> Tensor:
    """Pixels as torchvision's ImageNet networks want them: (p - mean) / std for each colour.

    Args:
        images: (B, 3, H, W) RGB, uint8 in 0..255 or floating point in [0, 1].

    Returns:
        (B, 3, H, W) float32.
    """
    assert images.dtype == torch.uint8 or images.is_floating_point(), images.dtype
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    # Colour by colour with plain numbers: a mean tensor would have to be copied to the GPU, which waits for it.
    colours = [
        (pixels[:, channel] - mean) / std
        for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    ]
    return torch.stack(colours, dim=1)
