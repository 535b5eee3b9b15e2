"""The frozen teacher: a torchvision classification network up to a named layer, and the fingerprint of its tensors.

torchvision is imported where a teacher is built, because commands that only read a cache need none of it.

Shapes: B images of H x W pixels; C channels on an h x w grid (VGG19's relu5_4: 512 on H/16 x W/16).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slotscops.config import suggest
from slotscops.core import pretrained
from slotscops.core.errors import UserError, first_line
from slotscops.core.pixels import normalise_images

_USUAL_SIZE = 224  # pixels; a size that every torchvision network accepts
# These expect another scaling of pixels; with this option torchvision converts it inside the network.
_OPTIONS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


class Teacher(nn.Module):
    """Computes features of photos; it is never trained.

    Source: VGG19 is Simonyan and Zisserman (arXiv:1409.1556), configuration E, as torchvision builds it; relu5_4 is its
    `features[:36]`. SCOPS (arXiv:1905.01298) uses relu5_4, and for faces relu5_2 too.
    """

    def __init__(self, layer: str = "relu5_4", weights: str = "imagenet", network: str = "vgg19") -> None:
        """
        Args:
            layer: for a VGG `conv{block}_{n}`, `bn{block}_{n}`, `relu{block}_{n}` or `pool{block}`; for any other
                network the module's path, such as `layer4` or `features.7`. Layers of one grid are joined with `+`.
            weights: `imagenet` (torchvision's own), a `.safetensors` or `.pth` state dict under torchvision's names, or
                `random:SEED`.
            network: one of torchvision's classification networks by its name there.

        Raises:
            UserError: no such network or layer, a layer whose output is no (B, C, h, w) map, layers of different
                grids, or weights that cannot be loaded or do not fit.
        """
        from torchvision.models import get_model_weights

        super().__init__()
        whole = _build(network)
        nodes = _nodes_by_name(whole, network)
        self.layer = layer
        self.network = network
        self._nodes = [_find(nodes, name, network) for name in layer.split("+")]
        self.extractor = _cut(whole, self._nodes)
        self.num_channels = sum(channels for channels, *_ in self._check_grids())
        self.weights_name = pretrained.display_name(weights)
        self.is_random = pretrained.random_seed(weights) is not None
        known = get_model_weights(network)
        pretrained.fill(self.extractor, weights, getattr(known, "IMAGENET1K_V1", None) or known.DEFAULT)
        self.fingerprint = pretrained.fingerprint(self.extractor.state_dict())
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """
        Args:
            images: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]; normalised here.

        Returns:
            (B, C, h, w) float32, even under autocast, because the cache must not depend on it.
        """
        with torch.autocast(images.device.type, enabled=False):
            maps = self.extractor(normalise_images(images))
        if len(self._nodes) == 1:
            only: Tensor = maps[self._nodes[0]]
            return only  # (B, C, h, w)
        return torch.cat([maps[node] for node in self._nodes], dim=1)  # (B, C, h, w)

    def grid_size(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of a photo of `size` x `size` pixels.

        Raises:
            UserError: the photo is too small for this layer, or the network accepts only another size.
        """
        try:
            _, height, width = self._shapes(size)[0]
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"size {size}: {self._needed_size(size) or first_line(error)}") from None
        return height, width

    def output_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the features of a photo of `size` x `size` pixels."""
        return self.num_channels, *self.grid_size(size)

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        """(C, h, w) of each layer for one photo. It runs on the meta device and takes milliseconds."""
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.extractor.state_dict().items()}
        photo = torch.empty(1, 3, size, size, device="meta")
        maps: Mapping[str, Tensor] = functional_call(self.extractor, state, (photo,))
        return [tuple(maps[node].shape[1:]) for node in self._nodes]

    def _check_grids(self) -> list[tuple[int, ...]]:
        shapes = self._shapes(_USUAL_SIZE)
        for shape in shapes:
            # A transformer's tokens have their channels last, and a classifier's output has no grid.
            if len(shape) != 3 or shape[1] != shape[2] or self.network.startswith(("swin", "vit")):
                raise UserError(
                    f"teacher layer {self.layer}: {self.network} gives {shape} there, needed channels on a square "
                    "grid; take a layer of a convolutional network before its classifier"
                )
        if len({shape[1:] for shape in shapes}) > 1:
            grids = ", ".join(f"{height} x {width}" for _, height, width in shapes)
            raise UserError(
                f"teacher layer {self.layer}: grids differ ({grids} at {_USUAL_SIZE} pixels); join layers of one grid"
            )
        return shapes

    def _needed_size(self, size: int) -> str:
        """Advice: the smallest power of two that is enough, or the usual size if no smaller one is accepted."""
        for enough in (1 << power for power in range(size.bit_length(), 9)):
            try:
                self._shapes(enough)
            except (RuntimeError, AssertionError):
                continue
            return f"too small for {self.layer}; give at least {enough} pixels"
        return f"{self.network} does not take it; give {_USUAL_SIZE} pixels"


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
    precise = torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else nullcontext()
    with precise:
        features: Tensor = teacher(images)
    return features


def _build(network: str) -> nn.Module:
    """Builds the network on the meta device, because most of its weights, such as a classifier's, are never needed."""
    import torchvision
    from torchvision.models import get_model, list_models

    names = list_models(module=torchvision.models)
    if network not in names:
        hint = suggest(network, names) or "; give vgg19, vgg16, resnet50 or another of torchvision.models"
        raise UserError(f"teacher network '{network}': torchvision has no such classification network{hint}")
    options = {"init_weights": False} if network.startswith("vgg") else _OPTIONS.get(network, {})
    with torch.device("meta"):
        module: nn.Module = get_model(network, weights=None, **options)
    return module.eval()


