"""Regularisers, contrast and warps: compared with values by hand, finite differences, and shares of a batch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slotscops.core.pixels import rgb_to_lab
from slotscops.losses.contrast import part_contrast, visual_consistency, visual_consistency_lab
from slotscops.losses.gathering import Gather, Gathered, keep_own
from slotscops.losses.regularisers import (
    concentration,
    entropy,
    orthonormality,
    part_centres,
    presence,
    total_variation,
)
from slotscops.losses.warp import draw_warps, equivariance, landmark_equivariance, warp_images, warp_maps
from slotscops.model.target import TargetTransform

KEYS = ["a_0", "b_0", "c_1", "d_0"]
CLASSES = torch.tensor([0, 1, 0, 1])
FEATURES = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.rand(4, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
OTHER = torch.randn(4, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)


def on_share(maps: Tensor, share: slice, gather: Gather = keep_own) -> dict[str, Tensor]:
    """Every term of the maps (B, S, H, W) of a share of the four images."""
    warp = draw_warps(KEYS[share], seed=0, step=3)
    parts, other = maps[:, 1:], OTHER[share]
    moved = part_centres(other[:, 1:]).float()
    return {
        "concentration": concentration(parts),
        "entropy": entropy(maps),
        "presence": presence(parts, gather),
        "total_variation": total_variation(maps),
        "part_contrast": part_contrast(parts, FEATURES[share], CLASSES[share], 0.5, gather),
        "visual_consistency": visual_consistency(parts, IMAGES[share]),
        "visual_consistency_lab": visual_consistency_lab(parts, IMAGES[share]),
        "equivariance": equivariance(maps, other, warp),
        "landmark_equivariance": landmark_equivariance(part_centres(parts).float(), moved, warp),
    }


SHARES = (slice(0, 2), slice(2, 4))


def on_two_processes(logits: Tensor) -> list[dict[str, Tensor]]:
    """Every term of each of two processes. Both are run once to learn what they give to the other one."""
    given: list[list[Tensor]] = [[], []]
    for mine, share in zip(given, SHARES, strict=True):
        on_share(logits[share].softmax(1), share, lambda one, mine=mine: mine.append(one) or keep_own(one))
    calls = [iter(zip(*given, strict=True)) for _ in SHARES]
    return [
        on_share(
            logits[share].softmax(1),
            share,
            lambda one, rank=rank: Gathered(torch.cat(next(calls[rank])), rank * len(one)),
        )
        for rank, share in enumerate(SHARES)
    ]


@pytest.mark.parametrize("name", list(on_share(OTHER, slice(0, 4))))
def test_the_mean_over_processes_is_the_whole_batch_in_value_and_gradient(name: str) -> None:
    logits = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    whole = on_share(logits.softmax(1), slice(0, 4))[name]
    halves = [terms[name] for terms in on_two_processes(logits)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    (of_whole,), (of_halves,) = torch.autograd.grad(whole, logits), torch.autograd.grad(sum(halves) / 2, logits)
    assert of_whole.abs().max() > 0
    torch.testing.assert_close(of_halves, of_whole)


TERMS_OF_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "concentration": lambda maps: concentration(maps[:, 1:]),
    "entropy": entropy,
    "presence": lambda maps: presence(maps[:, 1:]),
    "total_variation": total_variation,
    "part_contrast": lambda maps: part_contrast(maps[:, 1:], FEATURES, CLASSES, 0.5),
    "visual_consistency": lambda maps: visual_consistency(maps[:, 1:], IMAGES),
    "visual_consistency_lab": lambda maps: visual_consistency_lab(maps[:, 1:], IMAGES),
    "equivariance": lambda maps: equivariance(maps, OTHER, draw_warps(KEYS, 0, 3)),
    "orthonormality": lambda maps: orthonormality(maps.flatten(1)),
}


@pytest.mark.parametrize("name", TERMS_OF_MAPS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    term = TERMS_OF_MAPS[name]
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


def test_part_contrast_is_its_equation_with_the_next_photo_of_the_class_as_partner() -> None:
    parts, t = OTHER[:, 1:], 0.5
    partners = {0: 2, 1: 3, 2: 0, 3: 1}  # of classes 0, 1, 0, 1
    shares = torch.nn.functional.adaptive_avg_pool2d(parts, (2, 2))
    z = torch.einsum("bkyx,bcyx->bkc", shares, FEATURES)
    z = z / z.norm(dim=2, keepdim=True)
    losses = []
    for b in range(4):
        for k in range(2):
            wanted = math.exp(z[b, k] @ z[partners[b], k] / t)
            others = [math.exp(z[b, k] @ z[i, j] / t) for i in (b, partners[b]) for j in range(2) if j != k]
            losses.append(-math.log(wanted / (wanted + sum(others))))
    assert part_contrast(parts, FEATURES, CLASSES, t).item() == pytest.approx(sum(losses) / 8)
    alone = torch.tensor([0, 1, 1, 1])  # the first photo contributes 0, and the partners of the last is the second
    for_three = part_contrast(parts[1:], FEATURES[1:], alone[1:], t)
    assert part_contrast(parts, FEATURES, alone, t).item() == pytest.approx(for_three.item() * 3 / 4)


def test_contrast_pushes_the_parts_of_one_photo_apart_and_a_single_part_or_photo_costs_nothing() -> None:
    parts = torch.zeros(2, 2, 1, 2)
    parts[:, 0, 0, 0] = parts[:, 1, 0, 1] = 1
    features = torch.eye(2)[None, :, None].repeat(2, 1, 1, 1)  # position 0 fires channel 0, position 1 channel 1
    classes = torch.tensor([3, 3])
    told_apart = math.log((math.e + 2) / math.e)  # a partner with product 1, two other parts with product 0, t = 1
    assert part_contrast(parts, features, classes, 1.0).item() == pytest.approx(told_apart)
    alike = torch.ones(2, 2, 1, 2)
    assert part_contrast(parts, alike, classes, 1.0).item() == pytest.approx(math.log(3))
    single = parts[:, :1].requires_grad_()
    loss = part_contrast(single, features, classes, 1.0) + part_contrast(single[:1], features[:1], classes[:1], 1.0)
    loss.backward()
    assert loss.item() == 0
    assert single.grad is not None
    assert not single.grad.any()


def test_a_part_is_present_if_it_is_sure_of_nine_cells_of_one_photo() -> None:
    parts = torch.zeros(2, 3, 5, 5)
    parts[1, 0, 1:4, 2:5] = 1  # sure of a window
    parts[0, 1, 2, 2] = 1  # of a single cell
    assert presence(parts).item() == pytest.approx(1 - (1 + 1 / 9 + 0) / 3)
    assert presence(torch.ones(1, 1, 2, 2)).item() == 0  # a grid smaller than the window


def test_total_variation_is_the_height_of_all_steps_between_neighbours() -> None:
    maps = torch.zeros(1, 2, 2, 3)
    maps[0, 0, :, 0] = maps[0, 1, :, 1:] = 1  # one vertical border of two cells, which both slots have
    assert total_variation(maps).item() == pytest.approx(4 / 6)
    steps = sum(
        (OTHER[b, s, y, x] - OTHER[b, s, v, u]).abs().item()
        for b in range(4) for s in range(3) for y in range(5) for x in range(4)
        for v, u in ((y + 1, x), (y, x + 1)) if v < 5 and u < 4
    )  # fmt: skip
    assert total_variation(OTHER).item() == pytest.approx(steps / 80)


def test_lab_of_white_black_grey_and_the_primaries() -> None:
    colours = torch.tensor(
        [[255, 255, 255], [0, 0, 0], [119, 119, 119], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8
    )
    wanted = torch.tensor(  # published values, such as those of colorjs.io and scikit-image
        [[100, 0, 0], [0, 0, 0], [50.03, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    )
    lab = rgb_to_lab(colours.T[None, :, None])  # (1, 3, 1, 6)
    torch.testing.assert_close(lab[0, :, 0].T, wanted, atol=0.02, rtol=0)
    as_shares = rgb_to_lab(colours.T[None, :, None].double() / 255)
    torch.testing.assert_close(as_shares, lab.double(), atol=1e-4, rtol=0)


def test_visual_consistency_in_lab_is_the_mean_squared_distance_from_the_parts_own_colours() -> None:
    parts, masks, lab = OTHER[:, 1:], torch.rand(4, 5, 4) > 0.3, rgb_to_lab(IMAGES) / 100
    for mask in (None, masks):
        losses = []
        for b in range(4):
            inside = torch.ones(5, 4) if mask is None else mask[b].double()
            spread = 0.0
            for k in range(2):
                share = (parts[b, k] * inside)[None]
                mean = (share * lab[b]).sum((1, 2), keepdim=True) / share.sum()
                spread += (share * (lab[b] - mean).square()).sum().item()
            losses.append(spread / (parts[b] * inside).sum().item())
        assert visual_consistency_lab(parts, IMAGES, mask).item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).expand(2, 3, 1, 2)
    halves = torch.full((2, 1, 1, 2), 0.5) * torch.tensor([1.0, 0.0])[:, None, None, None]  # the second has no mass
    assert visual_consistency_lab(halves, black_and_white).item() == pytest.approx(1 / 4 / 2)


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


def test_each_layer_is_multiplied_by_its_weight_before_vectors_are_scaled() -> None:
    vectors = torch.tensor([[16.0, 9.0, 4.0]])  # (M, C): two channels of the first layer, one of the second
    wanted = {"none": [8, 4.5, 8], "sqrt": [2, 1.5, 4], "l2": [0.657, 0.370, 0.657], "sqrt_l2": [0.424, 0.318, 0.848]}
    for kind, numbers in wanted.items():
        target = TargetTransform(kind, 3, (0.5, 2.0))  # type: ignore[arg-type]
        target.weigh_layers([2, 1])
        assert target(vectors).flatten().tolist() == pytest.approx(numbers, abs=1e-3)
        assert target(vectors[:, :, None, None]).flatten().tolist() == pytest.approx(numbers, abs=1e-3)
        loaded = TargetTransform(kind, 3, (0.5, 2.0))  # type: ignore[arg-type]
        loaded.load_state_dict(target.state_dict())
        assert torch.equal(loaded(vectors), target(vectors))
    assert "channel_weights" not in TargetTransform("l2", 3).state_dict()
