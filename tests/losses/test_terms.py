"""Regularisers, contrast and warps: compared with values by hand, finite differences, and shares of a batch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slotscops.losses.contrast import part_contrast, visual_consistency
from slotscops.losses.regularisers import concentration, entropy, orthonormality, part_centres
from slotscops.losses.warp import draw_warps, equivariance, landmark_equivariance, warp_images, warp_maps
from slotscops.model.target import TargetTransform

KEYS = ["a_0", "b_0", "c_1", "d_0"]
CLASSES = torch.tensor([0, 0, 1, 1])
FEATURES = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(4, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
OTHER = torch.randn(4, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)


def on_share(maps: Tensor, share: slice) -> dict[str, Tensor]:
    """Every term of the maps (B, S, H, W) of a share of the four images."""
    warp = draw_warps(KEYS[share], seed=0, step=3)
    parts, other = maps[:, 1:], OTHER[share]
    moved = part_centres(other[:, 1:]).float()
    return {
        "concentration": concentration(parts),
        "entropy": entropy(maps),
        "part_contrast": part_contrast(parts, FEATURES[share], CLASSES[share], 0.5),
        "visual_consistency": visual_consistency(parts, IMAGES[share]),
        "equivariance": equivariance(maps, other, warp),
        "landmark_equivariance": landmark_equivariance(part_centres(parts).float(), moved, warp),
    }


@pytest.mark.parametrize("name", list(on_share(OTHER, slice(0, 4))))
def test_the_mean_over_processes_is_the_whole_batch_in_value_and_gradient(name: str) -> None:
    logits = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    whole = on_share(logits.softmax(1), slice(0, 4))[name]
    halves = [on_share(logits[share].softmax(1), share)[name] for share in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, whole)
    (of_whole,), (of_halves,) = torch.autograd.grad(whole, logits), torch.autograd.grad(sum(halves) / 2, logits)
    assert of_whole.abs().max() > 0
    torch.testing.assert_close(of_halves, of_whole)


@pytest.mark.parametrize(
    "term",
    [
        lambda maps: concentration(maps[:, 1:]),
        entropy,
        lambda maps: part_contrast(maps[:, 1:], FEATURES, CLASSES, 0.5),
        lambda maps: visual_consistency(maps[:, 1:], IMAGES),
        lambda maps: equivariance(maps, OTHER, draw_warps(KEYS, 0, 3)),
        lambda maps: orthonormality(maps.flatten(1)),
    ],
    ids=["concentration", "entropy", "part_contrast", "visual_consistency", "equivariance", "orthonormality"],
)
def test_gradients_are_those_of_finite_differences(term: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: term(x.softmax(1)), logits, fast_mode=True)


def test_two_pixels_at_the_corners_spread_two_around_the_middle() -> None:
    parts = torch.zeros(1, 2, 3, 3)
    parts[0, 0, 0, 0] = parts[0, 0, 2, 2] = 1  # at (-1, -1) and (1, 1): both sqrt 2 from the middle
    parts[0, 1, 1, 2] = 1  # a single pixel spreads 0
    torch.testing.assert_close(part_centres(parts), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]))
    assert concentration(parts).item() == pytest.approx((2 + 0) / 2)
    assert concentration(torch.zeros(1, 2, 3, 3)).item() == 0


def test_entropy_is_log_s_where_nothing_is_known_and_0_where_all_is() -> None:
    assert entropy(torch.full((2, 4, 3, 3), 0.25)).item() == pytest.approx(math.log(4))
    sure = torch.zeros(1, 4, 2, 2)
    sure[:, 1] = 1
    assert entropy(sure).item() == 0


def test_equal_rows_are_far_from_orthonormal_and_axes_are_not() -> None:
    assert orthonormality(torch.tensor([[2.0, 0, 0], [0, 5.0, 0]])).item() == pytest.approx(0)
    assert orthonormality(torch.tensor([[2.0, 0], [1.0, 0]])).item() == pytest.approx(2 / 4)


def test_parts_with_their_own_feature_are_told_apart_and_two_classes_count_nothing() -> None:
    parts = torch.zeros(2, 2, 1, 2)
    parts[:, 0, 0, 0] = parts[:, 1, 0, 1] = 1
    features = torch.eye(2)[None, :, None].expand(2, 2, 1, 2)  # position 0 fires channel 0, position 1 channel 1
    same, other = torch.tensor([3, 3]), torch.tensor([3, 4])
    wanted = -math.log(math.e / (math.e + 1))  # products 1 and 0 at t = 1
    assert part_contrast(parts, features, same, 1.0).item() == pytest.approx(wanted)
    assert part_contrast(parts, features, other, 1.0).item() == 0
    with pytest.raises(ValueError, match="even number"):
        part_contrast(parts[:1], features[:1], same[:1], 1.0)


def test_a_black_and_a_white_pixel_differ_by_a_quarter_a_channel_around_their_mean() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert visual_consistency(torch.ones(1, 1, 1, 2), images).item() == pytest.approx(3 / 4)
    assert visual_consistency(torch.eye(2)[None, :, None], images).item() == pytest.approx(0)


def test_sampling_in_a_fixed_order_gives_the_same_maps_and_gradients() -> None:
    maps = torch.rand(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    warp = draw_warps(["a", "b"], seed=0, step=0, min_scale=0.5)  # it shows what lies outside too
    weights = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    fast, inside = warp_maps(maps, warp)
    (gradient,) = torch.autograd.grad((fast * weights).sum(), maps)
    torch.use_deterministic_algorithms(True)
    try:
        fixed, _ = warp_maps(maps, warp)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "Grid" in str(fast.grad_fn)
    assert "Grid" not in str(fixed.grad_fn)
    assert not inside.all()
    torch.testing.assert_close(fixed, fast)
    torch.testing.assert_close(torch.autograd.grad((fixed * weights).sum(), maps)[0], gradient)


def test_maps_that_follow_the_warp_cost_nothing_and_others_do() -> None:
    warp = draw_warps(KEYS, seed=0, step=0)
    plain = torch.randn(4, 3, 9, 9).softmax(1)
    followed, inside = warp_maps(plain, warp)
    assert 0 < inside.float().mean() < 1
    assert equivariance(plain, followed, warp).item() == pytest.approx(0, abs=1e-6)
    assert equivariance(plain, plain, warp).item() > 1e-3
    centres = torch.rand(4, 2, 2) - 0.5
    assert landmark_equivariance(warp.move(centres), centres, warp).item() == pytest.approx(0, abs=1e-12)


def test_twice_as_large_shows_the_middle_and_still_warps_change_nothing() -> None:
    still = draw_warps(KEYS, 0, 0, bend=0, rotation=0, translation=0, min_scale=1, max_scale=1, jitter=0)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(warp_images(images, still), images)
    twice = draw_warps(KEYS, 0, 0, bend=0, rotation=0, translation=0, min_scale=2, max_scale=2)
    torch.testing.assert_close(twice.move(torch.ones(4, 1, 2)), torch.full((4, 1, 2), 0.5))


def test_the_spline_moves_each_control_point_by_its_shift_and_depends_on_seed_step_and_sample_only() -> None:
    whole, alone = draw_warps(KEYS, 7, 5), draw_warps(KEYS[2:3], 7, 5)
    assert all(torch.equal(mine[2:3], other) for mine, other in zip(whole[:2], alone[:2], strict=True))
    assert not torch.equal(whole.affine, draw_warps(KEYS, 7, 6).affine)
    assert not torch.equal(whole.affine, draw_warps(KEYS, 8, 5).affine)
    bent = draw_warps(KEYS, 0, 0, bend=0.1, rotation=0, translation=0, min_scale=1, max_scale=1)
    shifts = bent.move(bent.centres.expand(4, -1, 2)) - bent.centres
    assert 0.08 < shifts.std() < 0.12  # 200 normal numbers of deviation 0.1


def test_transforms_by_hand_and_of_nothing_but_zeros() -> None:
    features = torch.tensor([[[[4.0]], [[0.0]]], [[[0.0]], [[0.0]]]])  # (2, 2, 1, 1)
    assert TargetTransform("sqrt", 2)(features).flatten().tolist() == [2, 0, 0, 0]
    assert TargetTransform("l2", 2)(features).flatten().tolist() == [1, 0, 0, 0]
    both = TargetTransform("sqrt_l2", 2)(torch.tensor([[[[9.0]], [[16.0]]]]))
    assert both.flatten().tolist() == pytest.approx([0.6, 0.8])
    scaled = TargetTransform("channel_standardised", 2)
    scaled.measure(features[:, :, 0, 0])  # deviations 2 and 0: a channel that never fires keeps its scale
    assert scaled(features).flatten().tolist() == [2, 0, 0, 0]
    assert "scale" in scaled.state_dict()
