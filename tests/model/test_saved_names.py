"""The names of saved tensors: checkpoints of earlier versions must load."""

import copy

import pytest
import torch

from slotscops.config import load_config
from slotscops.model.saved_names import saved_parameter_names
from slotscops.train.build import build_model

NORM = ["norm.bias", "norm.weight"]
ATTENTION = [
    *(f"slot_attention.gru.{kind}_{side}" for kind in ("bias", "weight") for side in ("hh", "ih")),
    "slot_attention.key.weight",
    *(f"slot_attention.{name}.{kind}" for name in ("mlp.0", "mlp.2") for kind in ("bias", "weight")),
    *(f"slot_attention.norm_{name}.{kind}" for name in ("inputs", "mlp", "slots") for kind in ("bias", "weight")),
    "slot_attention.query.weight",
    "slot_attention.value.weight",
]
TOKENS = ["positions.project.bias", "positions.project.weight", "project.bias", "project.weight"]
SLOTS = [*NORM, *TOKENS, *ATTENTION, "basis_parameter"]
BRANCHES = [f"branches.{branch}.{kind}" for branch in range(4) for kind in ("bias", "weight")]
DECODER = [
    "decoder.positions.project.bias",
    "decoder.positions.project.weight",
    *(f"decoder.head.{n}" for n in BRANCHES),
]
CONDITION = ["slot_attention.condition.bias", "slot_attention.condition.weight"]

CONFIGURATIONS = {
    "default": ([], [*SLOTS, *DECODER, "slot_attention.start"]),
    "shared_gaussian": (
        ["slots.init=shared_gaussian"],
        [*SLOTS, *DECODER, "slot_attention.mean", "slot_attention.log_sigma"],
    ),
    "attention": (
        ["decoder.maps=attention", "slots.init=image_conditioned"],
        [*SLOTS, "slot_attention.start", *CONDITION],
    ),
    "head_only": (["decoder.maps=head_only"], [*NORM, *(f"head.{name}" for name in BRANCHES), "basis_parameter"]),
    "mixture": (
        ["decoder.maps=head_only", "losses.mixture=1", "basis.part_directions=2", "decoder.places=facing"],
        [*NORM, *(f"head.{name}" for name in BRANCHES), "basis_parameter", "background_parameter", "place_parameter"],
    ),
    "own": (
        ["slots.per_class=own", "teacher.transform=channel_standardised"],
        [*SLOTS, *DECODER, "slot_attention.start", "class_head.bias", "class_head.weight", "target.scale"],
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_saved_tensors_keep_their_names_and_load_again(name: str) -> None:
    settings, names = CONFIGURATIONS[name]
    config = load_config(None, ["encoder.name=features", *settings])
    network = build_model(config, 16, num_classes=3)
    saved = network.state_dict()
    assert sorted(saved) == sorted(names)
    other = copy.deepcopy(build_model(load_config(None, [*settings, "encoder.name=features", "seed=1"]), 16, True, 3))
    assert any(not torch.equal(tensor, saved[key]) for key, tensor in other.state_dict().items())
    other.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: tensor for key, tensor in saved.items() if key != "basis_parameter"})
    assert sorted(saved_parameter_names(network).values()) == sorted(key for key in saved if key != "target.scale")
