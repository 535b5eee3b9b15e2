"""Turns the encoder's maps into logits of parts, either through slots or with SCOPS' head alone.

Shapes: B images; S = K + 1 slots, background first; C_e encoder channels on an h x w grid of N = h * w positions;
D slot dimension; G x G decoder grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from slotscops.model.decoder import DecoderOutput, DilatedHead, SlotDecoder
from slotscops.model.slots import SlotAttention, SoftPositionEncoding

_EPSILON = 1e-8  # keeps the log finite if an attention rounds to 0


class SlotOutput(NamedTuple):
    """The results of Slot Attention, from its input to the decoder."""

    tokens: Tensor  # (B, N, D) input of the slots
    slots: Tensor  # (B, S, D)
    attention: Tensor  # (B, S, N) of the last iteration; sums to 1 over slots
    decoded: DecoderOutput | None  # None if the attention itself gives the maps


class HeadLogits(nn.Module):
    """SCOPS' head on the encoder's normalised maps, without slots. It is the baseline for the slots."""

    def __init__(self, in_channels: int, num_slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.head = DilatedHead(in_channels, num_slots)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C_e, h, w) -> logits (B, S, h, w)"""
        normalised = self.norm(encoded.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C_e, h, w)
        logits: Tensor = self.head(normalised)
        return logits


class Tokens(nn.Module):
    """Input of the slots: adds positions to the encoder's maps, normalises them and projects them to D channels.

    Source: Locatello et al. (arXiv:2006.15055), appendix E.2.
    """

    def __init__(self, in_channels: int, dim: int, hidden: int = 0) -> None:
        """
        Args:
            in_channels: C_e, channels of the encoder's maps.
            dim: D, the slot dimension.
            hidden: width of a hidden ReLU layer in the projection, as in the paper. 0: one linear map.
        """
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.positions = SoftPositionEncoding(in_channels)
        self.project: nn.Module
        if hidden:
            self.project = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        else:
            self.project = nn.Linear(in_channels, dim)

    def forward(self, encoded: Tensor) -> Tensor:
        """(B, C_e, h, w) -> (B, N, D)"""
        positioned = self.positions(encoded).flatten(2).transpose(1, 2)  # (B, N, C_e)
        tokens: Tensor = self.project(self.norm(positioned))
        return tokens


class SlotLogits(nn.Module):
    """Runs Slot Attention on the tokens, then decodes each slot to a map or uses the last attention as the maps."""

    def __init__(self, slot_attention: SlotAttention, decoder: SlotDecoder | None) -> None:
        """
        Args:
            decoder: None uses the log of the last attention as logits, on the encoder's grid.
        """
        super().__init__()
        self.slot_attention = slot_attention
        self.decoder = decoder

    def forward(
        self, tokens: Tensor, grid: Sequence[int], noise: Tensor | None = None, class_ids: Tensor | None = None
    ) -> tuple[Tensor, SlotOutput]:
        """
        Args:
            tokens: (B, N, D).
            grid: h and w of the encoder's maps.
            noise, class_ids: see `SlotAttention`.

        Returns:
            logits: (B, S, G, G) from a decoder, else (B, S, h, w); slot 0 is the background.
            output: the intermediate results.
        """
        slots, attention = self.slot_attention(tokens, noise, class_ids)  # (B, S, D), (B, S, N)
        if self.decoder is None:
            logits = (attention + _EPSILON).log().unflatten(2, grid)  # (B, S, h, w)
            return logits, SlotOutput(tokens, slots, attention, decoded=None)
        decoded: DecoderOutput = self.decoder(slots, grid)
        num_slots, grid = self.slot_attention.num_slots, decoded.slot_logits.shape[2:]
        logits = decoded.slot_logits.view(-1, num_slots, *grid)  # (B, S, G, G)
        return logits, SlotOutput(tokens, slots, attention, decoded)
