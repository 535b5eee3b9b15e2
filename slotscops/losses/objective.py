"""The training objective: computes the loss terms that the settings ask for, and their weighted sum.

Shapes: B images, S slots, H x W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slotscops.config import Config, Losses, LossWeights
from slotscops.core.errors import UserError
from slotscops.core.records import Batch
from slotscops.losses.contrast import part_contrast, visual_consistency, visual_consistency_lab
from slotscops.losses.gathering import Gather, gather_processes, keep_own
from slotscops.losses.mixture import mixture_loss, slot_likelihoods
from slotscops.losses.regularisers import (
    background_cross_entropy,
    concentration,
    entropy,
    orthonormality,
    part_centres,
    presence,
    total_variation,
)
from slotscops.losses.semantic import semantic_consistency
from slotscops.losses.warp import Warp, draw_warps, equivariance, landmark_equivariance, warp_images
from slotscops.model.basis import Directions
from slotscops.model.maps import upsample
from slotscops.model.network import ModelOutput
from slotscops.model.object_frame import find_facing, place_densities
from slotscops.model.object_guess import ObjectGuess
from slotscops.model.target import TargetTransform

_NAMES = tuple(field.name for field in fields(LossWeights))
_WITHOUT_PIXELS = {"semantic", "mixture", "background", "orthonormality", "presence", "total_variation"}


def loss_weights(losses: Losses) -> dict[str, float]:
    """The loss weights that are not 0, by the name of their term."""
    return {name: getattr(losses, name) for name in _NAMES if getattr(losses, name)}


def check_objective(config: Config, num_processes: int, microbatches: int) -> None:
    """Checks that the objective can be computed with these settings.

    Args:
        microbatches: number of microbatches that each process computes in one step.

    Raises:
        UserError: if all weights are 0, only the basis would be trained, a term needs photos but the encoder reads
            features, a term needs object masks that are not read, the settings of the mixture exclude each other, the
            range of scales is empty, or `part_contrast` would have a single photo to compare.
    """
    wanted = loss_weights(config.losses)
    if not wanted:
        raise UserError("every weight in losses is 0; there is nothing to train")
    if set(wanted) == {"orthonormality"}:
        raise UserError(
            "losses.orthonormality is the only loss, and it trains the part basis alone, so no part would be found; "
            "set losses.semantic too"
        )
    _check_mixture(config)
    if _needs_warp(wanted) and config.encoder.name == "features":
        name = next(name for name in wanted if name.endswith("equivariance"))
        raise UserError(
            f"losses.{name} warps photos, but encoder.name is features, which sees none; set it to 0 or "
            "encoder.name to a ResNet"
        )
    if config.warp.min_scale > config.warp.max_scale:
        raise UserError(f"warp.min_scale {config.warp.min_scale} is above warp.max_scale {config.warp.max_scale}")
    # See `_gather_of`: how many photos are compared with each other.
    num_groups = microbatches * (1 if config.train.reduction == "ddp" else num_processes)
    compared = config.train.batch_size // num_groups
    if "part_contrast" in wanted and compared < 2:
        raise UserError(
            f"losses.part_contrast compares photos with each other, but a microbatch holds {compared}; raise "
            "train.batch_size"
        )


def _check_mixture(config: Config) -> None:
    losses, basis = config.losses, config.basis
    if losses.mixture and basis.kind == "relu":
        raise UserError(
            "losses.mixture compares directions, which may be negative, but basis.kind is relu; set basis.kind=free"
        )
    if not losses.mixture and basis.part_directions > 1:
        raise UserError(
            f"basis.part_directions is {basis.part_directions}, but only losses.mixture uses more than one a part, and "
            "it is 0; set it to 1 or losses.mixture to 1"
        )
    if config.decoder.places != "none" and not losses.mixture:
        raise UserError(
            f"decoder.places is {config.decoder.places}, but only losses.mixture trains places, and it is 0; set it to "
            "1 or decoder.places to none"
        )
    if config.decoder.places != "none" and losses.target_mask == "none":
        raise UserError(
            f"decoder.places is {config.decoder.places}, which needs to know where the objects are, but "
            "losses.target_mask is none; set it to object or guessed, or decoder.places to none"
        )
    if losses.background and losses.target_mask == "none":
        raise UserError(
            "losses.background compares the background with object masks, but losses.target_mask is none; set it to "
            "object or guessed, or losses.background to 0"
        )


def trains_basis(losses: Losses) -> bool:
    """Whether any loss depends on the part basis. Otherwise it must be frozen, since DDP waits for every gradient."""
    return bool(losses.semantic or losses.orthonormality or losses.mixture)


def compute_terms(
    forward: Callable[..., ModelOutput],
    target: TargetTransform,
    batch: Batch,
    config: Config,
    step: int,
    object_guess: ObjectGuess | None = None,
) -> tuple[ModelOutput, dict[str, Tensor]]:
    """Runs the model and computes every loss term whose weight is not 0.

    Args:
        forward: the model. It is called once; if a term needs warped photos, they follow the plain ones in the input.
        target: transforms cached features into the target that the parts rebuild.
        batch: must hold features.
        step: number of the training step. It seeds the random warps.
        object_guess: guesses the object masks, if `losses.target_mask` is `guessed`.

    Returns:
        output: the model's output, for the plain and then the warped photos.
        terms: scalar tensors by the name of the term, not yet multiplied by their weights.
    """
    assert batch.features is not None
    wanted = loss_weights(config.losses)
    inputs, warp = batch.features if config.encoder.name == "features" else batch.images, None
    if _needs_warp(wanted):
        warp = draw_warps(batch.keys, config.seed, step, **asdict(config.warp)).to(inputs.device)
        inputs = torch.cat([inputs, warp_images(inputs, warp)])
    class_ids = batch.class_ids if config.slots.per_class == "own" else None
    if class_ids is not None and warp is not None:
        class_ids = torch.cat([class_ids, class_ids])
    output = forward(inputs, class_ids=class_ids)
    size, num_images = (config.data.size, config.data.size), len(batch)
    features = target(batch.features)
    if config.decoder.places == "facing":
        output = output.turned(_facing_of_features(output, features, config))
    logits = output.logits[:num_images]
    masks = batch.object_masks if config.losses.target_mask == "object" else None
    if object_guess is not None:
        masks = object_guess(features, size)
    terms = _terms_of_features(wanted, output, features, masks, batch, config)
    if output.class_logits is not None:
        terms["classification"] = cross_entropy(output.class_logits[:num_images].float(), batch.class_ids)
    gather = _gather_of(config)
    if "presence" in wanted or "total_variation" in wanted:
        on_grid = logits.float().softmax(dim=1)  # (B, S, h, w)
        if "presence" in wanted:
            terms["presence"] = presence(on_grid[:, 1:], gather)
        if "total_variation" in wanted:
            terms["total_variation"] = total_variation(on_grid)
    if set(wanted) - _WITHOUT_PIXELS:
        maps = output.maps(size)  # (B or 2 B, S, H, W)
        terms |= _terms_of_maps(wanted, maps[:num_images], features, masks, batch, config, gather)
        if warp is not None:
            terms |= _terms_of_warp(wanted, maps[:num_images], maps[num_images:], warp)
    return output, terms


def weighted_sum(terms: Mapping[str, Tensor], losses: Losses, step: int) -> Tensor:
    """Scalar sum of the terms, each multiplied by its weight at the given step.

    The classification term always has weight 1. Its gradient reaches only the class head.
    """
    factors = {name: getattr(losses, name, 1.0) for name in terms}
    if "entropy" in factors and step < losses.entropy_ramp_steps:
        factors["entropy"] *= step / losses.entropy_ramp_steps
    weighted = [term if factors[name] == 1 else factors[name] * term for name, term in terms.items()]
    return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()


def _gather_of(config: Config) -> Gather:
    """How terms that compare photos with each other get those of the whole batch.

    With train.reduction=ddp they compare the photos that all processes hold at the time. With deterministic they
    compare the photos of one microbatch, which are the same on any number of processes.
    """
    return gather_processes if config.train.reduction == "ddp" else keep_own


@torch.no_grad()
def _facing_of_features(output: ModelOutput, features: Tensor, config: Config) -> Tensor:
    """(B,) which way the objects face, judged also by the features that the slots explain.

    The maps alone do not say it before they are trained.
    """
    assert output.placed is not None
    num_images, grid = len(features), (features.shape[2], features.shape[3])
    parts, background, places = _directions_of(output, num_images, config)
    assert places is not None
    with torch.autocast(features.device.type, enabled=False):
        shares = upsample(output.placed.logits[:num_images], grid).log_softmax(1)
    likelihoods = slot_likelihoods(features, parts, background, config.losses.mixture_kappa)
    return find_facing(shares + likelihoods, places, output.placed.frame.first(num_images), output.placed.spread)


def _directions_of(output: ModelOutput, num_images: int, config: Config) -> Directions:
    """The directions for the first images, without those of the warped photos that may follow them."""
    assert output.directions is not None
    if config.slots.per_class == "shared":
        return output.directions
    parts, background, places = output.directions
    return Directions(parts[:num_images], background[:num_images], None if places is None else places[:num_images])


def _needs_warp(wanted: Mapping[str, float]) -> bool:
    return "equivariance" in wanted or "landmark_equivariance" in wanted


def _terms_of_features(
    wanted: Mapping[str, float],
    output: ModelOutput,
    features: Tensor,
    masks: Tensor | None,
    batch: Batch,
    config: Config,
) -> dict[str, Tensor]:
    """The terms that compare logits and basis with the target features (B, C, h, w), or with masks (B, H, W)."""
    num_images, size = len(batch), (config.data.size, config.data.size)
    logits, has_own_rows = output.logits[:num_images], config.slots.per_class == "own"
    terms: dict[str, Tensor] = {}
    if "semantic" in wanted:
        basis = output.basis[:num_images] if has_own_rows else output.basis
        terms["semantic"] = semantic_consistency(logits, features, basis, size, masks)
    if "mixture" in wanted:
        parts, background, places = _directions_of(output, num_images, config)
        densities = None
        if output.placed is not None:
            assert places is not None
            densities = place_densities(places, output.placed.frame.first(num_images), output.placed.spread, size)
        kappa = config.losses.mixture_kappa
        terms["mixture"] = mixture_loss(logits, features, parts, background, size, kappa, densities=densities)
    if "background" in wanted:
        assert masks is not None
        terms["background"] = background_cross_entropy(logits, masks)
    if "orthonormality" in wanted:
        terms["orthonormality"] = orthonormality(output.basis)
    return terms


def _terms_of_maps(
    wanted: Mapping[str, float],
    maps: Tensor,
    features: Tensor,
    masks: Tensor | None,
    batch: Batch,
    config: Config,
    gather: Gather,
) -> dict[str, Tensor]:
    part_maps = maps[:, 1:]
    terms: dict[str, Tensor] = {}
    if "concentration" in wanted:
        terms["concentration"] = concentration(part_maps)
    if "entropy" in wanted:
        terms["entropy"] = entropy(maps)
    if "part_contrast" in wanted:
        temperature = config.losses.contrast_temperature
        terms["part_contrast"] = part_contrast(part_maps, features, batch.class_ids, temperature, gather)
    if "visual_consistency" in wanted:
        terms["visual_consistency"] = visual_consistency(part_maps, batch.images)
    if "visual_consistency_lab" in wanted:
        terms["visual_consistency_lab"] = visual_consistency_lab(part_maps, batch.images, masks)
    return terms


def _terms_of_warp(wanted: Mapping[str, float], plain: Tensor, of_warped: Tensor, warp: Warp) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    if "equivariance" in wanted:
        terms["equivariance"] = equivariance(plain, of_warped, warp)
    if "landmark_equivariance" in wanted:
        centres, moved = part_centres(plain[:, 1:]), part_centres(of_warped[:, 1:])
        terms["landmark_equivariance"] = landmark_equivariance(centres, moved, warp)
    return terms
