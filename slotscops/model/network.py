"""The whole network, composed of encoder, slots, decoder and part basis.

Shapes: B images; S = K + 1 slots, background first; C_e encoder channels on an h x w grid of N = h * w positions;
D slot dimension; G x G decoder grid; C teacher channels; H x W pixels; N_c classes of objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slotscops.config import Config, MapsFrom, Places, Refinement, SlotInit
from slotscops.core.errors import UserError
from slotscops.model.basis import Directions, PartBasis
from slotscops.model.decoder import SlotDecoder
from slotscops.model.encoder import Encoder
from slotscops.model.maps import part_maps
from slotscops.model.object_frame import ObjectFrame, find_facing, find_frame, place_densities
from slotscops.model.object_guess import ObjectGuess
from slotscops.model.part_logits import HeadLogits, SlotLogits, SlotOutput, Tokens
from slotscops.model.refinement import refine_maps
from slotscops.model.saved_names import save_as_own
from slotscops.model.slots import SlotAttention
from slotscops.model.target import TargetTransform

_EPSILON = 1e-8  # where slots that are left out have all of a pixel, the others have 0


class ModelOutput(NamedTuple):
    """All results of a forward pass, in the order of their computation.

    It is a tuple, and so are its members, so that DDP and Accelerate find the tensors in it.
    """

    encoded: Tensor  # (B, C_e, h, w) the encoder's maps, without positions
    slot_output: SlotOutput | None  # the results of Slot Attention and of the decoder; None without slots
    logits: Tensor  # (B, S, G, G) from a decoder, else (B, S, h, w); slot 0 is the background
    basis: Tensor  # (K, C), or (B, K, C) if each class has its own rows; row k belongs to slot k + 1
    class_logits: Tensor | None  # (B, N_c), if each class has slots of its own; else None
    directions: Directions | None = None  # those of the mixture loss, if it is on
    unpruned: Tensor | None = None  # logits of all slots, if some are left out of `logits`; see `keep_slots`
    placed: "Placed | None" = None  # how the logits came about, if parts have places in the object

    def maps(self, size: Sequence[int]) -> Tensor:
        """(B, S, H, W) float32 soft maps for a size (H, W) in pixels; slot 0 is the background. See `part_maps`."""
        height, width = size
        return part_maps(self.logits, (height, width))

    def turned(self, facing: Tensor) -> "ModelOutput":
        """The same output for objects that face otherwise, if parts have places.

        Args:
            facing: (n,) 1 or -1 for the first n images. The others stay as they are.
        """
        assert self.placed is not None
        frame = self.placed.frame
        return self.in_frame(frame._replace(facing=torch.cat([facing, frame.facing[len(facing) :]])))

    def in_frame(self, frame: ObjectFrame) -> "ModelOutput":
        """The same output with the parts' places in another frame of each object."""
        assert self.placed is not None
        assert self.directions is not None
        assert self.directions.places is not None
        logits, _, spread = self.placed
        with torch.autocast(logits.device.type, enabled=False):
            grid = (logits.shape[2], logits.shape[3])
            densities = place_densities(self.directions.places, frame, spread, grid)
            placed = logits.float() + densities.over_grid()
        return self._replace(logits=placed, placed=Placed(logits, frame, spread))

    def attention_maps(self) -> Tensor:
        """(B, S, h, w) attention of the last iteration, on the encoder's grid.

        Raises:
            ValueError: if the model has no slots.
        """
        if self.slot_output is None:
            raise ValueError("this model has no slots, so there is no attention")
        height, width = self.encoded.shape[-2:]
        attention = self.slot_output.attention  # (B, S, N)
        return attention.view(*attention.shape[:2], height, width)


class Placed(NamedTuple):
    """The logits before the parts' places were added to them, and the frame that says where those are."""

    logits: Tensor  # (B, S, G, G) or (B, S, h, w)
    frame: ObjectFrame
    spread: float


