"""Encoders: a ResNet or a network of timm that reads photos, or a pass-through of cached teacher features.

torchvision and timm are imported where a network is built, because that takes seconds that training on cached features
can save.

Shapes: B images of H x W pixels; C channels on an h x w grid (17 x 17 at 128 pixels, 29 x 29 at 224).
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slotscops.core import pretrained
from slotscops.core.errors import UserError, first_line
from slotscops.core.pixels import normalise_images
from slotscops.core.timm_networks import TimmWeights, build_timm, mean_and_std
from slotscops.features.compact import project

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_NUM_STAGES = 4
_STAGE_NUMBER = re.compile(r"\b(?:blocks|stages|layers|layer)[._]?(\d+)\.")  # in the names of timm's parameters


class Encoder(nn.Module):
    """Base class of encoders, which return (B, C, h, w) maps with C = `out_channels`."""

    out_channels: int
    takes_features: bool  # True if the input is cached teacher features, False if it is photos


class FeatureEncoder(Encoder):
    """Uses cached teacher features as the encoding. It needs neither a backbone nor photos.

    If the cache holds components of the features, it also keeps the matrix that makes them. The matrix is saved with
    the model, so that the features of a new photo can be projected as those of the cache were.
    """

    projection: Tensor | None  # (C, D); None if the features have all of the teacher's channels

    def __init__(self, num_channels: int, projection: Tensor | None = None) -> None:
        super().__init__()
        self.out_channels = num_channels
        self.takes_features = True
        self.register_buffer("projection", projection)  # one that is None is not saved

    def project(self, features: Tensor) -> Tensor:
        """(B, C, h, w) float32 features of the teacher -> (B, D, h, w), as the cache holds them."""
        return project(features, self.projection)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) features of any floating point type -> the same features as float32."""
        return features.float()  # (B, C, h, w)


