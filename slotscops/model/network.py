"""The network, composed: encoder, slots, decoder, part basis.

Shapes: B images; S = K + 1 slots, background first; C_e encoder channels on an h x w grid of N = h * w positions;
D slot dimension; G x G decoder grid; C teacher channels; H x W pixels; N_c classes of objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slotscops.config import DecoderKind, MapsFrom, Refinement, SlotGradient, SlotInit, Transform
from slotscops.core.errors import UserError
from slotscops.model.decoder import DilatedHead, SlotDecoder
from slotscops.model.encoder import Encoder
from slotscops.model.maps import part_maps
from slotscops.model.refinement import refine_maps
from slotscops.model.slots import SlotAttention, SoftPositionEncoding
from slotscops.model.starts import rows_of_classes
from slotscops.model.target import TargetTransform

_EPSILON = 1e-8  # keeps the log of an attention that rounds to 0 finite


class ModelOutput(NamedTuple):
    """Everything that was computed on the way, in its order. A tuple, so that DDP and Accelerate see the tensors."""

    encoded: Tensor  # (B, C_e, h, w) the encoder's maps, without positions
    tokens: Tensor | None  # (B, N, D) what the slots attend to; None without slots, as the next two
    slots: Tensor | None  # (B, S, D)
    attention: Tensor | None  # (B, S, N) of the last iteration; sums to 1 over slots
    broadcast: Tensor | None  # (B * S, D, G, G) each slot at every position, plus the positions; None without decoder
    slot_logits: Tensor | None  # (B * S, 1, G, G) the head's answer to each slot; None without decoder
    logits: Tensor  # (B, S, G, G) the same, or (B, S, h, w) the log of the attention; slot 0 the background
    basis: Tensor  # (K, C) part basis, non-negative unless free; row k belongs to slot k + 1; (B, K, C) of own classes
    class_logits: Tensor | None  # (B, N_c) guess of the class, where each has slots of its own; else None

    def maps(self, size: Sequence[int]) -> Tensor:
        """(B, S, H, W) float32 soft maps for size (H, W): upsampled, then softmax over slots; channel 0 background."""
        height, width = size
        return part_maps(self.logits, (height, width))

    def attention_maps(self) -> Tensor:
        """(B, S, h, w): the last attention on the encoder's grid."""
        if self.attention is None:
            raise ValueError("this model has no slots, so there is no attention")
        height, width = self.encoded.shape[-2:]
        return self.attention.view(*self.attention.shape[:2], height, width)


