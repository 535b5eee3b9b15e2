"""Layers of timm's networks: maps of convolutional networks, and tokens, keys, queries or values of transformers.

Shapes: B images of H x W pixels; C channels on an h x w grid of N = h w positions; P tokens of the whole image (class
and register tokens), which are dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slotscops.core.errors import UserError, suggest
from slotscops.core.timm_networks import TimmWeights, build_timm, mean_and_std, usual_size

_PROJECTIONS = ("q", "k", "v")


class _LastLayerReached(Exception):
    """Ends a forward pass once all layers that are needed have been computed."""


class TimmLayers(nn.Module):
    """The maps of some layers of a timm network."""

    has_tokens_last = False  # tokens are put on their grid here

    def __init__(self, network: str, layers: Sequence[str]) -> None:
        """
        Args:
            network: `timm/NAME`, where NAME may end in a tag, such as `vit_small_patch14_dinov2.lvd142m`.
            layers: paths of modules, such as `blocks.8`. `X.q`, `X.k` and `X.v` are the queries, keys and values of the
                attention X, such as `blocks.10.attn.k`.

        Raises:
            UserError: timm is not installed, or there is no such network or layer.
        """
        super().__init__()
        # With dynamic_img_size, a transformer resizes its position encodings to the grid of the photo.
        self.network = build_timm(network, {"dynamic_img_size": True}).eval()
        self.mean, self.std = mean_and_std(network)
        self.pretrained = TimmWeights(network)
        self.patch_size = _patch_size(self.network)
        self.usual_size = 16 * self.patch_size if self.patch_size > 1 else min(224, usual_size(network))
        self._layers = [_find(self.network, layer, network) for layer in layers]
        _keep_inputs_unchanged(self.network)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> the output of each layer, (B, C, h, w)."""
        outputs: list[Tensor | None] = [None] * len(self._layers)

        def hook(place: int, take: Callable[[Any], Any]) -> Callable[[nn.Module, Any, Any], None]:
            def keep(_: nn.Module, __: Any, output: Any) -> None:
                outputs[place] = take(output)
                # An exported graph holds only what its outputs need, and tracing does not follow the exception.
                if all(output is not None for output in outputs) and not torch.compiler.is_compiling():
                    raise _LastLayerReached

            return keep

        handles = [
            self.network.get_submodule(path).register_forward_hook(hook(place, take))
            for place, (path, take) in enumerate(self._layers)
        ]
        try:
            self.network(images)
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        # `len` would fix the number of images in an exported graph.
        return [self._to_map(output, images.shape[0]) for output in outputs]

    def _to_map(self, output: Any, num_images: int) -> Tensor:
        """(B, C, h, w) from a map in either order of axes, or from (B, P + N, C) tokens of a square photo.

        Raises:
            ValueError: the output is neither.
        """
        # The batch differs where attention is computed in windows.
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or output.shape[0] != num_images:
            kind = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{kind}")
        if output.ndim == 4:
            is_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            maps: Tensor = output.permute(0, 3, 1, 2) if is_last else output
            return maps
        tokens: Tensor = output[:, getattr(self.network, "num_prefix_tokens", 0) :]  # (B, N, C)
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1] or not side:
            raise ValueError(f"{tokens.shape[1]} tokens, which form no square")
        on_grid: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return on_grid


def _find(module: nn.Module, layer: str, network: str) -> tuple[str, Callable[[Any], Any]]:
    """The path of the module that computes the layer, and what to take of its output."""
    paths = [path for path, _ in module.named_modules() if path]
    if layer in paths:
        return layer, lambda output: output
    attention, _, projection = layer.rpartition(".")
    if projection in _PROJECTIONS:
        if f"{attention}.{projection}_proj" in paths:
            return f"{attention}.{projection}_proj", lambda output: output
        if f"{attention}.qkv" in paths:
            place = _PROJECTIONS.index(projection)
            return f"{attention}.qkv", lambda output: output.chunk(3, dim=-1)[place]
    attentions = [path.rpartition(".")[0] for path in paths if path.endswith((".qkv", ".k_proj"))]
    known = paths + [f"{path}.{projection}" for path in attentions for projection in _PROJECTIONS]
    hint = suggest(layer, known) or "; give a block such as blocks.8, or its keys blocks.8.attn.k"
    raise UserError(f"teacher layer '{layer}': {network} has no such layer{hint}")


def _patch_size(module: nn.Module) -> int:
    """Side of a transformer's patches in pixels; 1 for a convolutional network."""
    size = getattr(getattr(module, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple) else size)


def _keep_inputs_unchanged(module: nn.Module) -> None:
    """Activations may overwrite their input, which is wrong if that input is one of the layers."""
    for part in module.modules():
        if isinstance(getattr(part, "inplace", None), bool):
            part.inplace = False  # type: ignore[assignment]
