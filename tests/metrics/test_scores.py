"""Scores from a table of counts against scikit-learn on the labels themselves, and by hand on small grids."""

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from slotscops.core.records import IGNORED
from slotscops.metrics.scores import PartScores

P, T = 5, 4
pixels = st.lists(st.tuples(st.integers(0, P - 1), st.integers(0, T - 1)), min_size=1, max_size=60)
tables = st.lists(st.lists(st.integers(0, 6), min_size=T, max_size=T), min_size=P, max_size=P)


def score(predicted: Any, true: Any, num_predicted: int = P, num_true: int = T) -> dict[str, float]:
    scores = PartScores(num_predicted, num_true)
    scores.update(np.asarray(predicted), np.asarray(true))
    return scores.compute()


def both_labels(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.array(pairs).T
    return predicted, true


@settings(deadline=None, max_examples=300)
@given(pixels)
def test_nmi_and_ari_equal_those_of_sklearn(pairs: list[tuple[int, int]]) -> None:
    predicted, true = both_labels(pairs)
    result = score(predicted, true)
    assert result["nmi"] == pytest.approx(normalized_mutual_info_score(true, predicted), abs=1e-9)
    assert result["ari"] == pytest.approx(adjusted_rand_score(true, predicted), abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(pixels)
def test_foreground_scores_equal_those_of_sklearn_on_the_pixels_of_true_parts(pairs: list[tuple[int, int]]) -> None:
    predicted, true = both_labels(pairs)
    result = score(predicted, true)
    inside = true != 0
    if not inside.any():
        assert math.isnan(result["fg_nmi"])
        assert math.isnan(result["fg_ari"])
        return
    predicted, true = predicted[inside], true[inside]
    assert result["fg_nmi"] == pytest.approx(normalized_mutual_info_score(true, predicted), abs=1e-9)
    assert result["fg_ari"] == pytest.approx(adjusted_rand_score(true, predicted), abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(pixels)
def test_miou_is_that_of_the_best_of_all_matchings(pairs: list[tuple[int, int]]) -> None:
    predicted, true = both_labels(pairs)
    occurring = np.unique(true)

    def iou(row: int, column: int) -> float:
        found, wanted = predicted == row, true == column
        return float(np.sum(found & wanted) / np.sum(found | wanted))

    best = max(
        sum(iou(row, column) for row, column in zip(rows, occurring, strict=True))
        for rows in permutations(range(P), len(occurring))
    )
    assert score(predicted, true)["miou"] == pytest.approx(best / len(occurring), abs=1e-12)


def test_a_perfect_prediction_under_other_names_scores_1_throughout() -> None:
    true = np.array([[0, 0, 1], [2, 2, 1], [3, 3, 3]])
    predicted = np.array([4, 2, 0, 1])[true]
    assert score(predicted, true) == pytest.approx({"nmi": 1, "ari": 1, "fg_nmi": 1, "fg_ari": 1, "miou": 1})


def test_scores_of_a_small_grid_by_hand() -> None:
    true = [[0, 0], [1, 1]]
    predicted = [[0, 0], [0, 1]]
    result = score(predicted, true, 2, 2)
    entropy_true, entropy_predicted = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    information = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125)
    assert result["nmi"] == pytest.approx(2 * information / (entropy_true + entropy_predicted))
    assert result["ari"] == 0  # of 6 pairs 2 are together in truth, 3 in the prediction, 1 in both: as by chance
    assert result["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_one_cluster_for_everything_finds_nothing() -> None:
    result = score([0, 0, 0, 0], [0, 0, 1, 2])
    assert result["nmi"] == 0
    assert result["ari"] == 0
    assert result["fg_nmi"] == 0
    assert result["miou"] == pytest.approx((2 / 4) / 3)


def test_one_cluster_for_one_part_is_perfect_as_in_sklearn() -> None:
    assert score([3, 3], [1, 1]) == {"nmi": 1, "ari": 1, "fg_nmi": 1, "fg_ari": 1, "miou": 1}


def test_labels_worse_than_chance_have_a_negative_ari() -> None:
    assert score([0, 1, 0, 1], [0, 0, 1, 1])["ari"] == pytest.approx(-0.5)


def test_true_labels_without_a_predicted_label_of_their_own_count_as_missed() -> None:
    assert score([0, 0], [0, 1], num_predicted=1, num_true=2)["miou"] == pytest.approx(0.5 / 2)


def test_without_pixels_every_score_is_nan() -> None:
    scores = PartScores(P, T)
    scores.update(np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8))
    assert all(math.isnan(value) for value in scores.compute().values())


def test_without_true_parts_only_the_foreground_scores_are_nan() -> None:
    result = score([0, 1], [0, 0])
    assert {name for name, value in result.items() if math.isnan(value)} == {"fg_nmi", "fg_ari"}


def test_only_foreground_exists_when_background_is_the_only_true_label() -> None:
    assert set(PartScores(3, 1).compute()) == {"nmi", "ari", "fg_nmi", "fg_ari", "miou"}


@settings(deadline=None, max_examples=100)
@given(tables)
def test_scores_stay_the_same_when_every_count_grows_to_1e12_pixels(counts: list[list[int]]) -> None:
    table = torch.tensor(counts)
    factor = 10**12 // max(int(table.sum()), 1)
    small, large = PartScores.from_table(table).compute(), PartScores.from_table(table * factor).compute()
    for name in ("nmi", "fg_nmi", "miou"):
        assert large[name] == pytest.approx(small[name], abs=1e-12, nan_ok=True)
    if int(table.sum()):
        assert -0.5 <= large["ari"] <= 1


def test_ari_of_1e12_pixels_equals_its_limit() -> None:
    # 2 x 2 labels with 3 of 4 pixels on the diagonal: E and the maximum as shares of all pairs.
    table = torch.tensor([[3, 1], [1, 3]]) * (10**12 // 8)
    together, at_random = (9 + 1 + 1 + 9) / 64, 0.25
    ari = PartScores.from_table(table).compute()["ari"]
    assert ari == pytest.approx((together - at_random) / (0.5 - at_random), abs=1e-10)


@settings(deadline=None, max_examples=100)
@given(pixels, st.integers(0, 60))
def test_merging_tables_equals_one_pass(pairs: list[tuple[int, int]], cut: int) -> None:
    predicted, true = both_labels(pairs)
    whole, first, second = PartScores(P, T), PartScores(P, T), PartScores(P, T)
    whole.update(predicted, true)
    first.update(predicted[:cut], true[:cut])
    second.update(torch.from_numpy(predicted[cut:].copy()), torch.from_numpy(true[cut:].copy()))
    summed = PartScores.from_table(first.table + second.table)
    first.merge(second)
    assert torch.equal(first.table, whole.table)
    assert torch.equal(summed.table, whole.table)
    assert summed.compute() == pytest.approx(whole.compute(), abs=0, nan_ok=True)


def test_the_table_counts_predicted_by_true() -> None:
    scores = PartScores(2, 3)
    scores.update(torch.tensor([[[1, 1], [0, 1]]], dtype=torch.uint8), torch.tensor([[[2, 2], [0, 1]]]))
    assert scores.table.dtype == torch.int64
    assert scores.table.tolist() == [[1, 0, 0], [0, 1, 2]]


def test_writing_to_the_table_that_was_handed_out_changes_no_score() -> None:
    scores = PartScores(2, 2)
    scores.table.add_(1)
    given = torch.ones(2, 2, dtype=torch.int64)
    built = PartScores.from_table(given)
    given.add_(1)
    assert int(scores.table.sum()) == 0
    assert int(built.table.sum()) == 4


def test_arrays_that_must_not_be_written_to_are_read() -> None:
    labels = np.array([0, 1], dtype=np.uint16)
    labels.flags.writeable = False
    assert score(labels, labels)["miou"] == 1


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.array([0, 5]), np.array([0, 0]), "predicted label 5: needed 0 to 4"),
        (np.array([0, 0]), np.array([0, 4]), "true label 4: needed 0 to 3"),
        (torch.tensor([0, 0]), torch.tensor([-1, 0]), "true label -1: needed 0 to 3"),
        (np.array([[0, 0]]), np.array([0, 0]), r"predicted \(1, 2\), true \(2,\): needed the same shape"),
        (np.array([0.0]), np.array([0]), "predicted labels of float64: needed whole numbers"),
        (torch.tensor([0]), torch.tensor([0.5]), "true labels of torch.float32: needed whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_named_and_nothing_is_counted(predicted: Any, true: Any, message: str) -> None:
    scores = PartScores(P, T)
    with pytest.raises(ValueError, match=message):
        scores.update(predicted, true)
    assert int(scores.table.sum()) == 0


@pytest.mark.parametrize("table", [torch.zeros(3), torch.zeros(2, 2), torch.tensor([[1, -1]])])
def test_what_is_no_table_of_counts_is_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="counts"):
        PartScores.from_table(table)


def test_tables_of_other_labels_are_not_merged() -> None:
    with pytest.raises(ValueError, match=r"table \(2, 3\): needed \(2, 2\)"):
        PartScores(2, 2).merge(PartScores(2, 3))


def test_scores_need_at_least_one_label_of_each() -> None:
    with pytest.raises(ValueError, match="0 predicted and 2 true labels"):
        PartScores(0, 2)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, P - 1), st.sampled_from([*range(T), IGNORED])), min_size=1, max_size=60).filter(
        lambda pairs: any(true != IGNORED for _, true in pairs)
    )
)
def test_pixels_to_be_ignored_are_in_no_score(pairs: list[tuple[int, int]]) -> None:
    kept = [(found, true) for found, true in pairs if true != IGNORED]
    scores = score([found for found, _ in pairs], [true for _, true in pairs])
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(*zip(*kept, strict=True)))
    assert scores["ari"] == pytest.approx(adjusted_rand_score(*zip(*kept, strict=True)))
