"""The frame of an object, the places of its parts in it, and which way it faces."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from slotscops.config import config_from_mapping
from slotscops.features.cache import open_cache
from slotscops.loader.split import Split
from slotscops.model.basis import start_from_features
from slotscops.model.directions import sample_cells
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.facings import find_facings, sample_places
from slotscops.model.network import SlotScops, build_network
from slotscops.model.object_frame import ObjectFrame, find_facing, find_frame, in_frame, place_densities
from slotscops.shard.index import open_dataset

SETTINGS = {
    "losses": {"mixture": 1.0, "target_mask": "object"},
    "basis": {"kind": "free", "init": "kmeans", "background_directions": 2},
    "slots": {"num_parts": 2},
    "encoder": {"name": "features"},
    "decoder": {"maps": "head_only", "places": "facing"},
}


def frame_of(centre: tuple[float, float], extent: tuple[float, float], facing: float = 1.0) -> ObjectFrame:
    return ObjectFrame(torch.tensor([centre]), torch.tensor([extent]), torch.tensor([facing]))


@settings(deadline=None)
@given(
    top=st.integers(0, 40),
    left=st.integers(0, 40),
    height=st.integers(4, 60),
    width=st.integers(4, 60),
)
def test_the_frame_of_a_box_is_its_middle_and_half_its_sides(top: int, left: int, height: int, width: int) -> None:
    share = torch.zeros(1, 101, 101)
    share[0, top : top + height + 1, left : left + width + 1] = 1
    frame = find_frame(share)
    # Cell n of 101 lies at n / 50 - 1. Evenly spaced points spread a little wider than a solid box.
    torch.testing.assert_close(frame.centre[0], torch.tensor([top + height / 2, left + width / 2]) / 50 - 1)
    wanted = torch.tensor([height, width]) / 100
    torch.testing.assert_close(
        frame.extent[0], (wanted * (1 + 2 / (100 * wanted)).sqrt()).clamp_min(0.1), rtol=1e-3, atol=0
    )
    assert frame.facing.tolist() == [1]


def test_an_image_without_an_object_has_a_finite_frame() -> None:
    frame = find_frame(torch.zeros(2, 5, 5))
    assert all(tensor.isfinite().all() for tensor in frame)
    assert (frame.extent >= 0.1).all()


def test_the_frame_is_as_exact_under_autocast() -> None:
    share = torch.rand(3, 9, 11)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_frame(share)
    for one, other in zip(found, find_frame(share), strict=True):
        assert torch.equal(one, other)


def test_every_slot_has_a_density_over_the_crop() -> None:
    places = torch.tensor([[0.5, -0.4], [-0.2, 0.3]])
    frame = frame_of((0.1, -0.2), (0.5, 0.4), facing=-1.0)
    side = 801
    densities = place_densities(places, frame, 0.2, (side, side)).over_grid().exp()[0]  # (S, h, w)
    areas = densities.mean((1, 2)) * 4  # the crop's sides are 2
    torch.testing.assert_close(areas, torch.ones(3), rtol=5e-3, atol=0)
    row, column = divmod(int(densities[1].argmax()), side)
    found = torch.tensor([row, column]) * 2 / (side - 1) - 1
    torch.testing.assert_close(found, torch.tensor([0.1 + 0.5 * 0.5, -0.2 + 0.4 * 0.4]), rtol=0, atol=3e-3)


def test_an_object_that_is_turned_around_is_found_to_face_the_other_way() -> None:
    places = torch.tensor([[0.0, 0.7], [0.0, -0.7]])
    frame = frame_of((0.0, 0.0), (1.0, 1.0))
    shares = place_densities(places, frame, 0.3, (6, 9)).over_grid().log_softmax(1)
    both = torch.cat([shares, shares.flip(3)])
    frames = ObjectFrame(*(tensor.expand(2, *tensor.shape[1:]) for tensor in frame))
    assert find_facing(both, places, frames, 0.3).tolist() == [1, -1]
    columns = in_frame(frames._replace(facing=torch.tensor([1.0, -1.0])), (6, 9))[1]
    torch.testing.assert_close(columns[0], columns[1].flip(0))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_the_facings_of_a_sample_are_found_up_to_a_common_sign(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randint(0, 2, (40,), generator=generator) * 2.0 - 1
    ends = torch.tensor([[0.0, 0.8], [0.0, 0.0], [0.0, -0.8]]).repeat(40, 4).view(-1, 2)  # head, body, tail
    images = torch.arange(40).repeat_interleave(12)
    places = ends + 0.1 * torch.randn(ends.shape, generator=generator)
    places[:, 1] *= turns[images]
    # Head and tail look a little different, and the legs at both ends quite alike.
    looks = torch.eye(6)[torch.where(ends[:, 1] > 0.5, 0, torch.where(ends[:, 1] < -0.5, 1, 2))]
    looks[::5] = torch.eye(6)[3]
    vectors = normalize(looks + 0.2 * torch.randn(looks.shape, generator=generator), dim=1)
    found = find_facings(vectors, places, images, 40, 4, 1.0, seed=0)
    same = (found == turns).float().mean().item()
    assert max(same, 1 - same) == 1


def test_fewer_cells_than_centres_all_face_right() -> None:
    found = find_facings(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 2]), 4, 3, 1.0, seed=0)
    assert found.tolist() == [1, 1, 1, 1]


def toy_split(shards: Path) -> Split:
    dataset = open_dataset(shards)
    return Split(dataset, "train", open_cache(dataset, "relu5_4", 64), False, with_object_masks=True)


def build(**changes: object) -> SlotScops:
    config = config_from_mapping(SETTINGS | changes, "test")
    return build_network(FeatureEncoder(512), config, 512, None)


def test_places_are_sampled_from_the_same_cells_as_features(toy_shards: Path) -> None:
    split, network = toy_split(toy_shards), build()
    vectors, flags = sample_cells(split, 0, with_masks=True)
    places, images, inside = sample_places(split, 0, network.target, None)
    assert torch.equal(inside, flags)
    assert len(places) == len(vectors)
    assert images.unique().tolist() == list(range(len(split)))
    of_objects = places[inside]
    assert of_objects.mean(0).abs().max() < 0.05, "an object's cells lie around its middle"
    assert of_objects.abs().max() < 3


@pytest.mark.parametrize("target_mask", ["object", "guessed"])
@pytest.mark.parametrize("per_class", ["shared", "own"])
def test_places_start_from_clusters_and_twice_from_the_same(toy_shards: Path, target_mask: str, per_class: str) -> None:
    split, starts = toy_split(toy_shards), []
    losses = {"mixture": 1.0, "target_mask": target_mask}
    decoder = {"maps": "attention", "places": "facing"}
    changes = {"losses": losses, "decoder": decoder, "slots": {"num_parts": 2, "per_class": per_class}}
    config = config_from_mapping(SETTINGS | changes, "test")
    for seed in (0, 1):
        torch.manual_seed(seed)
        num_classes = len(split.dataset.class_names) if per_class == "own" else None
        network = build_network(FeatureEncoder(512), config, 512, num_classes)
        start_from_features(network.basis, network.target, split, config, network.object_guess)
        assert network.basis.place_parameter is not None
        starts.append(network.basis.place_parameter.detach())
    assert torch.equal(*starts)
    assert starts[0].abs().max() > 0.1
    assert starts[0].abs().max() < 3


def placed_network() -> tuple[SlotScops, Tensor]:
    """A network whose two parts lie at the two ends, and features (2, 512, 4, 7), one mirrored from the other.

    One part looks unlike all else.
    """
    network = build().eval()
    head = network.part_logits
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        assert network.basis.place_parameter is not None
        network.basis.place_parameter.copy_(torch.tensor([[0.0, 0.8], [0.0, -0.8]]))
        norm, branch = head.norm, head.head.branches[0]  # type: ignore[union-attr]
        norm.weight.fill_(1)  # type: ignore[union-attr, operator]
        branch.weight[1, 0, 1, 1] = 1.0  # type: ignore[index, union-attr]
        branch.bias.copy_(torch.tensor([-5.0, 0.0, 0.0]))  # type: ignore[operator, union-attr]
    features = torch.zeros(1, 512, 4, 7)
    features[:, 0, :, 6] = 1  # the first part's look, on the right
    return network, torch.cat([features, features.flip(3)])


def test_a_mirrored_photo_has_mirrored_maps_and_the_other_facing() -> None:
    network, features = placed_network()
    output = network(features)
    assert output.placed is not None
    assert output.placed.frame.facing.tolist() == [1, -1]
    torch.testing.assert_close(output.logits[1], output.logits[0].flip(2))
    labels = output.logits.argmax(1)
    assert labels[0, 0].tolist()[:2] == [2, 2], "what looks like nothing is told by its place"
    assert labels[1, 0].tolist()[-2:] == [2, 2]
    assert labels[0, 0, -1] == labels[1, 0, 0] == 1


def test_another_facing_moves_the_places_of_the_first_images_only() -> None:
    network, features = placed_network()
    output = network(features)
    turned = output.turned(torch.tensor([-1.0]))
    assert turned.placed.frame.facing.tolist() == [-1, -1]
    assert not torch.allclose(turned.logits[0], output.logits[0])
    assert torch.equal(turned.logits[1], output.logits[1])
    back = turned.turned(torch.tensor([1.0, -1.0]))
    assert torch.equal(back.logits, output.logits)


def test_upright_parts_never_turn() -> None:
    torch.manual_seed(0)
    network = build(decoder={"maps": "head_only", "places": "upright"}).eval()
    output = network(torch.randn(6, 512, 4, 5))
    assert output.placed.frame.facing.tolist() == [1] * 6


def test_a_slot_that_is_left_out_takes_its_place_with_it() -> None:
    network, features = placed_network()
    whole = network(features)
    network.keep_slots([0, 2])
    pruned = network(features)
    assert torch.equal(pruned.logits, whole.logits[:, [0, 2]])
    assert torch.equal(pruned.directions.places, whole.directions.places[[1]])
    assert pruned.placed.frame.facing.tolist() == whole.placed.frame.facing.tolist()
