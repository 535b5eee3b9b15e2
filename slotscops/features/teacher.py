"""The frozen teacher: a network of torchvision or timm up to a named layer, and the fingerprint of its tensors.

Shapes: B images of H x W pixels; C channels on an h x w grid (VGG19's relu5_4: 512 on H/16 x W/16).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slotscops.core import pretrained
from slotscops.core.errors import UserError, first_line
from slotscops.core.pixels import normalise_images
from slotscops.core.timm_networks import is_timm
from slotscops.features.timm_layers import TimmLayers
from slotscops.features.torchvision_layers import TorchvisionLayers

_MAX_NEEDED = 1024  # pixels; sizes up to this are tried to find one that a network accepts


class Teacher(nn.Module):
    """Computes features of photos; it is never trained.

    Source: VGG19 is Simonyan and Zisserman (arXiv:1409.1556), configuration E, as torchvision builds it; relu5_4 is its
    `features[:36]`. SCOPS (arXiv:1905.01298) uses relu5_4, and for faces relu5_2 too.
    """

    def __init__(self, layer: str = "relu5_4", weights: str = "imagenet", network: str = "vgg19") -> None:
        """
        Args:
            layer: its name as in `TorchvisionLayers` or `TimmLayers`. Layers joined with `+` are computed together and
                their channels put one after another; maps of coarser grids are first resized to the finest grid.
            weights: `imagenet` or `pretrained` (the network's own), a `.safetensors` or `.pth` state dict under the
                library's names, `package:NAME` or `random:SEED`; see `slotscops.core.pretrained`.
            network: one of torchvision's classification networks by its name there, or `timm/NAME`.

        Raises:
            UserError: no such network or layer, a layer whose output is neither a (B, C, h, w) map nor tokens of a
                square grid, or weights that cannot be loaded or do not fit.
        """
        super().__init__()
        self.layer, self.network = layer, network
        self.layers = _build_layers(network, layer)
        self.mean, self.std = self.layers.mean, self.layers.std
        self.num_channels = sum(channels for channels, *_ in self._check_grids())
        self.weights_name = pretrained.display_name(weights, "pretrained" if is_timm(network) else "imagenet")
        self.is_random = pretrained.random_seed(weights) is not None
        pretrained.fill(self.layers.network, weights, self.layers.pretrained)
        self.fingerprint = pretrained.fingerprint(self.layers.network.state_dict())
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]; normalised here as the network wants it.

        Returns:
            (B, C, h, w) float32, even under autocast, because the cache must not depend on it.
        """
        with torch.autocast(images.device.type, enabled=False):
            maps = self.layers(normalise_images(images, self.mean, self.std))
            finest = max(tuple(one.shape[-2:]) for one in maps)
            return torch.cat([_resize(one, finest) for one in maps], dim=1)  # (B, C, h, w)

    def grid_size(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of a photo of `size` x `size` pixels, the finest grid of all layers.

        Raises:
            UserError: the photo is too small for this layer, or the network accepts only other sizes.
        """
        _, height, width = max(self.layer_shapes(size), key=lambda shape: shape[1])
        return height, width

    def layer_shapes(self, size: int) -> list[tuple[int, int, int]]:
        """(C, h, w) of each layer before they are joined, for a photo of `size` x `size` pixels.

        Raises:
            UserError: as `grid_size`.
        """
        try:
            return _layer_shapes(self.layers, size)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"size {size}: {self._needed_size(size) or first_line(error)}") from None

    def output_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the features of a photo of `size` x `size` pixels."""
        return self.num_channels, *self.grid_size(size)

    def _check_grids(self) -> list[tuple[int, int, int]]:
        size = self.layers.usual_size
        needed = "needed channels on a square grid; take a layer before the classifier"
        try:
            shapes = _layer_shapes(self.layers, size)
        except ValueError as error:
            raise UserError(f"teacher layer {self.layer}: {self.network} gives {error} there, {needed}") from None
        for shape in shapes:
            # Tokens of torchvision's transformers have their channels last, and a classifier's output has no grid.
            if len(shape) != 3 or shape[1] != shape[2] or self.layers.has_tokens_last:
                raise UserError(f"teacher layer {self.layer}: {self.network} gives {shape} there, {needed}")
        return shapes

    def _needed_size(self, size: int) -> str:
        """Advice: the nearest sizes that are multiples of the patches, or the smallest power of two that is enough."""
        patch = self.layers.patch_size
        if size % patch:
            near = [side for side in (size // patch * patch, size // patch * patch + patch) if side]
            return f"{self.network} needs a multiple of {patch} pixels; give {' or '.join(map(str, near))}"
        for enough in (1 << power for power in range(size.bit_length(), _MAX_NEEDED.bit_length())):
            try:
                _layer_shapes(self.layers, enough)
            except (RuntimeError, AssertionError, ValueError):
                continue
            return f"too small for {self.layer}; give at least {enough} pixels"
        return f"{self.network} does not take it; give {self.layers.usual_size} pixels"


def channels_of_layers(network: str, layer: str) -> list[int]:
    """The number of channels of each of the layers that `layer` joins, in order. It needs no weights.

    Raises:
        UserError: there is no such network or layer.
    """
    layers = _build_layers(network, layer)
    return [channels for channels, *_ in _layer_shapes(layers, layers.usual_size)]


def _build_layers(network: str, layer: str) -> TimmLayers | TorchvisionLayers:
    names = layer.split("+")
    return TimmLayers(network, names) if is_timm(network) else TorchvisionLayers(network, names)


def _layer_shapes(layers: TimmLayers | TorchvisionLayers, size: int) -> list[tuple[int, int, int]]:
    """(C, h, w) of each layer for one photo. It runs on the meta device and takes milliseconds."""
    tensors = dict(layers.named_parameters()) | dict(layers.named_buffers())
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    maps = functional_call(layers, state, (torch.empty(1, 3, size, size, device="meta"),))
    return [tuple(one.shape[1:]) for one in maps]


def _resize(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, C, h, w) maps on a finer grid, by bilinear interpolation of cell centres."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return functional.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


@torch.inference_mode()
def compute_features(teacher: Teacher, images: Tensor, size: int) -> Tensor:
    """Computes features of crops on the teacher's device. They do not depend on which device that is.

    Crops are resized on the CPU, since CUDA has no such kernel for uint8 and the one for float gives other numbers. On
    a GPU, convolutions compute in true float32, not in TF32.

    Args:
        images: (B, 3, S, S) uint8 crops, which are first resized to `size` pixels if S differs.

    Returns:
        (B, C, h, w) float32.
    """
    if images.shape[-1] != size:
        on_cpu = images if images.device.type == "cpu" else images.cpu()
        images = functional.interpolate(on_cpu, size=(size, size), mode="bicubic", antialias=True)
    device = next(teacher.parameters()).device
    if images.device != device:
        images = images.to(device)
    with _true_float32() if device.type == "cuda" else nullcontext():
        features: Tensor = teacher(images)
    return features


def _true_float32() -> AbstractContextManager[None]:
    """Inside, cuDNN computes without TF32, and with the same kernels in every run."""
    cudnn = torch.backends.cudnn
    # `flags` switches cuDNN itself off unless told otherwise, and convolutions are then several times as slow.
    flags: AbstractContextManager[None] = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)
    return flags
