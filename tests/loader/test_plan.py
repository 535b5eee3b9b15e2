import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.core.errors import UserError
from slotscops.loader import plan
from slotscops.loader.plan import TrainingPlan

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**40)


def stream(num_samples: int, seed: int, length: int) -> list[int]:
    return plan.samples_at(np.arange(length), num_samples, seed).tolist()


def trained_on(
    num_samples: int, batch_size: int, ranks: int, accumulation: int, start: int, steps: int, seed: int
) -> list[int]:
    """Samples of all processes, step by step, in the order of ranks."""
    per_rank = [
        list(TrainingPlan(num_samples, seed, batch_size, rank, ranks, accumulation, start, start + steps * batch_size))
        for rank in range(ranks)
    ]
    order: list[int] = []
    for step in range(steps):
        for microbatches in per_rank:
            for samples in microbatches[step * accumulation : (step + 1) * accumulation]:
                order += samples
    return order


@settings(deadline=None)
@given(sizes, seeds, st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(num_samples: int, seed: int, epochs: int) -> None:
    order = stream(num_samples, seed, epochs * num_samples)
    for epoch in range(epochs):
        assert sorted(order[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@settings(deadline=None)
@given(sizes, seeds, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(0, 200), st.integers(1, 6))
def test_the_order_is_the_same_for_any_number_of_processes(
    num_samples: int, seed: int, ranks: int, accumulation: int, start: int, steps: int
) -> None:
    batch_size = 24
    expected = stream(num_samples, seed, start + steps * batch_size)[start:]
    assert trained_on(num_samples, batch_size, ranks, accumulation, start, steps, seed) == expected


@settings(deadline=None)
@given(sizes, seeds, st.integers(1, 5), st.integers(1, 5))
def test_stopping_and_going_on_changes_nothing(num_samples: int, seed: int, before: int, after: int) -> None:
    whole = trained_on(num_samples, 4, 1, 1, 0, before + after, seed)
    parts = trained_on(num_samples, 4, 2, 1, 0, before, seed) + trained_on(
        num_samples, 4, 4, 1, before * 4, after, seed
    )
    assert parts == whole


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [plan.permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(deadline=None)
@given(st.integers(1, 3000), seeds, st.integers(0, 1000))
def test_the_order_of_an_epoch_is_a_permutation_and_any_place_of_it_can_be_asked_for_alone(
    num_samples: int, seed: int, epoch: int
) -> None:
    order = plan.permutation(num_samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_samples))
    place = seed % num_samples
    assert plan.permute(np.array([[place]]), num_samples, seed, epoch).tolist() == [[order[place]]]


@settings(deadline=None)
@given(st.integers(1, 10**12), seeds, st.integers(0, 50))
def test_places_of_a_huge_epoch_lead_to_different_samples_within_it(num_samples: int, seed: int, epoch: int) -> None:
    count = min(num_samples, 500)
    places = np.concatenate([np.arange(count), np.arange(num_samples - count, num_samples)])
    samples = plan.permute(places, num_samples, seed, epoch)
    assert samples.min() >= 0
    assert samples.max() < num_samples
    assert len(set(samples.tolist())) == len(set(places.tolist()))


def test_all_orders_of_few_samples_are_equally_likely() -> None:
    orders = Counter(tuple(plan.permutation(5, 0, epoch).tolist()) for epoch in range(12_000))
    expected = 12_000 / math.factorial(5)
    # The sum of 119 degrees of freedom exceeds 200 once in 200,000 draws of true permutations.
    assert sum((orders[order] - expected) ** 2 / expected for order in permutations(range(5))) < 200


def test_neighbours_in_the_data_set_are_none_in_the_order() -> None:
    order = plan.permutation(100_000, 1, 0)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 are expected
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, plan.permutation(100_000, 1, 1))[0, 1]) < 0.02


def test_the_order_is_the_one_that_older_checkpoints_were_trained_with() -> None:
    # The order is fixed here: with another one, every resumed run would see other samples. A change of the rule needs
    # another number of it, so that earlier runs refuse to go on.
    assert plan.ORDER == 2
    assert plan.permutation(8, seed=3, epoch=1).tolist() == PINNED
    assert plan.permute(np.array([0, 1, 10**8 - 1]), 10**8, seed=3, epoch=1).tolist() == PINNED_OF_MANY


PINNED = [4, 7, 5, 6, 3, 0, 1, 2]
PINNED_OF_MANY = [77754079, 12697129, 72782748]


@pytest.mark.parametrize(("ranks", "accumulation"), [(3, 1), (2, 4), (1, 16)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_multiple(ranks: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=f"multiple of {ranks * accumulation}"):
        plan.check_divisible(10, ranks, accumulation)


def test_the_digest_depends_on_samples_and_order() -> None:
    assert plan.batch_digest(np.array([1, 2])) == plan.batch_digest(np.array([1, 2], np.int32))
    assert len({plan.batch_digest(np.array(samples)) for samples in ([1, 2], [2, 1], [12], [1])}) == 4


@settings(deadline=None)
@given(st.integers(2, 60), st.data(), seeds, st.booleans())
def test_samples_held_out_are_never_trained_on_and_every_epoch_holds_all_others_once(
    num_samples: int, data: st.DataObject, seed: int, mirror: bool
) -> None:
    num_held_out = data.draw(st.integers(1, num_samples - 1))
    held_out = plan.held_out_samples(num_samples, num_held_out, seed).tolist()
    num_used = num_samples - num_held_out
    of_epochs = list(TrainingPlan(num_samples, seed, num_used, 0, 1, 1, 0, 2 * num_used, mirror, num_held_out))
    others = sorted(set(range(num_samples)) - set(held_out))
    assert len(set(held_out)) == num_held_out
    for samples in of_epochs:
        assert sorted(sample % num_samples for sample in samples) == others
        assert mirror or max(samples) < num_samples


def test_disjoint_halves_share_no_sample_with_each_other_or_the_held_out_and_change_with_the_repeat() -> None:
    held_out = set(plan.held_out_samples(23, 4, seed=7).tolist())
    divisions = []
    for repeat in range(3):
        first, second = (set(half.tolist()) for half in plan.disjoint_halves(23, 4, 7, repeat, most=100))
        assert len(first) == len(second) == 9
        assert not first & second
        assert not (first | second) & held_out
        divisions.append(first)
    assert divisions[0] != divisions[1] != divisions[2]
    assert [len(half) for half in plan.disjoint_halves(23, 4, 7, 0, most=5)] == [5, 5]
