"""Refinement of part maps with the photo."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.model.refinement import dilations_for, refine_maps


def by_hand(maps: torch.Tensor, images: torch.Tensor, dilations: tuple[int, ...]) -> torch.Tensor:
    """One iteration for the first photo, computed pixel by pixel."""
    num_slots, height, width = maps.shape[1:]
    refined = torch.zeros(num_slots, height, width)
    for y in range(height):
        for x in range(width):
            places = [
                (min(max(y + d * down, 0), height - 1), min(max(x + d * across, 0), width - 1))
                for d in dilations
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
                if down or across
            ]
            colours = torch.stack([images[0, :, v, u] for v, u in places])  # (P, 3)
            own = images[0, :, y, x]
            deviation = torch.cat([colours, own[None]]).std(dim=0)  # (3,)
            likeness = (-(colours - own).abs() / (1e-8 + 0.1 * deviation)).mean(1)
            shares = torch.stack([maps[0, :, v, u] for v, u in places])  # (P, S)
            refined[:, y, x] = likeness.softmax(0) @ shares
    return refined


def test_one_iteration_is_the_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 5, 7, generator=generator)
    maps = torch.randn(1, 3, 5, 7, generator=generator).softmax(1)
    refined = refine_maps(maps, images, num_iterations=1, dilations=(1, 3))
    torch.testing.assert_close(refined[0], by_hand(maps, images, (1, 3)), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 3), slots=st.integers(2, 6), height=st.integers(1, 20), width=st.integers(1, 20),
    flat=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_shares_stay_shares(batch: int, slots: int, height: int, width: int, flat: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    if flat:
        images = torch.full_like(images, 7)
    refined = refine_maps(torch.randn(batch, slots, height, width, generator=generator).softmax(1), images)
    assert refined.shape == (batch, slots, height, width)
    assert (refined >= 0).all()
    torch.testing.assert_close(refined.sum(1), torch.ones(batch, height, width), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "expected"), [(20, [1, 2, 4, 8]), (128, [1, 2, 4, 8]), (224, [1, 2, 4, 8, 14]), (256, [1, 2, 4, 8, 16])]
)
def test_neighbours_reach_a_sixteenth_of_the_photo(size: int, expected: list[int]) -> None:
    assert dilations_for(size, size + 50) == dilations_for(size + 50, size) == expected
    images, maps = torch.rand(1, 3, size, size), torch.rand(1, 2, size, size).softmax(1)
    assert torch.equal(refine_maps(maps, images, 1), refine_maps(maps, images, 1, expected))


def test_a_border_moves_to_where_the_colours_change() -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1.0
    soft = torch.linspace(1, 0, 32).expand(32, 32)
    maps = torch.stack([soft, 1 - soft])[None]
    maps = torch.roll(maps, 4, dims=3)  # its border lies 4 pixels beside the photo's
    maps[..., :4] = torch.tensor([1.0, 0.0])[:, None, None]
    assert (maps.argmax(1)[..., 16:19] == 0).all()
    labels = refine_maps(maps, images, num_iterations=40).argmax(1)
    assert (labels[..., :16] == 0).all()
    assert (labels[..., 16:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_photos_of_either_kind_and_half_maps(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1)).softmax(1)
    expected = refine_maps(maps, images)
    given_images = images if dtype is torch.uint8 else images.float() / 255
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = refine_maps(maps, given_images)
    assert refined.dtype is torch.float32
    torch.testing.assert_close(refined, expected)