class SlotScops(nn.Module):
    """Part segmentation: S logit maps for each image, and the basis that turns part maps into teacher features.

    This class only composes: encoder -> (tokens -> slots -> maps, or a head -> maps) -> basis. `build_network` makes
    one from the settings.

    Sources: SCOPS (arXiv:1905.01298) for the head, the basis and the losses; Locatello et al. (arXiv:2006.15055) for
    the slots between encoder and head.
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
        object_guess: ObjectGuess | None = None,
        places: Places = "none",
        place_spread: float = 0.3,
    ) -> None:
        """
        Args:
            encoder: turns the input into maps (B, C_e, h, w).
            tokens: turns these maps into the input of `SlotLogits`. None for `HeadLogits`, which takes the maps.
            part_logits: turns tokens or maps into logits of the parts.
            basis: the part basis.
            target: transforms the teacher's features before the parts rebuild them.
            class_head: predicts the class from the mean token, if each class has slots and basis rows of its own.
            refinement: how `segment_maps` refines the maps. `pamr` calls `refine_maps`, `none` leaves them.
            object_guess: guesses object masks for the losses, if `losses.target_mask` is `guessed`.
            places: whether parts have places in the object; the basis must then have them. See `model.object_frame`.
            place_spread: how far a part reaches from its place, in half extents of the object.
        """
        super().__init__()
        self.places, self.place_spread = places, place_spread
        self.num_slots, self.num_classes, self.refinement = basis.num_parts + 1, basis.num_classes, refinement
        self.slot_numbers = tuple(range(self.num_slots))  # number of each row of the output; see `keep_slots`
        # Keep this order: sums over all parameters, such as the gradient norm, depend on it.
        self.basis = basis
        self.encoder = encoder
        self.tokens = tokens
        self.part_logits = part_logits
        self.target = target
        self.class_head = class_head
        self.object_guess = object_guess
        for child in ("basis", "part_logits") if tokens is None else ("basis", "tokens", "part_logits"):
            save_as_own(self, child)

    def forward(self, inputs: Tensor, noise: Tensor | None = None, class_ids: Tensor | None = None) -> ModelOutput:
        """
        Args:
            inputs: input of the encoder: (B, 3, H, W) RGB photos, uint8 or floating point in [0, 1], or
                (B, C_e, h, w) cached features.
            noise: (B, S, D) standard normal numbers for `shared_gaussian`. They are drawn if not given.
            class_ids: (B,) int64 class of each image, used if each class has slots of its own. If not given, the
                class head predicts them.
        """
        encoded = self.encoder(inputs)  # (B, C_e, h, w)
        if self.tokens is None:
            logits, directions = self.part_logits(encoded), self.basis.directions()
            output = ModelOutput(encoded, None, logits, self.basis(), class_logits=None, directions=directions)
            return self._without_others(self._place(output))
        tokens = self.tokens(encoded)  # (B, N, D)
        class_logits = None
        if self.class_head is not None:
            # Detached, so that the classification term trains the class head only.
            class_logits = self.class_head(tokens.detach().mean(dim=1))  # (B, N_c)
            class_ids = class_logits.argmax(dim=1) if class_ids is None else class_ids
        logits, slot_output = self.part_logits(tokens, encoded.shape[2:], noise, class_ids)
        basis = self.basis(class_ids)  # (K, C), or (B, K, C)
        directions = self.basis.directions(class_ids)
        output = ModelOutput(encoded, slot_output, logits, basis, class_logits, directions)
        return self._without_others(self._place(output))

    def _place(self, output: ModelOutput) -> ModelOutput:
        """Finds the object's frame and facing in the maps, and adds to each slot's logits how likely its place is."""
        if self.places == "none":
            return output
        assert output.directions is not None
        assert output.directions.places is not None
        shares = output.logits.float().log_softmax(1)
        frame = find_frame(1 - shares[:, 0].exp())
        if self.places == "facing":
            frame = frame._replace(facing=find_facing(shares, output.directions.places, frame, self.place_spread))
        return output._replace(placed=Placed(output.logits, frame, self.place_spread)).in_frame(frame)

    def keep_slots(self, numbers: Sequence[int]) -> None:
        """Leaves all slots but these out of the output: of the logits, and so of maps and labels, and of the basis.

        Each row of the output belongs to the slot of that place in `slot_numbers`; `num_slots` counts the rows. The
        slots that are left out go on competing in Slot Attention, where every slot changes what the others win. In two
        networks with a slot that won no pixel of 48 faces, taking its start and its rows out of the network changed
        0.07 and 0.25 % of the labels, and 0.5 and 0.7 % of the refined ones. Therefore only what is made of the slot
        afterwards is dropped: the softmax over the rest leaves their order as it was, so a pixel that none of the
        dropped slots won has the label that it had. Tensors and their names stay, and so does a checkpoint's format.

        Args:
            numbers: of the slots to keep, rising, among those that the output has; 0, the background, and at least one
                part.

        Raises:
            ValueError: if the numbers are not these.
        """
        kept = tuple(numbers)
        if len(kept) < 2 or kept[0] != 0 or list(kept) != sorted({*kept} & {*self.slot_numbers}):
            raise ValueError(f"slots {kept}: needed 0 and others of {self.slot_numbers}, rising")
        self.slot_numbers, self.num_slots = kept, len(kept)

    def _without_others(self, output: ModelOutput) -> ModelOutput:
        """The output with the rows of `slot_numbers` only. `slot_output` still has all slots."""
        if not self._leaves_slots_out:
            return output
        parts = [number - 1 for number in self.slot_numbers[1:]]
        rows, directions, placed = list(self.slot_numbers), output.directions, output.placed
        if directions is not None:
            places = None if directions.places is None else directions.places[..., parts, :]
            directions = directions._replace(parts=directions.parts[..., parts, :, :], places=places)
        if placed is not None:
            placed = placed._replace(logits=placed.logits[:, rows])
        return output._replace(
            logits=output.logits[:, rows],
            basis=output.basis[..., parts, :],
            directions=directions,
            unpruned=output.logits,
            placed=placed,
        )

    def segment_maps(self, output: ModelOutput, photos: Tensor) -> Tensor:
        """(B, S, H, W) float32 soft maps for scores and pictures, upsampled to the photos and refined if so set.

        Args:
            output: what `forward` returned for these photos.
            photos: (B, 3, H, W) RGB, uint8 or floating point in [0, 1].
        """
        if self.refinement == "none":
            return output.maps(photos.shape[-2:])
        whole = output if output.unpruned is None else output._replace(logits=output.unpruned)
        return self.keep_rows(refine_maps(whole.maps(photos.shape[-2:]), photos))

    def keep_rows(self, maps: Tensor) -> Tensor:
        """(B, S, H, W) maps of the slots that the output has, scaled to sum to 1, for (B, ., H, W) maps of all slots.

        Maps are refined before slots are left out: the scale differs from pixel to pixel, and after a change of scale
        the mean over a pixel's neighbours would prefer other slots.
        """
        if not self._leaves_slots_out:
            return maps
        kept = maps[:, list(self.slot_numbers)]
        return kept / kept.sum(dim=1, keepdim=True).clamp_min(_EPSILON)

    @property
    def _leaves_slots_out(self) -> bool:
        return self.num_slots < self.basis.num_parts + 1

    @property
    def takes_features(self) -> bool:
        """True if the input is cached teacher features, False if it is photos."""
        return self.encoder.takes_features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group: `encoder`, `basis`, and `head` for all others. Each has its learning rate."""
        groups: dict[str, list[nn.Parameter]] = {"encoder": [], "head": [], "basis": []}
        for name, child in self.named_children():
            group = groups[name if name in ("encoder", "basis") else "head"]
            group += [parameter for parameter in child.parameters() if parameter.requires_grad]
        return groups


