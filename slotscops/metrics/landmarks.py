"""Landmark error: predicts the centres of the true parts from those of the predicted parts by linear regression.

SCOPS and Lorenz et al. report this error. It says little about masks. The regression may combine the centres with any
weights, so maps far from a part still score well if they move with the object. On crops around the object even a
constant guess is close. Always compare with the `position` baseline: its centres never move, so its error is that of
the constant guess.

All sums are sums of integers. The result therefore does not depend on the order of images or the number of processes,
and the memory does not grow with the number of images.

Shapes: B images, H x W pixels, P predicted labels, T true parts of a class, F = 3 P + 1 regressors.
"""

import numpy as np
import torch
from torch import Tensor

from slotscops.core.records import IGNORED, Batch
from slotscops.metrics.protocols import ALL_CLASSES, Prediction

_UNITS = 1024  # units per side of the crop in which centres are rounded: an eighth of a pixel at 128 px
_RIDGE = 1e-4  # relative to the mean square of the regressors; makes the solution unique with few images
_FINE = 2**20  # units per side of the crop in which distances are summed


def label_centres(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """The centre of the pixels of each label.

    Args:
        labels: (B, H, W) in 0 .. num_labels - 1, or `IGNORED` (255) for pixels to leave out.

    Returns:
        centres: (B, num_labels, 2) int64 y and x from the middle of the crop, in units of 1/1024 of its side. They are
            0 for an absent label.
        present: (B, num_labels) bool, true where the image has the label.
    """
    num_images, height, width = labels.shape
    # Twice the distance from the middle in pixels, which is an integer: -(W - 1), ..., W - 1.
    y = (2 * torch.arange(height) - (height - 1))[:, None].expand(height, width)
    x = (2 * torch.arange(width) - (width - 1))[None, :].expand(height, width)
    columns = labels.long().where(labels != IGNORED, num_labels)  # one column more for what is left out
    cells = (columns + (num_labels + 1) * torch.arange(num_images)[:, None, None]).flatten()

    def totals(values: Tensor) -> Tensor:
        zeros = torch.zeros(num_images * (num_labels + 1), dtype=torch.int64)
        sums = zeros.index_add_(0, cells, values.expand(num_images, -1, -1).flatten())
        return sums.view(num_images, num_labels + 1)[:, :num_labels]

    count = totals(torch.ones_like(y))
    sums = torch.stack([totals(y), totals(x)], dim=2).double()
    sides = torch.tensor([height, width])
    centres = sums / (2 * count.clamp(min=1))[:, :, None] / sides
    return (centres * _UNITS).round().long(), count > 0


def regressors(labels: Tensor, num_labels: int) -> Tensor:
    """(B, F) int64 inputs of the regression: the centre of each predicted label, its presence, and a constant."""
    centres, present = label_centres(labels, num_labels)
    constant = torch.full((len(labels), 1), _UNITS)
    return torch.cat([centres.flatten(1), present * _UNITS, constant], dim=1)


class LandmarkRegression:
    """One linear map from predicted to true centres for each part of each class.

    The maps are fit on one split and scored on another.
    """

    def __init__(self, part_names: dict[str, list[str]], num_predicted: int, side_per_box: float) -> None:
        """
        Args:
            part_names: names of the true parts by class, in the order of class ids.
            num_predicted: P, background included. The centre of the background is a regressor too.
            side_per_box: the crop's side divided by the longer side of the object's box.
        """
        self.class_names = list(part_names)
        self._num_predicted = num_predicted
        self._side_per_box = side_per_box
        self._starts = np.cumsum([0, *(len(names) for names in part_names.values())]).tolist()
        num_parts, size = self._starts[-1], 3 * num_predicted + 1
        self._squares = torch.zeros(num_parts, size, size, dtype=torch.int64)  # sum of x x^T, images with the part
        self._products = torch.zeros(num_parts, size, 2, dtype=torch.int64)  # sum of x times its true centre (y, x)
        self._distances = torch.zeros(num_parts, dtype=torch.int64)  # sum over images, in 1 / _FINE of the side
        self._seen = torch.zeros(num_parts, dtype=torch.int64)  # number of images in that sum

    def fit(self, prediction: Prediction, batch: Batch) -> None:
        """Adds a batch, read with labels, to the data that the maps are fit to."""
        inputs = self._inputs(prediction, batch)
        for part, chosen, centres in self._true_centres(batch):
            x = inputs[chosen]
            self._squares[part] += x.T @ x
            self._products[part] += x.T @ centres

    def score(self, prediction: Prediction, batch: Batch) -> None:
        """Adds the distances between the true and the regressed centres of a batch that was read with labels."""
        inputs = self._inputs(prediction, batch).double()
        for part, chosen, centres in self._true_centres(batch):
            off = (inputs[chosen] @ self._map(part) - centres).norm(dim=1) / _UNITS
            self._distances[part] += int((off * _FINE).round().long().sum())
            self._seen[part] += len(off)

    def fit_counts(self) -> Tensor:
        """(N,) int64 counts to sum over processes after fitting."""
        return torch.cat([self._squares.flatten(), self._products.flatten()])

    def set_fit_counts(self, counts: Tensor) -> None:
        """Replaces the counts of `fit_counts`, for example by their sum over processes."""
        self._squares = counts[: self._squares.numel()].view(self._squares.shape)
        self._products = counts[self._squares.numel() :].view(self._products.shape)

    def score_counts(self) -> Tensor:
        """(N,) int64 counts to sum over processes after scoring."""
        return torch.cat([self._distances, self._seen])

    def set_score_counts(self, counts: Tensor) -> None:
        """Replaces the counts of `score_counts`, for example by their sum over processes."""
        self._distances, self._seen = counts.view(2, -1).unbind()

    def errors(self) -> dict[str, float]:
        """The landmark error by class, and over all classes if there are several.

        The error is the mean over parts of the mean distance over images, as a share of the longer side of the
        object's box. True parts are painted with the smallest part on top. A part that does not occur in both splits
        is left out, and so is a class without any part left.
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

    def _inputs(self, prediction: Prediction, batch: Batch) -> Tensor:
        """(B, F) int64 regressors of the predicted labels, without the pixels to be ignored."""
        assert batch.part_labels_small is not None
        labels = prediction.labels.cpu().long()
        return regressors(labels.where(batch.part_labels_small != IGNORED, IGNORED), self._num_predicted)

    def _true_centres(self, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
        """For each true part in the batch: its number, the n images that show it (n,), its centres (n, 2) int64."""
        assert batch.part_labels_small is not None
        found = []
        for class_id in sorted(set(batch.class_ids.tolist())):
            rows = torch.nonzero(batch.class_ids == class_id).flatten()
            start, stop = self._starts[class_id], self._starts[class_id + 1]
            centres, present = label_centres(batch.part_labels_small[rows], stop - start + 1)
            for label in range(1, stop - start + 1):
                shown = present[:, label]
                if shown.any():
                    found.append((start + label - 1, rows[shown], centres[shown, label]))
        return found

    def _map(self, part: int) -> Tensor:
        """(F, 2) float64 least-squares map. For a part without data it is zero, which gives the crop's middle."""
        squares = self._squares[part].double()
        ridge = _RIDGE * squares.diagonal().mean() + 1
        solution: Tensor = torch.linalg.solve(
            squares + ridge * torch.eye(len(squares), dtype=torch.float64), self._products[part].double()
        )
        return solution
