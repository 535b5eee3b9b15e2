"""Builds a network and its optimizer from settings, and loads a trained network from a run or a published model."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from slotscops.config import Config
from slotscops.core.errors import UserError
from slotscops.core.seeding import seeded
from slotscops.core.timm_networks import is_timm
from slotscops.losses.objective import trains_basis
from slotscops.model.encoder import Encoder, FeatureEncoder, ResNetEncoder, TimmEncoder
from slotscops.model.network import SlotScops, build_network
from slotscops.train.run.checkpoint import State, restore_model
from slotscops.train.run.folder import load_newest, read_config
from slotscops.train.run.published import is_published, read_published

_PROJECTION = "encoder.projection"  # the name under which a model's projection is saved


def build_model(
    config: Config,
    feature_channels: int,
    pretrained: bool = True,
    num_classes: int = 1,
    projection: Tensor | None = None,
) -> SlotScops:
    """Builds the network of the settings on the CPU. The same settings, with their seed, give the same network.

    Parameters that no loss of the settings depends on are frozen, so every trainable parameter receives a gradient.

    Args:
        feature_channels: C of the teacher's features.
        pretrained: False if a checkpoint is loaded afterwards, so that no ImageNet weights are needed.
        num_classes: number of object classes; it matters only if `slots.per_class` is `own`.
        projection: (C, D) matrix of a cache that holds components. Only a model that reads the cache keeps it.

    Raises:
        UserError: if settings exclude each other, the encoder's weights cannot be obtained or do not fit, or it takes
            no photos of `data.size`.
    """
    with seeded(config.seed):
        encoder: Encoder
        if config.encoder.name == "features":
            encoder = FeatureEncoder(feature_channels, projection)
        else:
            weights = config.encoder.weights if pretrained else None
            build = TimmEncoder if is_timm(config.encoder.name) else ResNetEncoder
            encoder = build(config.encoder.name, weights, config.encoder.frozen_stages)
            if pretrained and isinstance(encoder, TimmEncoder):
                encoder.check_size(config.data.size)
        own_classes = num_classes if config.slots.per_class == "own" else None
        network = build_network(encoder, config, feature_channels, own_classes)
    network.basis.requires_grad_(trains_basis(config.losses))
    return network


def build_optimizer(config: Config, model: SlotScops) -> Optimizer:
    """SGD as in SCOPS, or AdamW, with separate learning rates for encoder, head and basis.

    With `encoder.layer_decay` d, depth k of n of a timm network learns d^(n - k) times as fast as its last one, as in
    BEiT (Bao et al., arXiv:2106.08254).

    Each group keeps its rate as `peak_learning_rate`; the trainer sets `lr` from the step.
    """
    train = config.train
    rates = {
        "encoder": train.learning_rate / 10 if train.encoder_learning_rate is None else train.encoder_learning_rate,
        "head": train.learning_rate,
        "basis": train.learning_rate if train.basis_learning_rate is None else train.basis_learning_rate,
    }
    groups = [
        {
            "name": name,
            "params": parameters,
            "lr": rate,
            "peak_learning_rate": rate,
            "weight_decay": 0.0 if name == "basis" else train.weight_decay,
        }
        for name, parameters, rate in _groups_with_rates(model, rates, config.encoder.layer_decay)
        if parameters
    ]
    if train.optimizer == "sgd":
        return SGD(groups, lr=train.learning_rate, momentum=train.momentum)
    return AdamW(groups, lr=train.learning_rate, fused=True)  # fused takes half the time of the default, on a CPU too


def _groups_with_rates(
    model: SlotScops, rates: Mapping[str, float], layer_decay: float
) -> list[tuple[str, list[nn.Parameter], float]]:
    """Name, parameters and peak rate of each group. With a layer decay, each depth of the encoder is a group."""
    groups = model.parameter_groups()
    encoder = model.encoder
    if layer_decay == 1 or not isinstance(encoder, TimmEncoder):
        return [(name, parameters, rates[name]) for name, parameters in groups.items()]
    depths = {parameter: encoder.parameter_depths()[name] for name, parameter in encoder.named_parameters()}
    deepest = max(depths.values())
    of_encoder = [
        (
            f"encoder_{depth}",
            [one for one in groups["encoder"] if depths[one] == depth],
            layer_decay ** (deepest - depth),
        )
        for depth in range(deepest + 1)
    ]
    others = [(name, groups[name], rates[name]) for name in ("head", "basis")]
    return [(name, parameters, rates["encoder"] * factor) for name, parameters, factor in of_encoder] + others


class Trained(NamedTuple):
    """A trained network with its settings, the path it was read from, and the training state saved with it."""

    network: SlotScops
    config: Config
    path: Path  # of the checkpoint or the published model
    state: State


def load_model(run_or_checkpoint: Path) -> Trained:
    """Loads the trained network of a run, of a checkpoint, or of a published model (see `train.run.published`).

    Of a run it loads the newest checkpoint that is whole.

    Raises:
        UserError: if the path holds no model, the model is damaged, or its settings do not fit the tensors.
    """
    if is_published(run_or_checkpoint):
        path = run_or_checkpoint
        tensors, config, state = read_published(path)
    else:
        checkpoint = load_newest(run_or_checkpoint)
        path = checkpoint.path
        config = read_config(path)
        # The averaged weights are used if there are any, because training scored those.
        tensors = checkpoint.model if checkpoint.ema is None else checkpoint.ema
        state = checkpoint.state
    if "basis_parameter" not in tensors or tensors["basis_parameter"].ndim != 2:
        raise UserError(f"{path}: its model has no part basis; it is no model of slotscops")
    rows, channels = tensors["basis_parameter"].shape
    num_classes = max(1, rows // (config.slots.num_parts * config.basis.part_directions))
    projection = tensors.get(_PROJECTION)
    needs_projection = config.encoder.name == "features" and config.teacher.components is not None
    if needs_projection != (projection is not None and projection.shape[1:] == (channels,)):
        found = "none" if projection is None else f"one of shape {tuple(projection.shape)}"
        raise UserError(
            f"{path}: its settings name teacher.components {config.teacher.components}, its tensors hold {found} of "
            f"the projections to {channels} channels that this needs; restore its config.yaml"
        )
    model = build_model(config, channels, False, num_classes, None if projection is None else projection.clone())
    restore_model(model, tensors, path)
    if state.slot_numbers:
        try:
            model.keep_slots(state.slot_numbers)
        except ValueError as error:
            raise UserError(f"{path}: its header names {error}; get the model again") from None
    return Trained(model.eval(), config, path, state)
