from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
import torch
from commands import ROOT, metrics, train
from forks import ranks

from slotscops.config import Config, LossWeights, MapsFrom, config_from_mapping, load_config
from slotscops.core.errors import UserError
from slotscops.core.records import Batch
from slotscops.losses.objective import check_objective, compute_terms, weighted_sum
from slotscops.train.build import build_model
from slotscops.train.loop import Trainer
from slotscops.train.processes import start_accelerator

FEATURES = {"encoder": {"name": "features"}}
ALL_BUT_WARPS = {
    "concentration": 0.1,
    "orthonormality": 0.1,
    "entropy": 0.1,
    "presence": 0.1,
    "total_variation": 0.1,
    "part_contrast": 0.1,
    "visual_consistency": 0.1,
    "visual_consistency_lab": 0.1,
    "mixture": 0.1,
    "background": 0.1,
}
WITH_MIXTURE = ["basis.kind=free", "losses.target_mask=object"]  # what the mixture and the background's term need
RESNET = {"encoder": {"name": "resnet18", "weights": "random:0"}}
CHOICES = [
    {"losses": ALL_BUT_WARPS | {"target_mask": "object"}, "basis": {"kind": "free"}},
    {"losses": {"target_mask": "object"}},
    {"losses": {"semantic": 0.0, "mixture": 1.0}, "basis": {"kind": "free", "init": "kmeans", "part_directions": 2}},
    {
        "losses": {"mixture": 1.0, "target_mask": "object"},
        "basis": {"kind": "free", "init": "kmeans"},
        "decoder": {"maps": "attention", "places": "facing"},
    },
    {"losses": {"equivariance": 1.0, "landmark_equivariance": 1.0}} | RESNET,
    {"teacher": {"transform": "sqrt"}, "basis": {"init": "kmeans"}},
    {"basis": {"init": "uneven_kmeans"}, "slots": {"token_hidden": 32}},
    {"teacher": {"transform": "channel_standardised", "layer_weights": [0.5]}},
    {"teacher": {"transform": "l2"}, "basis": {"kind": "free"}},
    {"slots": {"init": "image_conditioned"}, "decoder": {"maps": "attention"}},
    {"slots": {"gradient": "last_iteration"}},
    {"slots": {"per_class": "own"}, "losses": {"equivariance": 1.0, "orthonormality": 0.1}} | RESNET,
    {
        "slots": {"per_class": "own"},
        "losses": {"semantic": 0.0, "mixture": 1.0, "equivariance": 1.0, "target_mask": "object"},
        "basis": {"kind": "free", "init": "kmeans"},
        "decoder": {"places": "facing"},
    }
    | RESNET,
    {"slots": {"gradient": "bilevel"}, "decoder": {"maps": "attention"}},
    {"decoder": {"maps": "head_only"}},
    {"decoder": {"kind": "mlp_broadcast", "grid": None}},
    {"decoder": {"kind": "conv"}},
    {"decoder": {"mixing": True}},
]  # fmt: skip


def small_config(shards: Path, run_dir: Path, choice: dict[str, object]) -> Config:
    base: dict[str, object] = {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards), "size": 64, "num_workers": 0},
        "train": {"batch_size": 4, "total_steps": 2, "eval_every_steps": 0, "mixed_precision": "no"},
    }
    return config_from_mapping(FEATURES | base | choice, "test")


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_two_steps_run_and_every_parameter_that_trains_moves(toy_shards: Path, tmp_path: Path, choice: dict) -> None:  # type: ignore[type-arg]
    config = small_config(toy_shards, tmp_path, choice)
    trainer = Trainer(config, start_accelerator(config))
    batches = trainer.open_batches(2)
    for _ in range(2):
        loss, _ = trainer.take_step(batches)
        assert torch.isfinite(loss)
    wanted = {name for name in vars(config.losses) if isinstance(getattr(config.losses, name), float)}
    wanted = {name for name in wanted - {"contrast_temperature", "mixture_kappa"} if getattr(config.losses, name)}
    wanted |= {"classification"} if config.slots.per_class == "own" else set()
    assert set(trainer._terms) == wanted


TERMS = [field.name for field in fields(LossWeights)]
TRAIN_THE_BASIS = {"semantic", "mixture", "orthonormality"}
# Two terms of which neither trains the basis give gradients to what one of them does alone.
PAIRS = [names for names in combinations(TERMS, 2) if TRAIN_THE_BASIS & set(names)]
ALONE_AND_IN_PAIRS = [names for names in [*combinations(TERMS, 1), *PAIRS] if names != ("orthonormality",)]


