"""Layers of torchvision's classification networks, which are cut after the last layer that is needed.

torchvision is imported where a network is built, because commands that only read a cache need none of it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slotscops.core.errors import UserError, suggest
from slotscops.core.pixels import IMAGENET_MEAN, IMAGENET_STD

# These expect another scaling of pixels; with this option torchvision converts it inside the network.
_OPTIONS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


class TorchvisionLayers(nn.Module):
    """The maps of some layers of a torchvision network. Its tensors lie on the meta device until weights are loaded."""

    usual_size = 224  # pixels; a size that every torchvision network accepts
    patch_size = 1  # sides of photos need not be multiples of anything
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, network: str, layers: Sequence[str]) -> None:
        """
        Args:
            network: one of torchvision's classification networks by its name there.
            layers: for a VGG `conv{block}_{n}`, `bn{block}_{n}`, `relu{block}_{n}` or `pool{block}`; for any other
                network the module's path, such as `layer4` or `features.7`.

        Raises:
            UserError: there is no such network or layer.
        """
        from torchvision.models import get_model_weights

        super().__init__()
        whole = _build(network)
        nodes = _nodes_by_name(whole, network)
        self._nodes = [_find(nodes, name, network) for name in layers]
        self.network = _cut(whole, self._nodes)
        self.has_tokens_last = network.startswith(("swin", "vit"))
        known = get_model_weights(network)
        self.pretrained = getattr(known, "IMAGENET1K_V1", None) or known.DEFAULT

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> the output of each layer, (B, C, h, w)."""
        maps: Mapping[str, Tensor] = self.network(images)
        return [maps[node] for node in self._nodes]


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
