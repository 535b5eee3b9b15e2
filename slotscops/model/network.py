"""The network, composed: encoder, slots, decoder, part basis.

Shapes: B images; S = K + 1 slots, background first; C_e encoder channels on an h x w grid of N = h * w positions;
D slot dimension; G x G decoder grid; C teacher channels; H x W pixels; N_c classes of objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from slotscops.config import Config, MapsFrom, Refinement, SlotInit
from slotscops.core.errors import UserError
from slotscops.model.basis import PartBasis
from slotscops.model.decoder import SlotDecoder
from slotscops.model.encoder import Encoder
from slotscops.model.maps import part_maps
from slotscops.model.part_logits import HeadLogits, SlotLogits, Tokens
from slotscops.model.refinement import refine_maps
from slotscops.model.saved_names import save_as_own
from slotscops.model.slots import SlotAttention
from slotscops.model.target import TargetTransform


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

    It only composes: encoder -> (tokens -> slots -> maps, or a head -> maps) -> basis. `build_network` makes one from
    settings.

    Sources: SCOPS (arXiv:1905.01298) for head, basis and what they are trained for; Locatello et al.
    (arXiv:2006.15055) for the slots in between.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokens: Tokens | None,
        part_logits: SlotLogits | HeadLogits,
        basis: PartBasis,
        target: TargetTransform,
        class_head: nn.Linear | None = None,
        refinement: Refinement = "none",
    ) -> None:
        """
        Args:
            encoder: what turns the input into (B, C_e, h, w).
            tokens: what turns its maps into the input of `SlotLogits`; None for `HeadLogits`, which takes the maps.
            target: what is done to the teacher's features before the parts rebuild them.
            class_head: guesses the class from the mean token where each class has slots and basis rows of its own.
            refinement: what `segment_maps` does to the maps; `pamr`, see `refine_maps`.
        """
        super().__init__()
        self.num_slots, self.num_classes, self.refinement = basis.num_parts + 1, basis.num_classes, refinement
        # In this order, because norms and sums over all parameters follow it.
        self.basis = basis
        self.encoder = encoder
        self.tokens = tokens
        self.part_logits = part_logits
        self.target = target
        self.class_head = class_head
        for child in ("basis", "part_logits") if tokens is None else ("basis", "tokens", "part_logits"):
            save_as_own(self, child)

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> ModelOutput:
        """
        Args:
            inputs: what the encoder reads: (B, 3, H, W) RGB photos, uint8 or floating point in [0, 1], or
                (B, C_e, h, w) cached features.
            noise: (B, S, D) standard normal numbers for `shared_gaussian`; drawn if not given.
            class_ids: (B,) int64, which class' slots to take where each has its own; guessed if not given.
        """
        encoded = self.encoder(inputs)  # (B, C_e, h, w)
        if self.tokens is None:
            found = self.part_logits(encoded)
            return ModelOutput(encoded=encoded, tokens=None, **found._asdict(), basis=self.basis(), class_logits=None)
        tokens = self.tokens(encoded)  # (B, N, D)
        class_logits = None
        if self.class_head is not None:
            class_logits = self.class_head(tokens.detach().mean(dim=1))  # (B, N_c); trains nothing but itself
            class_ids = class_logits.argmax(dim=1) if class_ids is None else class_ids
        found = self.part_logits(tokens, encoded.shape[2:], noise, class_ids)
        return ModelOutput(
            encoded=encoded,
            tokens=tokens,
            **found._asdict(),
            basis=self.basis(class_ids),  # (K, C), or (B, K, C)
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
        for name, child in self.named_children():
            group = groups[name if name in ("encoder", "basis") else "head"]
            group += [parameter for parameter in child.parameters() if parameter.requires_grad]
        return groups


def build_network(encoder: Encoder, config: Config, feature_channels: int, num_classes: int | None = None) -> SlotScops:
    """The network of the settings around an encoder, with random weights drawn from the global generator.

    Args:
        config: the sections slots, decoder, basis, and teacher.transform are read.
        feature_channels: C of the teacher.
        num_classes: N_c; each class of objects has slot starts and basis rows of its own. None: all share them.

    Raises:
        UserError: choices that exclude each other.
    """
    slots, decoder = config.slots, config.decoder
    _check_choices(decoder.maps, slots.iterations, slots.init, num_classes)
    tokens: Tokens | None = None
    part_logits: SlotLogits | HeadLogits
    # The weights are drawn in this order: another one would give another network for the same seed.
    if decoder.maps == "head_only":
        part_logits = HeadLogits(encoder.out_channels, slots.num_parts + 1)
    else:
        tokens = Tokens(encoder.out_channels, slots.dim, slots.token_hidden)
        slot_attention = SlotAttention(
            slots.num_parts + 1,
            slots.dim,
            slots.iterations,
            init=slots.init,
            gradient=slots.gradient,
            attached_iterations=2 if decoder.maps == "attention" else 1,
            num_classes=num_classes,
        )
        has_decoder = decoder.maps == "head"
        slot_decoder = SlotDecoder(slots.dim, decoder.grid, decoder.kind, decoder.mixing) if has_decoder else None
        part_logits = SlotLogits(slot_attention, slot_decoder)
    basis = PartBasis(slots.num_parts, feature_channels, config.basis.kind, num_classes)
    target = TargetTransform(config.teacher.transform, feature_channels)
    class_head = None if num_classes is None else nn.Linear(slots.dim, num_classes)
    return SlotScops(encoder, tokens, part_logits, basis, target, class_head, decoder.refinement)


def _check_choices(maps_from: MapsFrom, num_iterations: int, slot_init: SlotInit, num_classes: int | None) -> None:
    if maps_from == "attention" and num_iterations < 2:  # which would leave the slots' update untrained
        raise UserError("decoder.maps is attention, which needs slots.iterations of 2 or more, came 1")
    if num_classes is not None and (maps_from == "head_only" or slot_init == "shared_gaussian"):
        other = "decoder.maps is head_only" if maps_from == "head_only" else "slots.init is shared_gaussian"
        raise UserError(f"slots.per_class is own, but {other}, which has no starts of slots to own; change one of them")
