"""Where the directions of the mixture loss start."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from slotscops.config import config_from_mapping
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.model.basis import PartBasis, start_from_features
from slotscops.model.clusters import cells_of_objects
from slotscops.model.directions import Numbers, find_directions, sample_cells
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.network import build_network
from slotscops.shard.index import open_dataset


def clouds(*directions: int, each: int = 40) -> Tensor:
    """Unit vectors close to some of the eight axes, `each` of them an axis."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(8)[list(directions)].repeat_interleave(each, 0)
    return normalize(axes + 0.05 * torch.randn(axes.shape, generator=generator), dim=1)


def test_background_and_parts_are_clustered_apart_and_a_part_has_its_directions_together() -> None:
    vectors = clouds(0, 1, 2, 3, 4, 5)
    is_background = torch.arange(240) < 80  # the clouds 0 and 1
    found = find_directions(vectors, is_background, Numbers(parts=4, each=2, background=2), seed=0)
    assert found is not None
    parts, background = found
    assert sorted(background.argmax(1).tolist()) == [0, 1]
    axes = parts.argmax(1).view(4, 2)
    assert (axes[:, 0] == axes[:, 1]).all()
    assert sorted(axes[:, 0].tolist()) == [2, 3, 4, 5]


def test_too_few_cells_for_as_many_directions_give_none() -> None:
    vectors = clouds(0, 1)
    numbers = Numbers(parts=3, each=1, background=3)
    assert find_directions(vectors, torch.arange(80) < 2, numbers, seed=0) is None
    assert find_directions(vectors, torch.arange(80) < 78, numbers, seed=0) is None


def test_a_part_with_fewer_cells_than_directions_repeats_its_centre() -> None:
    vectors = torch.cat([clouds(0, each=2), clouds(1, 2)])
    found = find_directions(vectors, torch.arange(82) >= 42, Numbers(parts=2, each=3, background=1), seed=0)
    assert found is not None
    small = found[0].view(2, 3, 8)[found[0].view(2, 3, 8)[:, 0].argmax(1) == 0]
    torch.testing.assert_close(small, normalize(vectors[:2], dim=1).mean(0).expand(1, 3, 8))


def test_the_basis_is_the_mean_of_a_parts_directions_and_an_image_has_those_of_its_class() -> None:
    basis = PartBasis(3, 5, "free", num_classes=2, num_each=2, num_background=4)
    class_ids = torch.tensor([1, 0, 1])
    directions = basis.directions(class_ids)
    assert directions is not None
    assert directions.parts.shape == (3, 3, 2, 5)
    assert directions.background.shape == (3, 4, 5)
    torch.testing.assert_close(directions.background[0], basis.background_parameter[4:])  # type: ignore[index]
    torch.testing.assert_close(directions.parts[1].flatten(0, 1), basis.basis_parameter[:6])
    torch.testing.assert_close(basis(class_ids), directions.parts.mean(2))
    assert PartBasis(3, 5).directions() is None


def train_split(shards: Path, with_object_masks: bool = False) -> Split:
    dataset = open_dataset(shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), False, with_object_masks=with_object_masks)


def test_cells_are_sampled_with_their_place_on_the_border_or_in_the_object(toy_shards: Path) -> None:
    split = train_split(toy_shards, with_object_masks=True)
    batch = split.read(torch.arange(len(split)).numpy())
    assert batch.features is not None
    assert batch.object_masks is not None
    grid = batch.features.shape[-2:]
    is_border = torch.ones(grid, dtype=torch.bool)
    is_border[1:-1, 1:-1] = False
    inside = cells_of_objects(batch.object_masks, grid)
    for with_masks, wanted in ((False, is_border.expand(len(batch), *grid)), (True, inside)):
        vectors, flags = sample_cells(split, 0, with_masks)
        assert vectors.shape == (inside.numel(), batch.features.shape[1])
        for flag in (False, True):
            expected = batch.features.float().permute(0, 2, 3, 1)[wanted == flag]
            torch.testing.assert_close(vectors[flags == flag].sum(0), expected.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target_mask", ["none", "object", "guessed"])
@pytest.mark.parametrize("per_class", ["shared", "own"])
def test_all_directions_start_as_clusters_of_the_cache_and_twice_as_the_same(
    toy_shards: Path, target_mask: str, per_class: str
) -> None:
    settings = {
        "losses": {"mixture": 1.0, "target_mask": target_mask},
        "basis": {"kind": "free", "init": "kmeans", "background_directions": 2},
        "slots": {"num_parts": 2, "per_class": per_class},
        "encoder": {"name": "features"},
        "teacher": {"transform": "channel_standardised"},
    }
    config = config_from_mapping(settings, "test")
    split = train_split(toy_shards, with_object_masks=target_mask == "object")
    num_classes = len(split.dataset.class_names) if per_class == "own" else None
    starts = []
    for seed in (0, 1):  # the random rows before differ, the clusters do not
        torch.manual_seed(seed)
        network = build_network(FeatureEncoder(512), config, 512, num_classes)
        start_from_features(network.basis, network.target, split, config, network.object_guess)
        assert network.basis.background_parameter is not None
        starts.append((network.basis.basis_parameter.detach(), network.basis.background_parameter.detach()))
    present = set(split.class_ids().tolist())
    assert len(present) == 2 < len(split.dataset.class_names)
    for one, other in zip(*starts, strict=True):
        for class_id, (rows, others) in enumerate(zip(one.split(2), other.split(2), strict=True)):
            if per_class == "shared" or class_id in present:
                assert torch.equal(rows, others)
                assert (rows.norm(dim=1) <= 1 + 1e-5).all(), "centres of unit vectors"
            else:
                assert not torch.equal(rows, others), "a class without photos starts from chance"