class ResNetEncoder(Encoder):
    """ResNet trunk at stride 8 as in DeepLab, with ceil-mode max-pool, dilated layer3 and layer4, frozen BatchNorm.

    Sources: He et al. (arXiv:1512.03385); DeepLab (arXiv:1606.00915), atrous convolution.
    """

    def __init__(self, name: str = "resnet50", weights: str | None = "imagenet", frozen_stages: int = 0) -> None:
        """
        Args:
            name: resnet18, resnet34, resnet50 or resnet101.
            weights: `imagenet` (torchvision's own), a `.safetensors` or `.pth` state dict under torchvision's names,
                `random:SEED`, or None to fill all tensors with zeros because a checkpoint is loaded right after.
            frozen_stages: the stem and this many of the four stages are not trained. 0: everything is trained.

        Raises:
            UserError: if there is no such network or stage, or the weights cannot be obtained or do not fit.
        """
        super().__init__()
        if name not in _RESNETS:
            raise UserError(f"encoder {name!r}: no such network; give one of {', '.join(_RESNETS)}")
        if not 0 <= frozen_stages <= _NUM_STAGES:
            raise UserError(f"frozen_stages {frozen_stages}: a ResNet has {_NUM_STAGES}; give 0 to {_NUM_STAGES}")
        self.trunk = _build_trunk(name)
        self.takes_features = False
        self.out_channels = 512 if name in ("resnet18", "resnet34") else 2048
        self.is_random = False
        if weights is None:
            _fill_with_zeros(self.trunk)
        else:
            pretrained.fill(self.trunk, weights, _imagenet_weights(name))
            seed = pretrained.random_seed(weights)
            self.is_random = seed is not None
            if seed is not None:
                measure_statistics(self.trunk, seed)
        for module in self.trunk.modules():
            if isinstance(module, FrozenBatchNorm):
                module.refresh()
        if frozen_stages:
            last = list(self.trunk._modules).index(f"layer{frozen_stages}")
            self.trunk[: last + 1].requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB, uint8 or floating point in [0, 1] -> (B, C, h, w). Normalises the photos itself."""
        encoded: Tensor = self.trunk(normalise_images(images))
        return encoded  # (B, C, h, w)

    def grid_size(self, size: int) -> tuple[int, int]:
        """(h, w) of the encoding of a photo of `size` x `size` pixels."""
        side = (size + 1) // 2  # conv1: 128 -> 64
        side = side // 2 + 1  # max-pool in ceil mode: 64 -> 33
        side = (side + 1) // 2  # layer2: 33 -> 17
        return side, side


class TimmEncoder(Encoder):
    """The last map of a network of timm, with that network's own normalisation of photos.

    A convolutional network is dilated to an output stride of 8, or 16, where timm offers it, and its BatchNorm is
    frozen. A transformer gives the tokens of its last block on the grid of its patches, and takes photos of any size
    that is a multiple of them.
    """

    def __init__(self, name: str, weights: str | None = "pretrained", frozen_stages: int = 0) -> None:
        """
        Args:
            name: `timm/NAME`.
            weights: as for `ResNetEncoder`, with timm's own weights and names of tensors.
            frozen_stages: the stem and this many of the first stages or blocks are not trained.

        Raises:
            UserError: timm or the network or the stage is missing, or the weights cannot be had or do not fit.
        """
        super().__init__()
        from timm.layers.norm_act import freeze_batch_norm_2d

        last_map: dict[str, Any] = {"features_only": True, "out_indices": (-1,)}
        choices: list[dict[str, Any]] = [{"output_stride": 8}, {"output_stride": 16}, {"dynamic_img_size": True}, {}]
        self.name = name
        trunk = build_timm(name, *(last_map | choice for choice in choices))
        self.takes_features = False
        self.out_channels = int(trunk.feature_info.channels()[-1])  # type: ignore[operator, union-attr]
        self.has_channels_last = str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
        self.mean, self.std = mean_and_std(name)
        self.is_random = weights is not None and pretrained.random_seed(weights) is not None
        if weights is None:
            _fill_with_zeros(trunk)
        else:
            whole = build_timm(name)
            pretrained.fill(whole, weights, TimmWeights(name))
            trunk.load_state_dict(_tensors_of_maps(name, trunk.state_dict(), whole.state_dict()))
        self.trunk: nn.Module = freeze_batch_norm_2d(trunk)  # type: ignore[no-untyped-call]
        depths = self.parameter_depths()
        if frozen_stages and frozen_stages >= max(depths.values()):
            raise UserError(f"frozen_stages {frozen_stages}: {name} has {max(depths.values())} stages; give fewer")
        for own, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen_stages or depths[own] > frozen_stages)

    @torch.no_grad()
    def check_size(self, size: int) -> None:
        """Raises a UserError if the network takes no photos of `size` x `size` pixels."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        errors = (RuntimeError, AssertionError, ValueError)
        try:  # without values, which takes milliseconds
            functional_call(self, shapes, (torch.empty(1, 3, size, size, device="meta"),))
        except errors:
            try:  # it may be that it makes tensors of its own, with values
                self(torch.zeros(1, 3, size, size))
            except errors as error:
                raise UserError(
                    f"data.size is {size}, which encoder.name {self.name} does not take ({first_line(error)}); make "
                    "shards of another size, or choose another encoder"
                ) from None

    def parameter_depths(self) -> dict[str, int]:
        """The stage or block of each parameter, from 1; 0 for what comes before the first one."""
        numbers = {name: _STAGE_NUMBER.search(name) for name, _ in self.named_parameters()}
        first = min((int(found[1]) for found in numbers.values() if found), default=0)
        return {name: int(found[1]) - first + 1 if found else 0 for name, found in numbers.items()}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB, uint8 or floating point in [0, 1] -> (B, C, h, w). Normalises the photos itself."""
        encoded: Tensor = self.trunk(normalise_images(images, self.mean, self.std))[-1]
        return encoded.permute(0, 3, 1, 2) if self.has_channels_last else encoded  # (B, C, h, w)


def _tensors_of_maps(network: str, own: Iterable[str], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of timm's `features_only` network by its own names, out of those of the whole network.

    timm puts some networks into `model` or `body`, and writes `stages_0` where the whole network has `stages.0`.

    Raises:
        UserError: if one of them has no counterpart in the whole network.
    """
    by_letters = {name.replace(".", "_"): tensor for name, tensor in whole.items()}
    found = {}
    for name in own:
        inner = next((name.removeprefix(start) for start in ("model.", "body.") if name.startswith(start)), name)
        tensor = by_letters.get(inner.replace(".", "_"), by_letters.get(name.replace(".", "_")))
        if tensor is None:
            raise UserError(f"encoder {network}: the whole network has no tensor {name} of its maps; choose another")
        found[name] = tensor
    return found


