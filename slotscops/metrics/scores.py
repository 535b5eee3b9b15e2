"""Scores of predicted parts against true parts, from one table of pixel counts.

Shapes: P predicted labels, T true labels. Label 0 is background or no part. Pixels of the true label 255 are ignored.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core.records import IGNORED


class PartScores:
    """Counts pixels by predicted and true label over any number of images, and scores the counts.

    The counts are integers, so the scores do not depend on the order of images or on their distribution over
    processes. To score several processes, sum their tables and score the sum.
    """

    def __init__(self, num_predicted: int, num_true: int) -> None:
        """
        Args:
            num_predicted: predicted labels are 0 .. num_predicted - 1.
            num_true: true labels are 0 .. num_true - 1, 0 for no part.

        Raises:
            ValueError: if either number is below 1.
        """
        if num_predicted < 1 or num_true < 1:
            raise ValueError(f"{num_predicted} predicted and {num_true} true labels: needed at least one of each")
        self._table = torch.zeros(num_predicted, num_true, dtype=torch.int64, device="cpu")

    @classmethod
    def from_table(cls, table: Tensor) -> "PartScores":
        """Makes scores from (P, T) counts, for example from a sum of tables over processes.

        Raises:
            ValueError: if the table is not two-dimensional, or its numbers are not integers of at least 0.
        """
        if (
            table.ndim != 2
            or table.is_floating_point()
            or table.is_complex()
            or (table.numel() and int(table.min()) < 0)
        ):
            raise ValueError(
                f"table {tuple(table.shape)} of {table.dtype}: needed (P, T) counts, whole and not negative"
            )
        scores = cls(*table.shape)
        scores._table += table.to("cpu", torch.int64)
        return scores

    @property
    def table(self) -> Tensor:
        """A copy of the (P, T) int64 pixel counts, on the CPU."""
        return self._table.clone()

    def update(self, predicted: Tensor | NDArray[Any], true: Tensor | NDArray[Any]) -> None:
        """Adds the pixels of two label maps of the same shape. Any shape will do.

        Pixels whose true label is 255 are left out, unless 255 is one of the true labels.

        Raises:
            ValueError: if the shapes differ, or labels are not integers or lie outside the table. Nothing is added.
        """
        if tuple(predicted.shape) != tuple(true.shape):
            raise ValueError(f"predicted {tuple(predicted.shape)}, true {tuple(true.shape)}: needed the same shape")
        num_predicted, num_true = self._table.shape
        rows = _as_labels(predicted, "predicted", num_predicted)
        columns = _as_labels(true, "true", num_true, may_be_ignored=True)
        cells = (rows.to(columns.device) * num_true + columns)[columns < num_true]
        counts = torch.bincount(cells, minlength=num_predicted * num_true)
        self._table += counts.cpu().view(num_predicted, num_true)

    def merge(self, other: "PartScores") -> None:
        """Adds the counts of another `PartScores`.

        Raises:
            ValueError: if its table has another shape.
        """
        if self._table.shape != other._table.shape:
            raise ValueError(
                f"table {tuple(other._table.shape)}: needed {tuple(self._table.shape)}, that of the other table"
            )
        self._table += other._table

    def compute(self) -> dict[str, float]:
        """Computes all scores. A score is NaN if there is no pixel to score.

        Returns:
            nmi: normalised mutual information in [0, 1], see `normalized_mutual_information`.
            ari: adjusted Rand index in [-0.5, 1], see `adjusted_rand_index`.
            fg_nmi, fg_ari: the same over the pixels of true parts only. Do not compare them with nmi and ari.
            miou: mean intersection over union in [0, 1], see `mean_iou`.

        Source: Locatello et al. (arXiv:2006.15055) for FG-ARI.
        """
        table = self._table.numpy()
        foreground = table[:, 1:]
        return {
            "nmi": normalized_mutual_information(table),
            "ari": adjusted_rand_index(table),
            "fg_nmi": normalized_mutual_information(foreground),
            "fg_ari": adjusted_rand_index(foreground),
            "miou": mean_iou(table),
        }


def score_table(table: NDArray[np.int64]) -> dict[str, float]:
    """The four scores that every protocol reports: `nmi`, `ari`, `miou`, `majority_miou`. NaN without pixels.

    Args:
        table: (P, T) pixel counts of the pixels that the protocol looks at.
    """
    return {
        "nmi": normalized_mutual_information(table),
        "ari": adjusted_rand_index(table),
        "miou": mean_iou(table),
        "majority_miou": majority_mean_iou(table),
    }


def normalized_mutual_information(table: NDArray[np.int64]) -> float:
    """How much the predicted label tells about the true one, from 0 (nothing) to 1 (everything).

        NMI = I(predicted; true) / ((H(predicted) + H(true)) / 2)

    It is 1 if both sides have a single label, 0 if only one side has, and NaN without pixels.

    Args:
        table: (P, T) pixel counts.

    Source: `sklearn.metrics.normalized_mutual_info_score` with its default, the arithmetic mean.
    """
    total = int(table.sum())
    if total == 0:
        return math.nan
    predicted, true = table.sum(1), table.sum(0)
    if np.count_nonzero(predicted) == np.count_nonzero(true) == 1:
        return 1.0
    joint = table / total
    expected = np.outer(predicted / total, true / total)
    seen = table > 0
    information = float(np.sum(joint[seen] * np.log(joint[seen] / expected[seen])))
    mean_entropy = (_entropy(predicted) + _entropy(true)) / 2
    return min(max(information / mean_entropy, 0.0), 1.0)


def adjusted_rand_index(table: NDArray[np.int64]) -> float:
    """How well prediction and truth agree on which pairs of pixels have the same label.

        ARI = (n_11 - E) / ((n_1. + n_.1) / 2 - E),   E = n_1. n_.1 / n

    There are n ordered pairs of two pixels. n_1. have the same label in the prediction, n_.1 in truth, n_11 in both.
    The index is 1 if prediction and truth agree on every pair, 0 on average by chance, and NaN without pixels.

    Args:
        table: (P, T) pixel counts.

    Source: Hubert and Arabie (1985), as `sklearn.metrics.adjusted_rand_score`.
    """
    total = int(table.sum())
    if total == 0:
        return math.nan
    # We use Python's integers, because the products below reach 1e48 for 1e12 pixels.
    together = _ordered_pairs(table.ravel())
    predicted, true = _ordered_pairs(table.sum(1)), _ordered_pairs(table.sum(0))
    if predicted == true == together:
        return 1.0
    pairs = total * (total - 1)
    expected = predicted * true  # E times the number of pairs, like all terms below
    return 2 * (together * pairs - expected) / ((predicted + true) * pairs - 2 * expected)


def mean_iou(table: NDArray[np.int64]) -> float:
    """Mean intersection over union in [0, 1] of the true labels that occur, including background.

    Labels are matched one to one so that the mean is largest. A true label without a match counts as 0. The result is
    NaN without pixels.

    Args:
        table: (P, T) pixel counts.
    """
    occurring = table[:, table.sum(0) > 0]  # (P, labels that occur)
    if not occurring.size:
        return math.nan
    union = table.sum(1)[:, None] + occurring.sum(0)[None, :] - occurring
    iou = occurring / union  # no union is 0, because every column has pixels
    from scipy.optimize import linear_sum_assignment  # here, because a start of training need not wait for SciPy

    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / occurring.shape[1])


def majority_mean_iou(table: NDArray[np.int64]) -> float:
    """Mean intersection over union in [0, 1] of the true labels that occur, with predicted labels merged.

    Each predicted label is assigned to the true label that most of its pixels have, or to the first of several such.
    Several predicted labels may thus form one part. A true label without any counts as 0. NaN without pixels.

    Args:
        table: (P, T) pixel counts.
    """
    occurring = table[:, table.sum(0) > 0]  # (P, labels that occur)
    if not occurring.size:
        return math.nan
    merged = np.zeros((occurring.shape[1], occurring.shape[1]), np.int64)  # row: the true label that is assigned
    np.add.at(merged, occurring.argmax(1), occurring)
    found = np.diag(merged)
    return float(np.mean(found / (merged.sum(1) + merged.sum(0) - found)))


def _entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that the counts describe."""
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _ordered_pairs(counts: NDArray[Any]) -> int:
    """Number of ordered pairs of two pixels that have the same label, from the pixel count of each label."""
    return sum(count * (count - 1) for count in counts.tolist())


def _as_labels(labels: Tensor | NDArray[Any], name: str, num_labels: int, may_be_ignored: bool = False) -> Tensor:
    """Flattens labels to (N,) int64.

    Raises:
        ValueError: if a label is not an integer in 0 .. num_labels - 1, nor `IGNORED` where it may be.
    """
    if isinstance(labels, Tensor):
        is_whole = not (labels.is_floating_point() or labels.is_complex())
        flat = labels.detach().flatten().long()
    else:
        is_whole = labels.dtype.kind in "iub"
        flat = torch.from_numpy(labels.ravel().astype(np.int64))  # a copy, because torch warns about read-only arrays
    if not is_whole:
        raise ValueError(f"{name} labels of {labels.dtype}: needed whole numbers")
    checked = flat[flat != IGNORED] if may_be_ignored else flat
    if checked.numel():
        for label in (int(checked.min()), int(checked.max())):
            if not 0 <= label < num_labels:
                raise ValueError(f"{name} label {label}: needed 0 to {num_labels - 1}")
    return flat