class SlotScops(nn.Module):
    """Part segmentation: S logit maps per image, and the basis that turns part maps into teacher features.

    Sources: SCOPS (arXiv:1905.01298) for head, basis and what they are trained for; Locatello et al.
    (arXiv:2006.15055) for the slots in between.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_parts: int = 5,
        feature_channels: int = 512,
        slot_dim: int = 64,
        num_iterations: int = 3,
        slot_init: SlotInit = "learned",
        decoder_grid: int | None = 8,
        slot_gradient: SlotGradient = "full",
        maps_from: MapsFrom = "head",
        decoder_kind: DecoderKind = "scops",
        decoder_mixing: bool = False,
        free_basis: bool = False,
        transform: Transform = "none",
        refinement: Refinement = "none",
        token_hidden: int = 0,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            encoder: what turns the input into (B, C_e, h, w).
            num_parts: K; the background's slot comes on top.
            feature_channels: C of the teacher.
            slot_dim, num_iterations, slot_init, slot_gradient: D and other choices of `SlotAttention`.
            decoder_grid: G; None takes the encoder's own.
            maps_from: `head`, the decoder's; `attention`, the last one, on the encoder's grid; `head_only`, SCOPS' head
                on the encoder's normalised maps, without any slots: what slots have to beat.
            decoder_kind, decoder_mixing: see `SlotDecoder`.
            free_basis: the basis may hold negative numbers.
            transform: what is done to the teacher's features before the parts rebuild them; see `TargetTransform`.
            refinement: what `segment_maps` does to the maps; `pamr`, see `refine_maps`.
            token_hidden: width of a ReLU layer between normalised encoder maps and what the slots attend to, as in
                Locatello et al.; 0 leaves one linear map.
            num_classes: N_c; each class of objects has slot starts and basis rows of its own. None: all share them.

        Raises:
            UserError: choices that exclude each other.
        """
        _check_choices(maps_from, num_iterations, slot_init, num_classes)
        super().__init__()
        self.num_slots, self.num_classes = num_parts + 1, num_classes
        self.maps_from, self.free_basis, self.refinement = maps_from, free_basis, refinement
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.out_channels)
        if maps_from == "head_only":
            self.head = DilatedHead(encoder.out_channels, self.num_slots)
        else:
            self.positions = SoftPositionEncoding(encoder.out_channels)
            self.project = _projection(encoder.out_channels, token_hidden, slot_dim)
            self.slot_attention = SlotAttention(
                self.num_slots, slot_dim, num_iterations, init=slot_init, gradient=slot_gradient,
                attached_iterations=2 if maps_from == "attention" else 1, num_classes=num_classes,
            )  # fmt: skip
        has_decoder = maps_from == "head"
        self.decoder = SlotDecoder(slot_dim, decoder_grid, decoder_kind, decoder_mixing) if has_decoder else None
        self.target = TargetTransform(transform, feature_channels)
        self.basis_parameter = nn.Parameter(torch.randn((num_classes or 1) * num_parts, feature_channels).abs())
        if num_classes is not None:
            self.class_head = nn.Linear(slot_dim, num_classes)

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> ModelOutput:
        """
        Args:
            inputs: what the encoder reads: (B, 3, H, W) RGB photos, uint8 or floating point in [0, 1], or
                (B, C_e, h, w) cached features.
            noise: (B, S, D) standard normal numbers for `shared_gaussian`; drawn if not given.
            class_ids: (B,) int64, which class' slots to take where each has its own; guessed if not given.
        """
        encoded = self.encoder(inputs)  # (B, C_e, h, w)
        basis = self.basis_parameter if self.free_basis else functional.relu(self.basis_parameter)  # (K, C)
        if self.maps_from == "head_only":
            normalised = self.norm(encoded.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C_e, h, w)
            logits = self.head(normalised)  # (B, S, h, w)
            return ModelOutput(encoded, None, None, None, None, None, logits, basis, None)
        positioned = self.positions(encoded).flatten(2).transpose(1, 2)  # (B, N, C_e)
        tokens = self.project(self.norm(positioned))  # (B, N, D)
        class_logits = None
        if self.num_classes is not None:
            class_logits = self.class_head(tokens.detach().mean(dim=1))  # (B, N_c); trains nothing but itself
            class_ids = class_logits.argmax(dim=1) if class_ids is None else class_ids
            basis = rows_of_classes(basis.unflatten(0, (self.num_classes, -1)), class_ids)  # (B, K, C)
        slots, attention = self.slot_attention(tokens, noise, class_ids)  # (B, S, D), (B, S, N)
        broadcast = slot_logits = None
        if self.decoder is None:
            logits = (attention + _EPSILON).log().unflatten(2, encoded.shape[2:])  # (B, S, h, w)
        else:
            broadcast, slot_logits = self.decoder(slots, encoded.shape[2:])  # (B * S, D, G, G), (B * S, 1, G, G)
            logits = slot_logits.view(-1, self.num_slots, *slot_logits.shape[2:])  # (B, S, G, G)
        return ModelOutput(
            encoded=encoded,
            tokens=tokens,
            slots=slots,
            attention=attention,
            broadcast=broadcast,
            slot_logits=slot_logits,
            logits=logits,
            basis=basis,
            class_logits=class_logits,
        )

    def segment_maps(self, output: ModelOutput, photos: Tensor) -> Tensor:
        """(B, S, H, W) float32 soft maps to score and to draw: upsampled to the photos, refined where so set.

        Args:
            photos: (B, 3, H, W) RGB that the output is of, uint8 or floating point in [0, 1].
        """
        maps = output.maps(photos.shape[-2:])
        return refine_maps(maps, photos) if self.refinement == "pamr" else maps

    @property
    def takes_features(self) -> bool:
        """True where the input is cached teacher features, False where it is photos."""
        return self.encoder.takes_features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by what takes a learning rate of its own: the encoder, the basis, and the head between."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": [], "basis": []}
        for name, parameter in self.named_parameters():
            group = "encoder" if name.startswith("encoder.") else "basis" if name == "basis_parameter" else "head"
            if parameter.requires_grad:
                groups[group].append(parameter)
        return groups


def _projection(channels: int, hidden: int, slot_dim: int) -> nn.Module:
    """(..., channels) -> (..., slot_dim)"""
    if not hidden:
        return nn.Linear(channels, slot_dim)
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim))


def _check_choices(maps_from: MapsFrom, num_iterations: int, slot_init: SlotInit, num_classes: int | None) -> None:
    if maps_from == "attention" and num_iterations < 2:  # which would leave the slots' update untrained
        raise UserError("decoder.maps is attention, which needs slots.iterations of 2 or more, came 1")
    if num_classes is not None and (maps_from == "head_only" or slot_init == "shared_gaussian"):
        other = "decoder.maps is head_only" if maps_from == "head_only" else "slots.init is shared_gaussian"
        raise UserError(f"slots.per_class is own, but {other}, which has no starts of slots to own; change one of them")