def _nodes_by_name(module: nn.Module, network: str) -> dict[str, str]:
    """User's name of each layer -> torchvision's name of it."""
    if network.startswith("vgg"):
        assert isinstance(module.features, nn.Sequential)
        return {name: f"features.{number}" for number, name in enumerate(_name_vgg_layers(module.features))}
    from torchvision.models.feature_extraction import get_graph_node_names

    _, paths = get_graph_node_names(module)
    nodes: dict[str, str] = {}
    for path in paths[1:]:  # the first node is the input
        steps = path.split(".")
        nodes |= {prefix: prefix for prefix in (".".join(steps[:end]) for end in range(1, len(steps) + 1))}
    return nodes


def _name_vgg_layers(modules: nn.Sequential) -> list[str]:
    """The names of VGG's modules in the papers, in order: conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1, ..."""
    names: list[str] = []
    block, number = 1, 0
    for module in modules:
        if isinstance(module, nn.Conv2d):
            number += 1
            names.append(f"conv{block}_{number}")
        elif isinstance(module, nn.BatchNorm2d):
            names.append(f"bn{block}_{number}")
        elif isinstance(module, nn.ReLU):
            names.append(f"relu{block}_{number}")
        else:
            names.append(f"pool{block}")
            block, number = block + 1, 0
    return names


def _find(nodes: Mapping[str, str], name: str, network: str) -> str:
    if name in nodes:
        return nodes[name]
    names = list(nodes)
    hint = suggest(name, names) or f"; give one of {names[0]} ... {names[-1]}"
    raise UserError(f"teacher layer '{name}': {network} has no such layer{hint}")


def _cut(module: nn.Module, nodes: Sequence[str]) -> nn.Module:
    """Cuts the network after the layers and keeps its parameter names. The output maps layer -> feature map."""
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor: nn.Module = create_feature_extractor(module, list(nodes))
    for part in extractor.modules():
        # torchvision's activations overwrite their input, which is wrong if that input is one of the layers.
        vars(part).update({"inplace": False} if "inplace" in vars(part) else {})
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked = None  # a count of training steps, which is missing in older files
    return extractor.eval()
