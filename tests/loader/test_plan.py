import numpy as np
import pytest
from hypothesis import given
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


@given(sizes, seeds, st.integers(1, 4))
def test_every_epoch_holds_every_sample_once(num_samples: int, seed: int, epochs: int) -> None:
    order = stream(num_samples, seed, epochs * num_samples)
    for epoch in range(epochs):
        assert sorted(order[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(sizes, seeds, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(0, 200), st.integers(1, 6))
def test_the_order_is_the_same_for_any_number_of_processes(
    num_samples: int, seed: int, ranks: int, accumulation: int, start: int, steps: int
) -> None:
    batch_size = 24
    expected = stream(num_samples, seed, start + steps * batch_size)[start:]
    assert trained_on(num_samples, batch_size, ranks, accumulation, start, steps, seed) == expected


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


def test_the_order_is_the_one_that_older_checkpoints_were_trained_with() -> None:
    # The order is fixed here: with another one, every resumed run would see other samples.
    assert plan.permutation(8, seed=3, epoch=1).tolist() == [7, 1, 0, 6, 2, 3, 5, 4]


@pytest.mark.parametrize(("ranks", "accumulation"), [(3, 1), (2, 4), (1, 16)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_multiple(ranks: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=f"multiple of {ranks * accumulation}"):
        plan.check_divisible(10, ranks, accumulation)


def test_the_digest_depends_on_keys_and_order() -> None:
    assert plan.batch_digest(["a", "b"]) == plan.batch_digest(["a", "b"])
    assert len({plan.batch_digest(keys) for keys in (["a", "b"], ["b", "a"], ["ab"], ["a"])}) == 4
