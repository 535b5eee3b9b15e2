"""The decoder: turns each slot on its own into a map of logits by broadcasting it over a small grid.

Shapes: B images, S slots, D slot dimension, G x G decoder grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import DecoderKind
from slotscops.model.slots import SoftPositionEncoding

DILATIONS = (6, 12, 18, 24)


class DilatedHead(nn.Module):
    """The sum of four parallel 3x3 convolutions with different dilations.

    On an 8 x 8 grid, only the centre taps of dilations 12, 18 and 24 ever see anything but padding. The other taps are
    not computed, and the centre taps are added up to one 1x1 convolution.

    Source: DeepLab (arXiv:1606.00915), ASPP-L. SCOPS (arXiv:1905.01298) uses it as its head.
    """

    def __init__(self, in_channels: int, out_channels: int = 1, dilations: Sequence[int] = DILATIONS) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, G, G) -> (B, out_channels, G, G) float32."""
        branches = [branch for branch in self.branches if isinstance(branch, nn.Conv2d)]
        near = [branch for branch in branches if branch.dilation[0] < max(maps.shape[2:])]
        summed: Tensor = sum(branch(maps).float() for branch in near)
        far = [branch for branch in branches if branch not in near]
        if far:
            weight = torch.stack([branch.weight for branch in far]).sum(dim=0)[:, :, 1:2, 1:2]
            bias = torch.stack([branch.get_parameter("bias") for branch in far]).sum(dim=0)
            summed = summed + functional.conv2d(maps, weight, bias).float()
        return summed


class DecoderOutput(NamedTuple):
    """The input and the output of the decoder's head."""

    broadcast: Tensor  # (B * S, D, G, G) the slot at every position, plus the positional encoding
    slot_logits: Tensor  # (B * S, 1, G, G) float32


class SlotDecoder(nn.Module):
    """Broadcasts each slot over a grid, adds a positional encoding and applies a head.

        scops          SCOPS' dilated head. It is linear, so the contribution of the positions is the same for every
                       slot and cancels in the softmax over slots. Apart from its padding, the head therefore cannot
                       tell where a slot lies. `mixing` puts a 1x1 convolution and a ReLU before it.
        mlp_broadcast  three 1x1 convolutions with ReLUs between them, which see one position at a time
        conv           the same with 3x3 convolutions

    Source: Watters et al. (arXiv:1901.07017), spatial broadcast, as in Locatello et al. (arXiv:2006.15055).
    """

    def __init__(self, dim: int = 64, grid: int | None = 8, kind: DecoderKind = "scops", mixing: bool = False) -> None:
        """
        Args:
            dim: D, the slot dimension.
            grid: G. None: use the grid that is given to `forward`.
            kind: the head, see above.
            mixing: put a 1x1 convolution and a ReLU before the `scops` head.
        """
        super().__init__()
        self.grid = grid
        self.positions = SoftPositionEncoding(dim)
        if kind == "scops":
            head: nn.Module = DilatedHead(dim)
            self.head = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), head) if mixing else head
        else:
            size = 1 if kind == "mlp_broadcast" else 3
            layers = [nn.Conv2d(dim, width, size, padding=size // 2) for width in (dim, dim, 1)]
            self.head = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, slots: Tensor, grid: Sequence[int] | None = None) -> DecoderOutput:
        """
        Args:
            slots: (B, S, D).
            grid: height and width, used only by a decoder that was made with grid None.
        """
        height, width = (self.grid, self.grid) if self.grid is not None else grid or (8, 8)
        repeated = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, height, width)  # (B * S, D, G, G)
        broadcast: Tensor = self.positions(repeated)
        slot_logits: Tensor = self.head(broadcast)
        return DecoderOutput(broadcast, slot_logits.float())
