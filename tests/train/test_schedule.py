"""The factor of the learning rate: values by hand, and properties of every schedule."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.train.schedule import learning_rate_factor

KINDS = ["poly", "cosine", "constant"]
kinds = st.sampled_from(KINDS)
steps = st.integers(1, 2000)


@pytest.mark.parametrize("step", [0, 1, 250, 999])
def test_poly_without_warmup_is_that_of_scops(step: int) -> None:
    assert learning_rate_factor(step, 1000, "poly", 0) == pytest.approx((1 - step / 1000) ** 0.9)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert learning_rate_factor(0, 100, "cosine", 0) == 1
    assert learning_rate_factor(25, 100, "cosine", 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert learning_rate_factor(50, 100, "cosine", 0) == pytest.approx(0.5)
    assert learning_rate_factor(100, 100, "cosine", 0) == pytest.approx(0)


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate_factor(step, 10, "constant", 0) for step in range(11)} == {1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_climbs_in_equal_steps_to_the_peak(kind: str) -> None:
    factors = [learning_rate_factor(step, 100, kind, warmup_steps=3) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_power_1_falls_in_a_straight_line() -> None:
    factors = [learning_rate_factor(step, 6, "poly", warmup_steps=2, power=1) for step in range(2, 7)]
    assert factors == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@settings(deadline=None, max_examples=200)
@given(kind=kinds, total=steps, warmup=st.integers(0, 2000), data=st.data())
def test_every_factor_of_a_run_lies_above_0_and_at_most_at_1(
    kind: str, total: int, warmup: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert 0 < learning_rate_factor(step, total, kind, warmup) <= 1


@settings(deadline=None, max_examples=200)
@given(kind=kinds, total=steps, warmup=st.integers(0, 50), step=st.integers(0, 3000))
def test_after_warmup_the_factor_never_rises_again(kind: str, total: int, warmup: int, step: int) -> None:
    step += warmup
    now, later = (learning_rate_factor(s, total, kind, warmup) for s in (step, step + 1))
    assert 0 <= later <= now


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_past_the_last_step_the_factor_stays_0(kind: str) -> None:
    assert learning_rate_factor(100, 100, kind, 10) == pytest.approx(0)
    assert learning_rate_factor(140, 100, kind, 10) == pytest.approx(0)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'linear': needed poly, cosine or constant"):
        learning_rate_factor(0, 10, "linear", 0)


@pytest.mark.parametrize(("step", "total", "warmup"), [(-1, 10, 0), (0, 0, 0), (0, 10, -1)])
def test_steps_out_of_range_are_refused(step: int, total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="needed a step and a warmup of at least 0"):
        learning_rate_factor(step, total, "poly", warmup)