def build_network(encoder: Encoder, config: Config, feature_channels: int, num_classes: int | None = None) -> SlotScops:
    """Builds the network of the settings around an encoder. Its random weights come from the global generator.

    Args:
        config: of these settings, the sections slots, decoder and basis, teacher.transform, teacher.layer_weights,
            losses.mixture and losses.target_mask are used.
        feature_channels: C, the number of channels of the teacher's features.
        num_classes: N_c, if each class of objects has slot starts and basis rows of its own. None if all share them.

    Raises:
        UserError: if settings exclude each other.
    """
    slots, decoder = config.slots, config.decoder
    _check_choices(decoder.maps, slots.iterations, slots.init, num_classes)
    tokens: Tokens | None = None
    part_logits: SlotLogits | HeadLogits
    # Keep this order: in another order the same seed would draw other weights.
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
    num_each, num_background = config.basis.part_directions, config.basis.background_directions
    basis = PartBasis(
        slots.num_parts,
        feature_channels,
        config.basis.kind,
        num_classes,
        num_each,
        num_background if config.losses.mixture else 0,
        decoder.places != "none",
    )
    target = TargetTransform(config.teacher.transform, feature_channels, config.teacher.layer_weights)
    class_head = None if num_classes is None else nn.Linear(slots.dim, num_classes)
    object_guess = ObjectGuess(feature_channels) if config.losses.target_mask == "guessed" else None
    return SlotScops(
        encoder,
        tokens,
        part_logits,
        basis,
        target,
        class_head,
        decoder.refinement,
        object_guess,
        decoder.places,
        decoder.place_spread,
    )


def _check_choices(maps_from: MapsFrom, num_iterations: int, slot_init: SlotInit, num_classes: int | None) -> None:
    if maps_from == "attention" and num_iterations < 2:  # with one iteration the slots' update would get no gradient
        raise UserError("decoder.maps is attention, which needs slots.iterations of 2 or more, came 1")
    if num_classes is not None and (maps_from == "head_only" or slot_init == "shared_gaussian"):
        other = "decoder.maps is head_only" if maps_from == "head_only" else "slots.init is shared_gaussian"
        raise UserError(f"slots.per_class is own, but {other}, which has no slot starts of its own; change one of them")
