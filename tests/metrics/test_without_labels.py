import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slotscops.config import config_from_mapping
from slotscops.core.errors import UserError
from slotscops.features import __main__ as features
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.losses.semantic import semantic_consistency
from slotscops.metrics.scores import PartScores
from slotscops.metrics.stability import label_photos
from slotscops.metrics.without_labels import agreement_of, score_without_labels
from slotscops.model.network import ModelOutput, SlotScops
from slotscops.shard.index import open_dataset
from slotscops.train.build import build_model


def test_agreement_by_hand_and_of_a_collapsed_network() -> None:
    table = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert agreement_of(table)["agreement"] == pytest.approx((6 / 8 + 4 / 6 + 0) / 3)
    assert 0 < agreement_of(table)["agreement_nmi"] < 1
    assert agreement_of(np.diag([5, 5, 5])) == {"agreement": 1, "agreement_nmi": 1}
    assert agreement_of(np.diag([9, 0, 0])) == {"agreement": pytest.approx(1 / 3), "agreement_nmi": 0}


def network_of(shards: Path, encoder: str, **settings: Any) -> tuple[SlotScops, Split, Any]:
    given = {"encoder": {"name": encoder, "weights": "random:0"}, "data": {"size": 64}} | settings
    config = config_from_mapping(given, "test")
    dataset = open_dataset(shards)
    cache = open_cache(dataset, "relu5_4", 64, mirrored=config.data.mirror)
    return build_model(config, cache.shape[0]), Split(dataset, "val", cache, with_labels=False), config


class LogitsOf(torch.nn.Module):
    """Stands for a network: the logits are what a function makes of the input."""

    def __init__(self, network: SlotScops, logits_of: Any) -> None:
        super().__init__()
        self.target, self.basis = network.target, network.basis
        self.object_guess = None
        self.num_slots, self.num_classes = network.num_slots, network.num_classes
        self.takes_features, self._logits_of = network.takes_features, logits_of

    def forward(self, inputs: Tensor, class_ids: Tensor | None = None) -> ModelOutput:
        logits = self._logits_of(inputs.float())
        return ModelOutput(inputs, None, logits, self.basis(), None)


def left_half(inputs: Tensor) -> Tensor:
    """Slot 1 wherever a cell lies in the left half of what is shown, slot 0 elsewhere: it ignores the photo."""
    logits = torch.zeros(len(inputs), 6, *inputs.shape[2:])
    logits[:, 1, :, : inputs.shape[3] // 2] = 1
    logits[:, 0, :, inputs.shape[3] // 2 :] = 1
    return logits


def of_content(inputs: Tensor) -> Tensor:
    """The first six channels, three colours twice: it follows the photo wherever it moves."""
    return inputs[:, :6] if inputs.shape[1] > 3 else torch.cat([inputs, -inputs], 1) / 64


@pytest.fixture(scope="module")
def mirrored_shards(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = tmp_path_factory.mktemp("mirrored") / "shards"
    shutil.copytree(toy_shards, shards)
    arguments = ["--shards", str(shards), "--teacher-weights", "random:0", "--size", "64", "--mirrored"]
    assert features.main(arguments) == 0
    return shards


@pytest.mark.parametrize("encoder", ["features", "resnet18"])
def test_a_network_that_follows_the_photo_agrees_and_one_that_sees_only_positions_does_not(
    toy_shards: Path, encoder: str
) -> None:
    network, split, config = network_of(toy_shards, encoder)
    follows, ignores = (
        score_without_labels(LogitsOf(network, logits), split, config)  # type: ignore[arg-type]
        for logits in (of_content, left_half)
    )
    # Features are seen in crops that are shifted by one cell of four, photos in mirror images.
    assert follows["agreement"] > 1.5 * ignores["agreement"]
    if encoder == "features":
        assert follows["agreement_nmi"] == pytest.approx(1)
    else:
        assert ignores["agreement"] == 0  # what was left is right


def test_features_of_mirrored_crops_are_compared_where_they_are_cached(mirrored_shards: Path) -> None:
    network, split, config = network_of(mirrored_shards, "features", data={"size": 64, "mirror": True})
    scores = score_without_labels(LogitsOf(network, left_half), split, config)  # type: ignore[arg-type]
    assert scores["agreement"] == 0  # what was left is right


def test_the_likelihood_is_that_of_the_whole_split_and_training_draws_on_as_if_nothing_were_scored(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, split, config = network_of(toy_shards, "features", slots={"init": "shared_gaussian"})
    network.train()
    state = torch.get_rng_state()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "manual_seed_all", None)  # no GPU takes part
        scores = score_without_labels(network, split, config)
        label_photos(network, split)
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    batch = split.read(np.arange(len(split)))
    torch.manual_seed(config.seed)
    assert batch.features is not None
    with torch.no_grad():
        output = network.eval()(batch.features.float())
    wanted = semantic_consistency(output.logits, batch.features.float(), output.basis, (64, 64))
    assert scores["loss_semantic"] == pytest.approx(wanted.item(), rel=1e-5)
    assert scores["likelihood"] == -scores["loss_semantic"]


def test_a_network_that_is_not_finite_has_no_score(toy_shards: Path) -> None:
    network, split, config = network_of(toy_shards, "features")
    broken = LogitsOf(network, lambda inputs: left_half(inputs) * float("nan"))
    scores = score_without_labels(broken, split, config)  # type: ignore[arg-type]
    assert all(np.isnan(value) for value in scores.values())


def test_a_grid_too_small_to_shift_is_refused(toy_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, split, config = network_of(toy_shards, "features")
    plain = Split.read

    def read_corner(self: Split, samples: Any) -> Any:
        batch = plain(self, samples)
        assert batch.features is not None
        return replace(batch, features=batch.features[:, :, :2, :2])

    monkeypatch.setattr(Split, "read", read_corner)
    with pytest.raises(UserError, match=r"a grid of 2 x 2 cells .* set data\.mirror=true"):
        score_without_labels(network, split, config)


def test_objects_face_in_both_views_as_the_network_itself_finds(toy_shards: Path) -> None:
    network, split, config = network_of(
        toy_shards,
        "resnet18",
        decoder={"maps": "attention", "places": "facing"},
        basis={"kind": "free"},
        losses={"mixture": 1.0, "target_mask": "object"},
    )
    assert network.basis.place_parameter is not None
    torch.nn.init.normal_(network.basis.place_parameter)
    photos = split.read(np.arange(len(split))).images
    with torch.no_grad():
        one, other = (network(seen).maps(photos.shape[2:]).argmax(1) for seen in (photos, photos.flip(3)))
    by_hand = PartScores(network.num_slots, network.num_slots)
    by_hand.update(one, other.flip(2))
    assert score_without_labels(network, split, config)["agreement"] == agreement_of(by_hand.table.numpy())["agreement"]
