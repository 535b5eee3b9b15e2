"""Compares the low-rank semantic loss with the plain form, which builds every pixel's features."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_probe import LargestTensor
from torch import Tensor
from torch.nn.functional import interpolate

from slotscops.losses.semantic import semantic_consistency
from slotscops.model import maps
from slotscops.model.maps import averaging_matrix, interpolation_matrix, part_maps

GRIDS = [1, 2, 3, 7, 8, 14, 16]
sizes = st.tuples(st.integers(1, 33), st.integers(1, 33))
grids = st.tuples(st.sampled_from(GRIDS), st.sampled_from(GRIDS))


@dataclass
class Case:
    logits: Tensor  # (B, S, h, w)
    features: Tensor  # (B, C, h, w)
    basis: Tensor  # (K, C) or (B, K, C)
    size: tuple[int, int]
    mask: Tensor | None
    align_corners: bool

    def to(self, dtype: torch.dtype) -> "Case":
        mask = self.mask.to(dtype) if self.mask is not None and self.mask.is_floating_point() else self.mask
        tensors = (tensor.to(dtype) for tensor in (self.logits, self.features, self.basis))
        return Case(*tensors, self.size, mask, self.align_corners)

    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.features, self.basis, self.size, self.mask, self.align_corners


def make_case(
    seed: int = 0,
    images: int = 2,
    slots: int = 4,
    channels: int = 5,
    grid: tuple[int, int] = (8, 8),
    feature_grid: tuple[int, int] = (8, 8),
    size: tuple[int, int] = (24, 17),
    mask: str = "none",
    align_corners: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    masks = {
        "none": None,
        "bool": normal(images, *size) > 0,
        "bool with a channel": normal(images, 1, *size) > 0,
        "weights": normal(images, *size).abs(),
    }
    logits, features = 2 * normal(images, slots, *grid), normal(images, channels, *feature_grid).relu()
    return Case(logits, features, normal(slots - 1, channels).abs(), size, masks[mask], align_corners)


cases = st.builds(
    make_case,
    seed=st.integers(0, 2**31),
    images=st.integers(1, 3),
    slots=st.integers(2, 6),
    channels=st.integers(1, 9),
    grid=grids,
    feature_grid=grids,
    size=sizes,
    mask=st.sampled_from(["none", "bool", "bool with a channel", "weights"]),
    align_corners=st.booleans(),
)


def materialised(
    logits: Tensor, features: Tensor, basis: Tensor, size: tuple[int, int], mask: Tensor | None, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The loss in its plain form, and the mean square of both sides, which is the scale of rounding errors."""
    maps = interpolate(logits, size, mode="bilinear", align_corners=align_corners).softmax(1)[:, 1:]
    rebuilt = torch.einsum("bkyx,bkc->bcyx", maps, basis.expand(len(maps), -1, -1))
    target = interpolate(features, size, mode="bilinear", align_corners=align_corners)
    if mask is not None:
        target = target * mask.reshape(len(logits), 1, *size)
    return (rebuilt - target).square().mean(), (rebuilt.square() + target.square()).mean().detach()


