"""The mixture loss against the plain one that builds every pixel's features, and the background's cross-entropy."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_probe import LargestTensor
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, interpolate, normalize

from slotscops.losses.mixture import mixture_loss
from slotscops.losses.regularisers import background_cross_entropy
from slotscops.model.object_frame import ObjectFrame, place_densities

GRIDS = [1, 2, 3, 7, 8]
sides = st.integers(1, 21)
grids = st.tuples(st.sampled_from(GRIDS), st.sampled_from(GRIDS))


@dataclass
class Case:
    logits: Tensor  # (B, S, h, w)
    features: Tensor  # (B, C, h, w)
    parts: Tensor  # (K, M, C) or (B, K, M, C)
    background: Tensor  # (M_0, C) or (B, M_0, C)
    size: tuple[int, int] = (13, 17)
    kappa: float = 10.0
    align_corners: bool = True

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, **{name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)})


def make_case(
    seed: int = 0,
    images: int = 2,
    num_parts: int = 3,
    each: int = 2,
    num_background: int = 3,
    channels: int = 5,
    grid: tuple[int, int] = (8, 7),
    feature_grid: tuple[int, int] = (6, 8),
    own: bool = False,
    **settings: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = (images,) if own else ()
    logits, features = 2 * normal(images, num_parts + 1, *grid), normal(images, channels, *feature_grid)
    parts, background = normal(*first, num_parts, each, channels), normal(*first, num_background, channels)
    return Case(logits, features, parts, background, **settings)


def materialised(
    logits: Tensor,
    features: Tensor,
    parts: Tensor,
    background: Tensor,
    size: tuple[int, int],
    kappa: float,
    align_corners: bool,
) -> Tensor:
    """The formula as it stands in the issue: features of every pixel, and the exponentials summed slot by slot."""
    shares = interpolate(logits, size, mode="bilinear", align_corners=align_corners).softmax(1)
    pixels = interpolate(normalize(features, dim=1), size, mode="bilinear", align_corners=align_corners)
    total = torch.zeros((), dtype=torch.float64)
    for image in range(len(logits)):
        of_image = (parts[image], background[image]) if parts.ndim == 4 else (parts, background)
        likelihood = torch.zeros(size, dtype=torch.float64)
        for slot, directions in enumerate([of_image[1], *of_image[0]]):
            cosines = torch.einsum("mc,cyx->myx", normalize(directions, dim=1), pixels[image])
            likelihood = likelihood + shares[image, slot] * (kappa * cosines).exp().mean(0)
        total = total - likelihood.log().mean()
    return total / len(logits)


def with_gradients(loss: Any, case: Case, **more: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients with respect to logits and both kinds of directions."""
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("logits", "parts", "background")}
    value = loss(*replace(case, **leaves).arguments(), **more)
    return (value.detach(), *torch.autograd.grad(value, list(leaves.values())))


cases = st.builds(
    make_case,
    seed=st.integers(0, 2**31),
    images=st.integers(1, 3),
    num_parts=st.integers(1, 4),
    each=st.integers(1, 3),
    num_background=st.integers(1, 4),
    channels=st.integers(2, 6),
    grid=grids,
    feature_grid=grids,
    own=st.booleans(),
    size=st.tuples(sides, sides),
    kappa=st.sampled_from([0.5, 10.0, 60.0]),
    align_corners=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(case=cases, rows_at_once=st.integers(1, 30))
def test_loss_and_gradients_are_those_of_the_plain_formula_also_in_pieces(case: Case, rows_at_once: int) -> None:
    wanted = with_gradients(materialised, case)
    row = len(case.logits) * (case.background.shape[-2] + case.parts.shape[-3:-1].numel()) * case.size[1]
    for found in (
        with_gradients(mixture_loss, case),
        with_gradients(mixture_loss, case, max_numbers=rows_at_once * row),
    ):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows_at_once", [3, 1000])
def test_places_multiply_what_each_slot_explains(rows_at_once: int) -> None:
    case = make_case(num_parts=3, each=2)
    places = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    frame = ObjectFrame(*torch.tensor([[[0.1, -0.2], [0.3, 0.0]], [[0.8, 0.5], [0.6, 1.1]]]), torch.tensor([1.0, -1.0]))
    densities = place_densities(places, frame, 0.3, case.size)
    row = 2 * 9 * case.size[1]
    found = mixture_loss(*case.arguments(), max_numbers=rows_at_once * row, densities=densities)
    shares = interpolate(case.logits, case.size, mode="bilinear", align_corners=True).softmax(1)
    pixels = interpolate(normalize(case.features, dim=1), case.size, mode="bilinear", align_corners=True)
    likelihood = torch.zeros(2, *case.size, dtype=torch.float64)
    for image in range(2):
        for slot, directions in enumerate([case.background, *case.parts]):
            explained = (10 * torch.einsum("mc,cyx->myx", normalize(directions, dim=1), pixels[image])).exp().mean(0)
            if slot:
                y = (torch.linspace(-1, 1, 13) - frame.centre[image, 0]) / frame.extent[image, 0]
                x = (torch.linspace(-1, 1, 17) - frame.centre[image, 1]) / frame.extent[image, 1] * frame.facing[image]
                distance = (y[:, None] - places[slot - 1, 0]) ** 2 + (x - places[slot - 1, 1]) ** 2
                area = 2 * math.pi * 0.3**2 * frame.extent[image].prod()
                explained = explained * (-distance / (2 * 0.3**2)).exp() / area
            else:
                explained = explained / 4
            likelihood[image] = likelihood[image] + shares[image, slot] * explained
    wanted = -likelihood.log().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, places, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_float32_is_within_its_rounding_of_float64() -> None:
    case = make_case(channels=64, size=(64, 64), grid=(16, 16), feature_grid=(16, 16))
    value = mixture_loss(*case.to(torch.float32).arguments())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), materialised(*case.arguments()), rtol=1e-5, atol=0)


