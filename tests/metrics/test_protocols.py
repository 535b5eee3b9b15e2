"""Protocols compared with scikit-learn and with values by hand, in any order of batches."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from slotscops.core.records import IGNORED, Batch
from slotscops.metrics.protocols import ALL_CLASSES, ORDERS, PROTOCOLS, Prediction, ProtocolScores
from slotscops.metrics.scores import PartScores, score_table

PARTS = {"cow": ["head", "leg"], "horse": ["head", "leg", "tail"]}
P = 4


def make_batch(
    generator: np.random.Generator, num_images: int, side: int = 6, rim: bool = False
) -> tuple[Prediction, Batch]:
    shape = (num_images, side, side)
    classes = torch.from_numpy(generator.integers(0, 2, num_images))
    first, small = (
        torch.from_numpy(generator.integers(0, 3 + classes.numpy()[:, None, None], shape).astype(np.uint8))
        for _ in range(2)
    )
    if rim:
        ignored = torch.from_numpy(generator.random(shape) < 0.2)
        first[ignored] = small[ignored] = IGNORED
    batch = Batch(
        images=torch.zeros(num_images, 3, side, side, dtype=torch.uint8),
        features=None,
        part_labels=first,
        object_masks=torch.from_numpy(generator.random(shape) < 0.7),
        class_ids=classes,
        keys=[str(number) for number in range(num_images)],
        part_labels_small=small,
    )
    labels, parts = (torch.from_numpy(generator.integers(least, P, shape)) for least in (0, 1))
    return Prediction(labels, parts), batch


def expected_labels(prediction: Prediction, batch: Batch, protocol: str, order: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true label maps (B, H, W), as the protocol's text says; -1 where a pixel does not count."""
    assert batch.part_labels is not None
    assert batch.part_labels_small is not None
    assert batch.object_masks is not None
    true = (batch.part_labels if order == "first" else batch.part_labels_small).numpy().astype(int)
    true = np.where(true == IGNORED, -1, true)
    if protocol == "mask":
        return np.where(batch.object_masks.numpy(), prediction.labels_without_background.numpy(), 0), true
    return prediction.labels.numpy(), np.where(true == 0, -1, true) if protocol == "foreground" else true


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(PROTOCOLS), st.sampled_from(ORDERS), st.booleans(), st.booleans())
def test_each_protocol_equals_scikit_learn_on_the_pixels_it_looks_at(
    seed: int, protocol: str, order: str, own_parts: bool, rim: bool
) -> None:
    prediction, batch = make_batch(np.random.default_rng(seed), 6, rim=rim)
    scores = ProtocolScores(PARTS, P, own_parts)
    scores.update(prediction, batch)
    predicted, true = expected_labels(prediction, batch, protocol, order)
    classes = batch.class_ids.numpy()
    if own_parts:  # label 1 of one class is not label 1 of another; the background is
        predicted = np.where(predicted > 0, predicted + P * classes[:, None, None], 0)
    rows = scores.scores(protocol, order)
    for name, row in rows.items():
        mine = np.ones(len(batch), bool) if name == ALL_CLASSES else classes == list(PARTS).index(name)
        joint = np.where(true > 0, true + 10 * classes[:, None, None], true)[mine]
        counts = joint >= 0
        assert row["nmi"] == pytest.approx(normalized_mutual_info_score(joint[counts], predicted[mine][counts]))
        assert row["ari"] == pytest.approx(adjusted_rand_score(joint[counts], predicted[mine][counts]))
    assert set(rows) == {*(list(PARTS)[number] for number in set(classes)), *([ALL_CLASSES] * (len(set(classes)) > 1))}