def with_gradients(loss: Any, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its scale, and the gradients with respect to logits and basis."""
    case.logits = case.logits.clone().requires_grad_()
    case.basis = case.basis.clone().requires_grad_()
    result = loss(*case.arguments())
    value, scale = result if isinstance(result, tuple) else (result, result)
    return value.detach(), scale.detach(), *torch.autograd.grad(value, [case.logits, case.basis])


def assert_same(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    value, _, *gradients = with_gradients(semantic_consistency, case.to(dtype))
    wanted, scale, *wanted_gradients = with_gradients(materialised, case.to(torch.float64))
    assert value.dtype == dtype
    assert value.shape == ()
    assert abs(value - wanted) <= tolerance * scale
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        # The terms of a gradient may cancel, like those of the loss.
        largest = wanted_gradient.abs().max() + scale / wanted_gradient.numel()
        assert (gradient - wanted_gradient).abs().max() <= tolerance * largest


@settings(deadline=None, max_examples=150)
@given(cases)
def test_value_and_gradients_equal_the_materialised_form_in_float64(case: Case) -> None:
    assert_same(case, torch.float64, 1e-10)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_value_and_gradients_equal_the_materialised_form_in_float32(case: Case) -> None:
    assert_same(case, torch.float32, 1e-5)


@settings(deadline=None, max_examples=100)
@given(cases, st.booleans())
def test_a_basis_for_each_image_equals_the_materialised_form(case: Case, double: bool) -> None:
    own = torch.randn(len(case.logits), *case.basis.shape, generator=torch.Generator().manual_seed(0)).double()
    case.basis = case.basis * own
    assert_same(case, torch.float64 if double else torch.float32, 1e-10 if double else 1e-5)


def test_the_same_basis_for_each_image_is_one_for_all() -> None:
    case = make_case(images=3)
    value = semantic_consistency(*case.arguments())
    case.basis = case.basis.expand(3, -1, -1)
    torch.testing.assert_close(semantic_consistency(*case.arguments()), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_at_the_size_of_training_float32_is_within_1e_5_of_the_loss_itself(mask: str, align_corners: bool) -> None:
    case = make_case(1, slots=6, channels=64, size=(128, 128), mask=mask, align_corners=align_corners)
    value = semantic_consistency(*case.to(torch.float32).arguments())
    torch.testing.assert_close(value.double(), materialised(*case.arguments())[0], rtol=1e-5, atol=0)


def test_one_pixel_by_hand() -> None:
    logits = torch.tensor([0.0, 0.0, 0.0]).reshape(1, 3, 1, 1)  # a third of the pixel for each slot
    features = torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1)
    basis = torch.tensor([[3.0, 0.0], [6.0, 3.0]])  # rebuilt: (9/3, 3/3) = (3, 1), off by (0, 4)
    assert semantic_consistency(logits, features, basis, (1, 1)).item() == pytest.approx(16 / 2)
    nothing_wanted = torch.zeros(1, 1, 1, dtype=torch.bool)
    assert semantic_consistency(logits, features, basis, (1, 1), nothing_wanted).item() == pytest.approx((9 + 1) / 2)


def test_a_basis_of_zeros_leaves_the_mean_square_of_the_upsampled_features() -> None:
    features = torch.tensor([[0.0, 2.0]]).reshape(1, 1, 1, 2)  # three pixels: 0, 1, 2
    loss = semantic_consistency(torch.zeros(1, 2, 1, 1), features, torch.zeros(1, 1), (1, 3))
    assert loss.item() == pytest.approx((0 + 1 + 4) / 3)


def test_parts_that_rebuild_the_features_exactly_have_no_loss() -> None:
    logits = torch.tensor([-100.0, 100.0]).reshape(1, 2, 1, 1)
    basis = torch.rand(1, 7)
    features = basis.reshape(1, 7, 1, 1).expand(1, 7, 3, 3)
    assert semantic_consistency(logits, features, basis, (9, 9)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mask", ["none", "weights"])
def test_features_of_zeros_leave_the_mean_square_of_what_the_parts_rebuild(mask: str) -> None:
    case = make_case(mask=mask)
    case.features = torch.zeros_like(case.features)
    assert_same(case, torch.float64, 1e-10)


def test_float16_features_count_as_their_float32_values() -> None:
    case = make_case().to(torch.float32)
    case.features = case.features.half()
    loss = semantic_consistency(*case.arguments())
    case.features = case.features.float()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, semantic_consistency(*case.arguments()))


@pytest.mark.parametrize("mask", ["none", "weights"])
def test_bf16_autocast_changes_neither_the_loss_nor_its_gradients(mask: str) -> None:
    case = make_case(mask=mask).to(torch.float32)

    def loss_under_autocast(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return semantic_consistency(*arguments)

    plain, cast = with_gradients(semantic_consistency, case), with_gradients(loss_under_autocast, case)
    assert cast[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_maps_are_float32_whatever_autocast_and_logits_are(dtype: torch.dtype) -> None:
    logits = make_case().logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        maps = part_maps(logits, (24, 17))
    assert torch.equal(maps, part_maps(logits.float(), (24, 17)))


def test_features_and_mask_receive_no_gradient() -> None:
    case = make_case(mask="weights")
    assert case.mask is not None
    case.features.requires_grad_()
    case.mask.requires_grad_()
    case.logits.requires_grad_()
    semantic_consistency(*case.arguments()).backward()
    assert case.logits.grad is not None
    assert case.features.grad is None
    assert case.mask.grad is None


@pytest.mark.parametrize("mask", ["none", "bool", "weights"])
def test_no_tensor_of_channels_by_pixels_ever_exists(mask: str) -> None:
    case = make_case(images=2, slots=3, channels=64, size=(40, 48), mask=mask)
    materialised_size = 2 * 64 * 40 * 48
    with LargestTensor() as plain:
        with_gradients(materialised, case)
    with LargestTensor() as low_rank:
        with_gradients(semantic_consistency, case)
    assert plain.numel >= materialised_size, "the probe must see what it looks for"
    assert low_rank.numel <= max(2 * 3 * 40 * 48, 2 * 64 * 9 * 9)  # the maps, or the features with an edge added


@settings(deadline=None, max_examples=100)
@given(grid=grids, size=sizes, align_corners=st.booleans())
def test_part_maps_are_the_softmax_of_interpolated_logits(
    grid: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> None:
    logits = make_case(grid=grid).logits
    wanted = interpolate(logits, size, mode="bilinear", align_corners=align_corners).softmax(1)
    torch.testing.assert_close(part_maps(logits, size, align_corners), wanted, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(in_size=st.integers(1, 40), out_size=st.integers(1, 140), align_corners=st.booleans())
def test_interpolation_matrix_does_what_interpolate_does(in_size: int, out_size: int, align_corners: bool) -> None:
    matrix = interpolation_matrix(in_size, out_size, align_corners, torch.float64)
    unit_vectors = torch.eye(in_size, dtype=torch.float64)[None]  # (1, in, in)
    wanted = interpolate(unit_vectors, out_size, mode="linear", align_corners=align_corners)[0].T
    torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("in_size", "out_size"), [(64, 8), (10, 3), (5, 7), (3, 1)])
def test_averaging_matrix_does_what_adaptive_pooling_does(in_size: int, out_size: int) -> None:
    matrix = averaging_matrix(in_size, out_size, torch.float64, torch.device("cpu"))
    images = torch.rand(2, 3, in_size, in_size, dtype=torch.float64)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images, (out_size, out_size))
    torch.testing.assert_close(matrix @ images @ matrix.T, pooled)


def test_interpolation_matrix_by_hand() -> None:
    aligned = interpolation_matrix(2, 3, align_corners=True)
    assert aligned.tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    clamped = interpolation_matrix(2, 4, align_corners=False)
    assert clamped.tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]


def test_a_matrix_first_made_in_inference_mode_serves_training() -> None:
    maps._interpolation_matrix.cache_clear()
    case = make_case()
    with torch.inference_mode():
        part_maps(case.logits, case.size)
    matrix = interpolation_matrix(8, case.size[0], True, torch.float64)
    assert not matrix.is_inference()
    assert not matrix.requires_grad
    assert_same(case, torch.float64, 1e-10)


def test_the_cache_of_matrices_is_bounded() -> None:
    for size in range(1, 200):
        interpolation_matrix(2, size, True)
    info = maps._interpolation_matrix.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 4, 8)}, r"logits \(2, 4, 8\): needed \(B, S, h, w\)"),
        ({"logits": torch.zeros(2, 1, 8, 8)}, r"logits \(2, 1, 8, 8\): .* at least one part"),
        ({"features": torch.zeros(3, 5, 8, 8)}, r"features \(3, 5, 8, 8\): needed \(2, C, h, w\)"),
        ({"basis": torch.zeros(4, 5)}, r"basis \(4, 5\): needed \(3, 5\)"),
        ({"size": (0, 9)}, r"size \(0, 9\): needed height and width"),
        ({"mask": torch.ones(2, 24, 16)}, r"mask \(2, 24, 16\): needed \(2, 24, 17\) or \(2, 1, 24, 17\)"),
        ({"mask": torch.ones(2, 24, 17, dtype=torch.uint8)}, "uint8: needed bool or floating"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_came_and_what_was_needed(
    change: dict[str, Any], message: str
) -> None:
    case = make_case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        semantic_consistency(*case.arguments())


def test_interpolation_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="from 3 to 0: both sizes"):
        interpolation_matrix(3, 0, True)
