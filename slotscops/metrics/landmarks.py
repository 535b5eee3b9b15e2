"""Landmarks: centres of the true parts, regressed linearly from the centres of the predicted ones.

SCOPS and Lorenz et al. report this error. It says little about masks: the regression may weigh centres as it likes, so
maps that lie nowhere near a part still score well if they move with the object, and on crops around the object a
constant guess is already close. Never read it without the `position` baseline beside it, whose centres never move: its
error is that of the constant guess.

Everything is summed in whole numbers, so that neither the order of images nor the number of processes changes a digit,
and memory does not grow with the images.

Shapes: B images, H x W pixels, P predicted labels, T true parts of a class, F = 3 P + 1 regressors.
"""

import numpy as np
import torch
from torch import Tensor

from slotscops.core.records import Batch
from slotscops.metrics.protocols import ALL_CLASSES, Prediction

_UNITS = 1024  # centres are counted in so many units a crop's side: an eighth of a pixel at 128 px
_RIDGE = 1e-4  # of the regressors' own square, so that few images with many labels still have one solution
_FINE = 2**20  # distances are summed in so many units a crop's side


def label_centres(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Where each label lies.

    Args:
        labels: (B, H, W) in 0 .. num_labels - 1.

    Returns:
        centres: (B, num_labels, 2) int64 y and x from the crop's middle, 1/1024 of its side; 0 for a label not there.
        present: (B, num_labels) bool.
    """
    num_images, height, width = labels.shape
    # Twice the distance from the middle in pixels, so that it is whole: -(W - 1), ..., W - 1.
    y = (2 * torch.arange(height) - (height - 1))[:, None].expand(height, width)
    x = (2 * torch.arange(width) - (width - 1))[None, :].expand(height, width)
    cells = (labels.long() + num_labels * torch.arange(num_images)[:, None, None]).flatten()

    def totals(values: Tensor) -> Tensor:
        zeros = torch.zeros(num_images * num_labels, dtype=torch.int64)
        return zeros.index_add_(0, cells, values.expand(num_images, -1, -1).flatten()).view(num_images, num_labels)

    count = totals(torch.ones_like(y))
    sums = torch.stack([totals(y), totals(x)], dim=2).double()
    sides = torch.tensor([height, width])
    centres = sums / (2 * count.clamp(min=1))[:, :, None] / sides
    return (centres * _UNITS).round().long(), count > 0


def regressors(labels: Tensor, num_labels: int) -> Tensor:
    """(B, F) int64: centres of the predicted labels, whether each is there, and a constant."""
    centres, present = label_centres(labels, num_labels)
    constant = torch.full((len(labels), 1), _UNITS)
    return torch.cat([centres.flatten(1), present * _UNITS, constant], dim=1)


class LandmarkRegression:
    """A linear map from predicted to true centres for each part of each class; fit on one split, scored on another."""

    def __init__(self, part_names: dict[str, list[str]], num_predicted: int, side_per_box: float) -> None:
        """
        Args:
            part_names: by class, in the order of class ids.
            num_predicted: P, background included: its centre is one regressor among the others.
            side_per_box: a crop's side over the longer side of its object's box.
        """
        self.class_names = list(part_names)
        self._num_predicted = num_predicted
        self._side_per_box = side_per_box
        self._starts = np.cumsum([0, *(len(names) for names in part_names.values())]).tolist()
        num_parts, size = self._starts[-1], 3 * num_predicted + 1
        self._squares = torch.zeros(num_parts, size, size, dtype=torch.int64)  # sum of x x^T where the part is seen
        self._products = torch.zeros(num_parts, size, 2, dtype=torch.int64)  # sum of x (y, x of the true centre)
        self._distances = torch.zeros(num_parts, dtype=torch.int64)  # sum over images, 1 / _FINE of the crop's side
        self._seen = torch.zeros(num_parts, dtype=torch.int64)  # images that the distances are of

    def fit(self, prediction: Prediction, batch: Batch) -> None:
        """Adds a batch to what the map is fit to."""
        inputs = regressors(prediction.labels.cpu(), self._num_predicted)
        for part, chosen, centres in self._true_centres(batch):
            x = inputs[chosen]
            self._squares[part] += x.T @ x
            self._products[part] += x.T @ centres

    def score(self, prediction: Prediction, batch: Batch) -> None:
        """Adds the distances between true and regressed centres of a batch."""
        inputs = regressors(prediction.labels.cpu(), self._num_predicted).double()
        for part, chosen, centres in self._true_centres(batch):
            off = (inputs[chosen] @ self._map(part) - centres).norm(dim=1) / _UNITS
            self._distances[part] += int((off * _FINE).round().long().sum())
            self._seen[part] += len(off)

    def fit_counts(self) -> Tensor:
        """(N,) int64: what processes sum after fitting."""
        return torch.cat([self._squares.flatten(), self._products.flatten()])

    def set_fit_counts(self, counts: Tensor) -> None:
        self._squares = counts[: self._squares.numel()].view(self._squares.shape)
        self._products = counts[self._squares.numel() :].view(self._products.shape)

    def score_counts(self) -> Tensor:
        """(N,) int64: what processes sum after scoring."""
        return torch.cat([self._distances, self._seen])

    def set_score_counts(self, counts: Tensor) -> None:
        self._distances, self._seen = counts.view(2, -1).unbind()

    def errors(self) -> dict[str, float]:
        """By class, and over all if there are several: the mean over parts of the mean distance over images.

        As a share of the longer side of the object's box, painted with the smallest part on top. A part that was never
        seen in one of the two splits is left out; a class without any is, too.
        """
        means: dict[str, list[float]] = {}
        for number, name in enumerate(self.class_names):
            for part in range(self._starts[number], self._starts[number + 1]):
                if self._seen[part] and self._squares[part].any():
                    mean = float(self._distances[part]) / _FINE / float(self._seen[part])
                    means.setdefault(name, []).append(mean * self._side_per_box)
        rows = {name: float(np.mean(values)) for name, values in means.items()}
        if len(rows) > 1:
            rows[ALL_CLASSES] = float(np.mean([value for values in means.values() for value in values]))
        return rows

    def _true_centres(self, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
        """Of each part in the batch: its number, the images (n,) that show it, its centres (n, 2) int64 there."""
        assert batch.parts_small is not None
        found = []
        for class_id in sorted(set(batch.class_ids.tolist())):
            rows = torch.nonzero(batch.class_ids == class_id).flatten()
            start, stop = self._starts[class_id], self._starts[class_id + 1]
            centres, present = label_centres(batch.parts_small[rows], stop - start + 1)
            for label in range(1, stop - start + 1):
                shown = present[:, label]
                if shown.any():
                    found.append((start + label - 1, rows[shown], centres[shown, label]))
        return found

    def _map(self, part: int) -> Tensor:
        """(F, 2) float64 least squares; zero, the crop's middle, for a part that was not there to fit to."""
        squares = self._squares[part].double()
        ridge = _RIDGE * squares.diagonal().mean() + 1
        solution: Tensor = torch.linalg.solve(
            squares + ridge * torch.eye(len(squares), dtype=torch.float64), self._products[part].double()
        )
        return solution
