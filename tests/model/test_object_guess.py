"""The guess of objects from features alone."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from slotscops.core.errors import UserError
from slotscops.model.object_guess import ObjectGuess, find_background, nearest, otsu_threshold


def clouds(*directions: int, each: int = 40) -> Tensor:
    """Unit vectors close to some of the eight axes, `each` of them an axis."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(8)[list(directions)].repeat_interleave(each, 0)
    return normalize(axes + 0.05 * torch.randn(axes.shape, generator=generator), dim=1)


def places() -> Tensor:
    """Of 160 vectors: most of the first 80 lie on the border, and few of the others."""
    is_on_border = torch.zeros(160, dtype=torch.bool)
    is_on_border[:30] = is_on_border[40:75] = True
    is_on_border[80:85] = True
    return is_on_border


def test_clusters_that_lie_on_the_border_far_more_often_than_the_others_are_background() -> None:
    vectors = clouds(0, 1, 2, 3)
    found = find_background(vectors, places(), seed=0, num_clusters=4)
    assert found is not None
    assert found.contain(vectors).tolist() == [True] * 80 + [False] * 80
    assert find_background(vectors[:3], places()[:3], seed=0, num_clusters=4) is None


@pytest.mark.parametrize("trial", range(20))
def test_the_threshold_is_the_cut_of_largest_variance_between_the_groups(trial: int) -> None:
    generator = torch.Generator().manual_seed(trial)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 9, (7,), generator=generator).double()

    def variance_within(threshold: float) -> float:
        total = 0.0
        for group in (values > threshold, values <= threshold):
            mean = (values[group] * weights[group]).sum() / weights[group].sum()
            total += float((weights[group] * (values[group] - mean) ** 2).sum())
        return total

    ordered = values.sort().values
    cuts = ((ordered[1:] + ordered[:-1]) / 2).tolist()
    assert otsu_threshold(values, weights) == pytest.approx(min(cuts, key=variance_within))


def test_equal_values_have_no_threshold() -> None:
    assert otsu_threshold(torch.ones(3), torch.ones(3)) == math.inf


def test_a_guess_is_the_region_whose_features_belong_to_clusters_of_objects() -> None:
    guess = ObjectGuess(8, num_clusters=4)
    vectors = clouds(0, 1, 2, 3)
    guess.measure(vectors, places(), seed=0)
    grid = torch.eye(8)[torch.tensor([[0, 1, 0], [1, 2, 3], [0, 3, 2]])]  # background above and to the left
    masks = guess(5 * grid.permute(2, 0, 1)[None].half(), (9, 9))  # lengths do not matter
    assert masks.dtype == torch.bool
    assert masks[0, 4:, 4:].all()
    assert not masks[0, 0].any()
    assert not masks[0, :, 0].any()
    again = ObjectGuess(8, num_clusters=4)
    again.load_state_dict(guess.state_dict())
    assert torch.equal(again(grid.permute(2, 0, 1)[None], (9, 9)), masks)
    with pytest.raises(UserError, match="needs 4 cells of features, but the training split has 2"):
        guess.measure(vectors[:2], places()[:2], seed=0)


def test_the_nearest_centre_is_that_of_least_distance() -> None:
    vectors, centres = torch.randn(50, 3), 2 * torch.randn(4, 3)
    assert torch.equal(nearest(vectors, centres), torch.cdist(vectors, centres).argmin(1))