@pytest.mark.parametrize("maps", get_args(MapsFrom))
@pytest.mark.parametrize("names", ALONE_AND_IN_PAIRS, ids="+".join)
def test_every_parameter_that_trains_gets_a_gradient_from_each_term_and_each_pair(
    names: tuple[str, ...], maps: str
) -> None:
    """With several processes, a parameter without a gradient ends a run at its second step."""
    needs_photos = any(name.endswith("equivariance") for name in names)
    losses: dict[str, float | str] = {"semantic": 0.0, "target_mask": "object", **dict.fromkeys(names, 1.0)}
    encoder = RESNET if needs_photos else FEATURES
    size = 32 if needs_photos else 64
    settings = {"losses": losses, "data": {"size": size}, "decoder": {"maps": maps}, "basis": {"kind": "free"}}
    settings |= encoder
    config = config_from_mapping(settings, "test")
    check_objective(config, 1, 1)
    network = build_model(config, 16)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    features, masks = torch.rand(2, 16, 4, 4).half(), torch.rand(2, size, size) > 0.5
    batch = Batch(images, features, None, masks, torch.zeros(2, dtype=torch.int64), ["a_0", "b_0"])
    _, terms = compute_terms(network, network.target, batch, config, step=0)
    assert set(terms) == set(names)
    weighted_sum(terms, config.losses, step=0).backward()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert network.basis.basis_parameter.requires_grad == bool(TRAIN_THE_BASIS & set(names))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"mixture": 1.0}}, r"losses\.mixture .* basis\.kind is relu; set basis\.kind=free"),
        ({"basis": {"part_directions": 3}}, r"basis\.part_directions is 3, but only losses\.mixture .* set it to 1"),
        (
            {"losses": {"background": 1.0}},
            r"target_mask is none; set it to object or guessed, or losses\.background to 0",
        ),
        (
            {"decoder": {"places": "facing"}, "losses": {"target_mask": "object"}},
            r"places is facing, but only losses\.mixture trains places, and it is 0; set it to 1 or decoder\.places to",
        ),
        (
            {"decoder": {"places": "upright"}, "losses": {"mixture": 1.0}, "basis": {"kind": "free"}},
            r"places is upright, which needs .*target_mask is none; set it to object or guessed, or",
        ),
    ],
)
def test_settings_that_exclude_the_mixture_or_the_masks_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(config_from_mapping(FEATURES | settings, "test"), 1, 1)


def test_orthonormality_alone_is_refused() -> None:
    config = config_from_mapping({"losses": {"semantic": 0.0, "orthonormality": 1.0}} | FEATURES, "test")
    with pytest.raises(UserError, match=r"losses\.orthonormality is the only loss.*set losses\.semantic too"):
        check_objective(config, 1, 1)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_builds(path: Path) -> None:
    config = load_config(path, ["encoder.weights=random:0"] if "resnet" in load_config(path).encoder.name else [])
    check_objective(config, num_processes=1, microbatches=1)
    assert build_model(config, feature_channels=8, pretrained=False).num_slots == config.slots.num_parts + 1


def test_equivariance_of_cached_features_is_refused_by_name() -> None:
    config = config_from_mapping(FEATURES | {"losses": {"equivariance": 1.0}}, "test")
    with pytest.raises(UserError, match=r"losses\.equivariance warps photos, but encoder\.name is features"):
        check_objective(config, num_processes=1, microbatches=1)


def test_entropy_grows_to_its_weight_and_the_other_terms_have_theirs_at_once() -> None:
    losses = config_from_mapping({"losses": {"entropy": 0.5, "entropy_ramp_steps": 10}}, "test").losses
    terms = {"semantic": torch.tensor(1.0), "entropy": torch.tensor(4.0), "classification": torch.tensor(0.25)}
    totals = [weighted_sum(terms, losses, step).item() for step in (0, 5, 10, 11)]
    assert totals == [1.25, 2.25, 3.25, 3.25]


def test_contrast_of_a_single_photo_is_refused() -> None:
    settings = {"losses": {"part_contrast": 1.0}, "train": {"batch_size": 4}}
    config = config_from_mapping(settings, "test")
    check_objective(config, num_processes=4, microbatches=1)  # one photo each: they compare those of all processes
    with pytest.raises(UserError, match=r"a microbatch holds 1; raise train\.batch_size"):
        check_objective(config, num_processes=1, microbatches=4)
    settings["train"] |= {"reduction": "deterministic"}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"a microbatch holds 1; raise train\.batch_size"):
        check_objective(config_from_mapping(settings, "test"), num_processes=4, microbatches=1)


def test_two_processes_under_bf16_log_every_term_and_agree_with_one(toy_shards: Path, tmp_path: Path) -> None:
    settings = [f"losses.{name}={weight}" for name, weight in ALL_BUT_WARPS.items()]
    settings += [
        *WITH_MIXTURE,
        "basis.init=kmeans",
        "train.total_steps=1",
        "teacher.transform=sqrt",
        "train.mixed_precision=bf16",
    ]
    done = train(ranks(2), toy_shards, tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    one = train(["python"], toy_shards, tmp_path / "one", *settings)
    assert one.returncode == 0, one.stderr
    first, second = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    for name in ("semantic", *ALL_BUT_WARPS):
        assert second[f"loss_{name}"] == pytest.approx(first[f"loss_{name}"], rel=1e-4)
