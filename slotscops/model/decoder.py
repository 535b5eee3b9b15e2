"""The decoder: each slot alone, broadcast over a small grid, becomes one map of logits.

Shapes: B images, S slots, D slot dimension, G x G decoder grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import DecoderKind
from slotscops.model.slots import SoftPositionEncoding

DILATIONS = (6, 12, 18, 24)


class DilatedHead(nn.Module):
    """Four 3x3 convolutions side by side, of different dilations, summed.

    On an 8 x 8 grid all but the centre taps of dilations 12, 18 and 24 only ever see the padding, and are left out.

    Source: DeepLab (arXiv:1606.00915), ASPP-L, which SCOPS (arXiv:1905.01298) keeps as its head.
    """

    def __init__(self, in_channels: int, out_channels: int = 1, dilations: Sequence[int] = DILATIONS) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, G, G) -> (B, out_channels, G, G) float32."""
        return torch.stack([_convolve(branch, maps).float() for branch in self.branches]).sum(dim=0)


def _convolve(branch: nn.Module, maps: Tensor) -> Tensor:
    """What the 3x3 convolution gives, without the taps that lie beyond the maps wherever it stands."""
    assert isinstance(branch, nn.Conv2d)
    if branch.dilation[0] < max(maps.shape[2:]):
        convolved: Tensor = branch(maps)
        return convolved
    return functional.conv2d(maps, branch.weight[:, :, 1:2, 1:2], branch.bias)


class SlotDecoder(nn.Module):
    """Spatial broadcast of each slot, positional encoding, a head.

        scops          SCOPS' dilated head. Linear up to the softmax over slots, in which what positions add cancels: it
                       cannot place a slot, but for its padding. `mixing` puts a 1x1 convolution and a ReLU before it.
        mlp_broadcast  each position alone: three 1x1 convolutions with ReLUs between
        conv           the same with 3x3 convolutions

    Source: Watters et al. (arXiv:1901.07017), spatial broadcast, as in Locatello et al. (arXiv:2006.15055).
    """

    def __init__(self, dim: int = 64, grid: int | None = 8, kind: DecoderKind = "scops", mixing: bool = False) -> None:
        """
        Args:
            grid: G; None takes the grid of the call.
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

    def forward(self, slots: Tensor, grid: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            slots: (B, S, D).
            grid: height and width, for a decoder without a grid of its own.

        Returns:
            broadcast: (B * S, D, G, G), what the head sees: the slot at every position, plus the positions.
            slot_logits: (B * S, 1, G, G) float32.
        """
        height, width = (self.grid, self.grid) if self.grid is not None else grid or (8, 8)
        repeated = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, height, width)  # (B * S, D, G, G)
        broadcast: Tensor = self.positions(repeated)
        slot_logits: Tensor = self.head(broadcast)
        return broadcast, slot_logits.float()
