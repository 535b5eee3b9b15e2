"""Part centres computed by hand, and a regression that must find a linear map."""

import numpy as np
import pytest
import torch

from slotscops.core.records import IGNORED, Batch
from slotscops.metrics.landmarks import LandmarkRegression, label_centres
from slotscops.metrics.protocols import ALL_CLASSES, Prediction

SIDE = 32
PARTS = {"cow": ["head", "tail"], "horse": ["head"]}


def squares(centres: np.ndarray) -> torch.Tensor:
    """(B, SIDE, SIDE) labels 1, 2, ... as 3 x 3 squares around (B, L, 2) centres."""
    labels = torch.zeros(len(centres), SIDE, SIDE, dtype=torch.uint8)
    for image, rows in enumerate(centres):
        for label, (y, x) in enumerate(rows, start=1):
            labels[image, y - 1 : y + 2, x - 1 : x + 2] = label
    return labels


def make_batch(true: torch.Tensor, class_ids: list[int]) -> Batch:
    images = torch.zeros(len(true), 3, SIDE, SIDE, dtype=torch.uint8)
    return Batch(images, None, true, true > 0, torch.tensor(class_ids), ["k"] * len(true), true)


def moving(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True head and tail, and predicted labels at places that follow from them by a linear map."""
    generator = np.random.default_rng(seed)
    head = generator.integers(4, 13, (num_images, 1, 2))
    tail = generator.integers(18, 28, (num_images, 1, 2))
    found = np.concatenate([SIDE - 1 - tail, head[..., ::-1] + 13], axis=1)  # mirrored; swapped and shifted
    return squares(np.concatenate([head, tail], axis=1)), squares(found)


def errors_of(fit_labels: torch.Tensor, fit_true: torch.Tensor, labels: torch.Tensor, true: torch.Tensor) -> float:
    regression = LandmarkRegression({"cow": ["head", "tail"]}, 3, side_per_box=1.0)
    for method, found, wanted in ((regression.fit, fit_labels, fit_true), (regression.score, labels, true)):
        method(Prediction(found.long(), found.long()), make_batch(wanted, [0] * len(wanted)))
    return regression.errors()["cow"]


def test_centres_of_a_small_grid_by_hand() -> None:
    labels = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]]])
    centres, present = label_centres(labels, 4)
    assert present.tolist() == [[True, True, True, False]]
    # Pixel middles of a side of 4 lie at -3/8, -1/8, 1/8, 3/8; in units of 1/1024.
    assert centres[0, 1].tolist() == [-384, -256]
    assert centres[0, 2].tolist() == [256, 384]
    assert centres[0, 3].tolist() == [0, 0]


def test_pixels_to_be_ignored_move_no_centre() -> None:
    true, labels = moving(60, seed=0)
    rimmed, beside = true.clone(), labels.clone()
    rimmed[:, :, :3] = IGNORED
    beside[:, :, :3] = 1  # found where nobody knows what is there
    assert torch.equal(label_centres(rimmed, 3)[0][:, 1:], label_centres(true, 3)[0][:, 1:])
    clean = labels.clone()
    clean[:, :, :3] = IGNORED
    regression, expected = (LandmarkRegression({"cow": ["head", "tail"]}, 3, side_per_box=1.0) for _ in range(2))
    regression.fit(Prediction(beside.long(), beside.long()), make_batch(rimmed, [0] * 60))
    expected.fit(Prediction(clean.long(), clean.long()), make_batch(rimmed, [0] * 60))
    assert torch.equal(regression.fit_counts(), expected.fit_counts())
    assert int(regression.fit_counts().count_nonzero())


def test_parts_that_follow_linearly_are_found_on_photos_not_fit_to() -> None:
    true, labels = moving(200, seed=0)
    new_true, new_labels = moving(50, seed=1)
    assert errors_of(labels, true, new_labels, new_true) < 0.01
    # Labels that never move leave the constant guess, which is off by a tenth of the crop.
    still = labels[:1]
    guess = errors_of(still.expand(200, -1, -1), true, still.expand(50, -1, -1), new_true)
    centres, _ = label_centres(new_true, 3)
    spread = (centres[:, 1:] - centres[:, 1:].double().mean(0)).norm(dim=2).mean() / 1024
    assert guess == pytest.approx(float(spread), rel=0.05)
    assert guess > 0.08


def test_the_error_is_a_share_of_the_box_and_parts_weigh_the_same_over_classes() -> None:
    true, labels = moving(60, seed=0)
    class_ids = [0] * 40 + [1] * 20
    true[40:][true[40:] == 2] = 0  # a horse has no tail here
    prediction, batch = Prediction(labels.long() * 0, labels.long()), make_batch(true, class_ids)
    rows = []
    for side_per_box in (1.0, 1.1):
        regression = LandmarkRegression(PARTS, 3, side_per_box)
        regression.fit(prediction, batch)
        regression.score(prediction, batch)
        rows.append(regression.errors())
    assert rows[1] == pytest.approx({name: 1.1 * error for name, error in rows[0].items()})
    assert rows[0][ALL_CLASSES] == pytest.approx((2 * rows[0]["cow"] + rows[0]["horse"]) / 3)


def test_a_part_never_seen_in_one_of_the_splits_is_left_out() -> None:
    true, labels = moving(20, seed=0)
    without_tail = torch.where(true == 2, 0, true)
    regression = LandmarkRegression({"cow": ["head", "tail"], "horse": ["head"]}, 3, side_per_box=1.0)
    regression.fit(Prediction(labels.long(), labels.long()), make_batch(without_tail, [0] * 20))
    regression.score(Prediction(labels.long(), labels.long()), make_batch(true, [0] * 20))
    errors = regression.errors()
    assert set(errors) == {"cow"}
    assert errors["cow"] < 0.02  # of the head alone, which follows linearly


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_over_processes_give_the_same_error_to_the_last_digit(num_ranks: int) -> None:
    true, labels = moving(30, seed=0)
    groups = [list(range(rank, 30, num_ranks)) for rank in range(num_ranks)]
    results = []
    for parts in ([list(range(30))], groups):
        ranks = [LandmarkRegression({"cow": ["head", "tail"]}, 3, 1.1) for _ in parts]
        batches = [(Prediction(labels[p].long(), labels[p].long()), make_batch(true[p], [0] * len(p))) for p in parts]
        for rank, given in zip(ranks, batches, strict=True):
            rank.fit(*given)
        fitted = torch.stack([rank.fit_counts() for rank in ranks]).sum(0)
        for rank, given in zip(ranks, batches, strict=True):
            rank.set_fit_counts(fitted)
            rank.score(*given)
        ranks[0].set_score_counts(torch.stack([rank.score_counts() for rank in ranks]).sum(0))
        results.append(ranks[0].errors())
    assert results[0] == results[1]