def test_the_object_mask_given_away_makes_a_method_that_finds_nothing_look_good() -> None:
    """One part for everything scores 0 with its own background and high with the given object mask."""
    true = torch.zeros(1, 4, 4, dtype=torch.uint8)
    true[:, 1:3] = 1
    batch = Batch(torch.zeros(1, 3, 4, 4), None, true, true > 0, torch.zeros(1, dtype=torch.int64), ["a"], true)
    everywhere = torch.ones(1, 4, 4, dtype=torch.int64)
    scores = ProtocolScores({"cow": ["body"]}, 2)
    scores.update(Prediction(everywhere, everywhere), batch)
    assert scores.scores("own", "first")["cow"]["nmi"] == 0
    assert scores.scores("mask", "first")["cow"] == dict.fromkeys(("nmi", "ari", "miou", "majority_miou"), 1.0)


def test_the_two_paint_orders_differ_where_masks_overlap_and_only_there() -> None:
    first = torch.tensor([[[1, 1], [1, 0]]], dtype=torch.uint8)
    small = torch.tensor([[[2, 1], [1, 0]]], dtype=torch.uint8)
    batch = Batch(torch.zeros(1, 3, 2, 2), None, first, first > 0, torch.zeros(1, dtype=torch.int64), ["a"], small)
    scores = ProtocolScores({"cow": ["head", "eye"]}, 3)
    scores.update(Prediction(small.long(), small.long().clamp(min=1)), batch)
    assert scores.table("own", "small").tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert scores.table("own", "first").tolist() == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]


def test_majority_matching_joins_found_parts_by_hand() -> None:
    # True 0 has 4 pixels, true 1 has 6. Labels 1 and 2 both lie mostly on 1 and join; label 0 lies on 0.
    table = np.array([[3, 1], [0, 3], [1, 2]])
    assert score_table(table)["majority_miou"] == pytest.approx((3 / 5 + 5 / 7) / 2)
    assert score_table(table)["miou"] == pytest.approx((3 / 5 + 3 / 6) / 2)


def test_a_true_part_that_no_label_mostly_covers_counts_nothing() -> None:
    assert score_table(np.array([[5, 2, 0], [0, 0, 0]]))["majority_miou"] == pytest.approx((5 / 7 + 0) / 2)
    assert np.isnan(score_table(np.zeros((2, 2), np.int64))["majority_miou"])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_counts_summed_over_processes_are_those_of_one(seed: int, num_ranks: int) -> None:
    generator = np.random.default_rng(seed)
    batches = [make_batch(generator, 3) for _ in range(5)]
    whole = ProtocolScores(PARTS, P)
    ranks = [ProtocolScores(PARTS, P) for _ in range(num_ranks)]
    for number, (prediction, batch) in enumerate(batches):
        whole.update(prediction, batch)
        ranks[number % num_ranks].update(prediction, batch)
    summed = ProtocolScores(PARTS, P)
    summed.set_counts(torch.stack([rank.counts() for rank in ranks]).sum(0))
    for protocol in PROTOCOLS:
        for order in ORDERS:
            assert summed.scores(protocol, order) == whole.scores(protocol, order)
    assert summed.pooled() == whole.pooled()


def test_memory_does_not_grow_with_the_images() -> None:
    generator = np.random.default_rng(0)
    scores = ProtocolScores(PARTS, P)
    size = scores.counts().numel()
    for _ in range(20):
        prediction, batch = make_batch(generator, 4)
        scores.update(prediction, batch)
        gone = weakref.ref(prediction.labels), weakref.ref(batch)
        del prediction, batch
        assert gone[0]() is None
        assert gone[1]() is None
    assert scores.counts().numel() == size
    assert int(scores.table("own", "first").sum()) == 20 * 4 * 36


def test_a_run_is_scored_while_it_trains_as_the_own_and_the_mask_protocol_score_it() -> None:
    prediction, batch = make_batch(np.random.default_rng(3), 6)
    scores = ProtocolScores(PARTS, P)
    scores.update(prediction, batch)
    pooled = scores.pooled()
    assert pooled["nmi"] == scores.scores("own", "first")[ALL_CLASSES]["nmi"]
    assert pooled["fg_nmi"] == scores.scores("foreground", "first")[ALL_CLASSES]["nmi"]
    assert pooled["mask_ari"] == scores.scores("mask", "first")[ALL_CLASSES]["ari"]
    assert set(PartScores(2, 2).compute()) < set(pooled)