def test_one_pixel_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3.0)]).reshape(1, 2, 1, 1)  # a quarter background, three quarters the part
    features = torch.tensor([0.0, 7.0]).reshape(1, 2, 1, 1)  # of length 1: (0, 1)
    parts, background = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[5.0, 0.0], [0.0, -1.0]])
    loss = mixture_loss(logits, features, parts, background, (1, 1), kappa=2.0)
    wanted = -math.log(0.75 * math.exp(2) + 0.25 * (math.exp(0) + math.exp(-2)) / 2)
    assert loss.item() == pytest.approx(wanted)


def test_a_sure_assignment_to_the_best_direction_is_the_optimum() -> None:
    features = torch.eye(2).reshape(1, 2, 1, 2)  # two cells with one direction each
    logits = torch.zeros(1, 2, 1, 2, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = mixture_loss(logits, features, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0]]), (1, 2))
        loss.backward()
        optimizer.step()
    shares = logits.detach().softmax(1)[0, :, 0]
    assert (shares - torch.tensor([[0.0, 1.0], [1.0, 0.0]])).abs().max() < 1e-3
    assert loss.item() == pytest.approx(-10, abs=1e-2)  # the least that there is: -kappa


def test_lengths_of_features_and_directions_do_not_matter_and_zeros_are_finite() -> None:
    case = make_case()
    scaled = replace(case, features=3 * case.features, parts=0.1 * case.parts, background=7 * case.background)
    torch.testing.assert_close(mixture_loss(*scaled.arguments()), mixture_loss(*case.arguments()))
    case.features[0] = 0
    case.parts[0] = 0
    assert all(torch.isfinite(tensor).all() for tensor in with_gradients(mixture_loss, case))


def test_bf16_autocast_changes_neither_the_loss_nor_its_gradients() -> None:
    case = make_case().to(torch.float32)

    def loss_under_autocast(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mixture_loss(*arguments)

    plain, cast = with_gradients(mixture_loss, case), with_gradients(loss_under_autocast, case)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.parametrize("max_numbers", [2**25, 2 * 9 * 48 * 5])
def test_no_tensor_of_channels_by_pixels_exists_and_pieces_keep_within_the_limit(max_numbers: int) -> None:
    case = make_case(channels=64, size=(40, 48), grid=(8, 8), feature_grid=(8, 8)).to(torch.float32)
    with LargestTensor() as plain:
        with_gradients(lambda *arguments: materialised(*arguments).float(), case)
    with LargestTensor() as found:
        with_gradients(mixture_loss, case, max_numbers=max_numbers)
    assert plain.numel >= 2 * 64 * 40 * 48, "the probe must see what it looks for"
    of_all_pixels = 2 * 9 * 40 * 48
    on_the_grids = max(2 * 64 * 8 * 8, 2 * 9 * 8 * 48)
    assert found.numel <= max(on_the_grids, min(max_numbers, of_all_pixels))


def test_features_receive_no_gradient() -> None:
    case = make_case()
    case.features.requires_grad_()
    case.logits.requires_grad_()
    mixture_loss(*case.arguments()).backward()
    assert case.logits.grad is not None
    assert case.features.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 4, 8)}, r"logits \(2, 4, 8\).*needed logits \(B, S, h, w\)"),
        ({"features": torch.zeros(3, 5, 8, 8)}, r"features \(3, 5, 8, 8\).*of as many images"),
        ({"parts": torch.zeros(2, 2, 5)}, r"parts \(2, 2, 5\).*needed parts \(K, M, C\)"),
        ({"parts": torch.zeros(3, 0, 5)}, r"parts \(3, 0, 5\).*needed parts \(K, M, C\)"),
        ({"background": torch.zeros(0, 5)}, r"background \(0, 5\): needed background \(M_0, C\)"),
        ({"background": torch.zeros(2, 3, 5)}, r"background \(2, 3, 5\): needed background \(M_0, C\)"),
        ({"size": (0, 9)}, r"size \(0, 9\): needed height and width"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_loss(*replace(make_case(), **change).arguments())


def test_background_cross_entropy_is_that_of_the_upsampled_maps() -> None:
    case = make_case(grid=(5, 4))
    masks = torch.rand(2, 13, 17) > 0.5
    shares = interpolate(case.logits, (13, 17), mode="bilinear", align_corners=True).softmax(1)
    wanted = binary_cross_entropy(shares[:, 0], (~masks).double())
    torch.testing.assert_close(background_cross_entropy(case.logits, masks), wanted)


def test_background_cross_entropy_has_a_gradient_where_the_background_is_surely_wrong() -> None:
    logits = torch.tensor([200.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()  # 1 - p_0 rounds to 0
    loss = background_cross_entropy(logits, torch.ones(1, 1, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(200)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([1, -1])