class FrozenBatchNorm(nn.Module):
    """BatchNorm with fixed statistics and parameters, as torchvision's FrozenBatchNorm2d, under the same tensor names.

        y = x * scale + shift,   scale = weight / sqrt(running_var + eps),   shift = bias - running_mean * scale

    Two things differ. Scale and shift are computed once; torchvision computes them in every forward pass, which costs
    five kernel launches on a GPU for each of the 53 layers of a ResNet-50. And the output has the type of the input;
    torchvision's float32 scale turns bfloat16 maps into float32 maps, which doubles the memory of training. Scale and
    shift are kept in bfloat16 too, because casting them would be two launches for each layer.
    """

    weight: Tensor  # these four are (C,)
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    scale: Tensor  # these four are (C, 1, 1)
    shift: Tensor
    scale_bf16: Tensor
    shift_bf16: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        for name in ("scale", "shift", "scale_bf16", "shift_bf16"):  # not saved: they follow from the other buffers
            self.register_buffer(name, torch.zeros(num_features, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(_drop_batch_count)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_refresh_after_loading)  # type: ignore[no-untyped-call]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes scale and shift anew. Call it after changing another buffer; `load_state_dict` calls it itself."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        self.scale, self.shift = scale[:, None, None], shift[:, None, None]
        self.scale_bf16, self.shift_bf16 = self.scale.bfloat16(), self.shift.bfloat16()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), a fixed scale and shift for each channel."""
        is_low = maps.dtype == torch.bfloat16
        scale, shift = (self.scale_bf16, self.shift_bf16) if is_low else (self.scale, self.shift)
        scale, shift = scale.to(maps.dtype), shift.to(maps.dtype)
        # The compiler fuses the plain operators. A function of our own would be a graph within the graph for it, which
        # not every version can cut where DDP needs it.
        if torch.compiler.is_compiling() or not (maps.requires_grad and torch.is_grad_enabled()):
            return torch.addcmul(shift, maps, scale)
        normalised: Tensor = _ScaleAndShift.apply(maps, scale, shift)
        return normalised


class _ScaleAndShift(torch.autograd.Function):
    """maps * scale + shift with fixed scale and shift. The gradient is one product, one kernel launch on a GPU.

    Autograd's own gradient of `addcmul` multiplies scale by a constant first, which costs two more.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, maps, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale, None, None


def _drop_batch_count(_: nn.Module, tensors: dict[str, Any], prefix: str, *__: object) -> None:
    """Weights of a plain BatchNorm also count its batches, which a frozen one does not."""
    tensors.pop(f"{prefix}num_batches_tracked", None)


def _refresh_after_loading(norm: nn.Module, _: object) -> None:
    assert isinstance(norm, FrozenBatchNorm)
    norm.refresh()


def _imagenet_weights(name: str) -> Any:
    """torchvision's first ImageNet weights, because only these exist for all four networks."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).IMAGENET1K_V1


def _build_trunk(name: str) -> nn.Sequential:
    """torchvision's ResNet without pooling and classifier, on the meta device, with torchvision's tensor names."""
    import torchvision

    with torch.device("meta"):
        resnet = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm)
    resnet.maxpool.ceil_mode = True
    _dilate(resnet.layer3, 2)
    _dilate(resnet.layer4, 4)
    return nn.Sequential(OrderedDict(part for part in resnet.named_children() if part[0] not in ("avgpool", "fc")))


def _dilate(stage: nn.Module, dilation: int) -> None:
    """Replaces a stage's stride of 2 by convolutions with the given dilation.

    The outputs that the strided stage computed stay the same bit for bit, and new outputs come in between. The
    convolution that had the stride gets half the dilation, which is that of the stage before, because the grid of its
    input has not become finer. torchvision's `replace_stride_with_dilation` does the same, but only for networks of
    bottleneck blocks.
    """
    for convolution in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
        had_stride = convolution.stride == (2, 2)
        convolution.stride = (1, 1)
        if convolution.kernel_size == (3, 3):
            rate = dilation // 2 if had_stride else dilation
            convolution.dilation = convolution.padding = (rate, rate)


def _fill_with_zeros(trunk: nn.Module) -> None:
    trunk.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in trunk.state_dict(keep_vars=True).values():
            tensor.zero_()


# ---- random weights, for tests and the offline toy ---------------------------------------------------------------


@torch.no_grad()
def measure_statistics(trunk: nn.Sequential, seed: int) -> None:
    """Sets the mean and variance of each BatchNorm to those of its input, for noise that roughly resembles photos.

    Without such statistics, which random weights lack, each residual block would double the variance. They are
    measured once and in float64, so that the number of threads cannot change the float32 result.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, FrozenBatchNorm)
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.refresh()

    handles = [
        module.register_forward_pre_hook(measure) for module in trunk.modules() if isinstance(module, FrozenBatchNorm)
    ]
    trunk.double()
    trunk(torch.stack(list(_noise_octaves(seed))).sum(dim=0).double())
    trunk.float()
    for handle in handles:
        handle.remove()


def _noise_octaves(seed: int, num_images: int = 8, size: int = 48) -> Iterator[Tensor]:
    """Yields (B, 3, size, size) noise, from plain colours to single pixels. The sum varies like normalised photos.

    Each image has its own strength of each octave. With the same strengths for all images, the statistics fit that one
    spectrum only: the output of a ResNet-50 then had a standard deviation of 480 for white noise and 60 for real
    photos. With a strength for each image, these are 3 and 2.
    """
    generator = torch.Generator().manual_seed(seed)
    for side in (1, 2, 4, 8, 16, 32, size):
        strength = torch.rand(num_images, 1, 1, 1, generator=generator) * 2
        coarse = (torch.rand(num_images, 3, side, side, generator=generator) - 0.5) * strength * 2
        yield functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
