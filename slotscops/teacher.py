"""The frozen teacher: VGG19 up to a named layer, and the fingerprint of the tensors it uses.

Shapes: B images of H x W pixels; C channels on an h x w grid (relu5_4: 512 on H/16 x W/16).
"""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import VGG19_Weights, vgg19

from slotscops import weights as weight_files
from slotscops.errors import UserError
from slotscops.images import normalise_images


class Teacher(nn.Module):
    """VGG19 features of photos, never trained.

    Source: Simonyan and Zisserman (arXiv:1409.1556), configuration E, as torchvision builds it; relu5_4 is its
    `features[:36]`. SCOPS (arXiv:1905.01298) takes relu5_4, and relu5_2 with it for faces.
    """

    def __init__(self, layer: str = "relu5_4", weights: str = "imagenet") -> None:
        """
        Args:
            layer: `conv{block}_{n}`, `relu{block}_{n}` or `pool{block}`; several of one grid joined with `+`.
            weights: `imagenet` (torchvision's own), a `.safetensors` or `.pth` state dict with torchvision's
                `features.0.weight` ..., or `random:SEED`.

        Raises:
            UserError: no such layer, layers of different grids, or weights that cannot be had or do not fit.
        """
        super().__init__()
        with torch.device("meta"):  # the classifier's 120 million numbers are not needed, so never made
            modules: nn.Sequential = vgg19(init_weights=False).features
        names = _name_layers(modules)
        self.layer = layer
        self._positions = [_find(names, name) for name in layer.split("+")]
        self._halvings = _common_halvings(modules, self._positions, layer)
        self.features = modules[: max(self._positions) + 1]
        self._keep_convolutions()
        self.num_channels = sum(_num_channels(modules, position) for position in self._positions)
        self.weights_name = weight_files.display_name(weights)
        self.is_random = weight_files.random_seed(weights) is not None
        weight_files.fill(self, weights, VGG19_Weights.IMAGENET1K_V1)
        self.fingerprint = weight_files.fingerprint(self.state_dict())
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]; normalised here.

        Returns:
            (B, C, h, w) float32, whatever autocast says: a cache must not depend on where it was computed.
        """
        taken: dict[int, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            maps = normalise_images(images)  # (B, 3, H, W)
            for position, module in enumerate(self.features):
                maps = module(maps)
                if position in self._positions:
                    taken[position] = maps
        if len(self._positions) == 1:
            return maps  # (B, C, h, w)
        return torch.cat([taken[position] for position in self._positions], dim=1)  # (B, C, h, w)

    def grid_size(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of a photo of `size` x `size` pixels.

        Raises:
            UserError: the photo is so small that nothing is left.
        """
        side = size >> self._halvings
        if side == 0:
            raise UserError(f"size {size}: too small for {self.layer}; give at least {1 << self._halvings} pixels")
        return side, side

    def output_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the features of a photo of `size` x `size` pixels."""
        return self.num_channels, *self.grid_size(size)

    def _keep_convolutions(self) -> None:
        # torchvision's ReLU writes over its input, which is wrong where that input was asked for.
        for position in self._positions:
            if position + 1 < len(self.features):
                following = self.features[position + 1]
                if isinstance(following, nn.ReLU):
                    following.inplace = False


def _name_layers(modules: nn.Sequential) -> list[str]:
    """The papers' names of VGG's modules, in their order: conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1, ..."""
    names: list[str] = []
    block, number = 1, 0
    for module in modules:
        if isinstance(module, nn.Conv2d):
            number += 1
            names.append(f"conv{block}_{number}")
        elif isinstance(module, nn.ReLU):
            names.append(f"relu{block}_{number}")
        else:
            names.append(f"pool{block}")
            block, number = block + 1, 0
    return names


def _find(names: Sequence[str], name: str) -> int:
    if name in names:
        return names.index(name)
    close = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {close[0]}?" if close else f"give one of {names[0]} ... {names[-1]}, such as relu5_4"
    raise UserError(f"teacher layer {name!r}: VGG19 has no such layer; {advice}")


def _common_halvings(modules: nn.Sequential, positions: Sequence[int], layer: str) -> int:
    """How often the grid was halved on the way to the layers."""
    halvings = [sum(isinstance(module, nn.MaxPool2d) for module in modules[: position + 1]) for position in positions]
    if len(set(halvings)) > 1:
        strides = ", ".join(str(1 << number) for number in halvings)
        raise UserError(f"teacher layer {layer}: grids differ (every {strides} pixels); join layers of one grid only")
    return halvings[0]


def _num_channels(modules: nn.Sequential, position: int) -> int:
    convolutions = [module for module in modules[: position + 1] if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels
