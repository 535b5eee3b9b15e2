"""Three ways to count found parts against true parts, side by side and never mixed, in both paint orders.

- `own`: full image, own background. Every pixel of every crop counts, the prediction's label 0 is its background.
- `mask`: full image, given object mask, as Choudhury et al. (NeurIPS 2021) score. Inside the true mask a pixel takes
  the best part label, outside it is background: who is given the mask cannot mistake the background, so these numbers
  are far higher. Pixels of the object that belong to no true part count as "no part" in truth.
- `foreground`: only pixels of true parts count, with the labels of `own`: FG-NMI and FG-ARI.

Paint order says which part a pixel has where true masks overlap: `first`, the one listed first in the file, as
Choudhury et al. paint; `small`, the one of the fewest pixels, so that eyes lie on the head.

Shapes: B images, H x W pixels, P predicted labels, T true labels of a class.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core.records import Batch
from slotscops.metrics.scores import PartScores, score_table

PROTOCOLS = ("own", "mask", "foreground")
ORDERS = ("first", "small")
ALL_CLASSES = "all classes"
_COUNTED = ("own", "mask")  # foreground is a part of own's table


class Prediction(NamedTuple):
    """What a method says of a batch."""

    labels: Tensor  # (B, H, W) 0 = background, 1 .. P - 1 parts
    parts: Tensor  # (B, H, W) best part of each pixel, 1 .. P - 1, as if all lay on the object


Predictor = Callable[[Batch], Prediction]


class ProtocolScores:
    """One streaming contingency table a class, protocol and paint order: memory does not grow with the images."""

    def __init__(self, part_names: dict[str, list[str]], num_predicted: int, own_parts: bool = False) -> None:
        """
        Args:
            part_names: by class, in the order of class ids; a class with n parts has T = n + 1 true labels.
            num_predicted: P, background included.
            own_parts: each class has found parts of its own: label 1 of one is not label 1 of another.
        """
        self._part_names, self._own_parts = part_names, own_parts
        self.class_names = list(part_names)
        self._tables = {
            (protocol, order): [PartScores(num_predicted, len(names) + 1) for names in part_names.values()]
            for protocol in _COUNTED
            for order in ORDERS
        }

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Adds the pixels of a batch that was read with labels."""
        assert batch.parts is not None
        assert batch.parts_small is not None
        assert batch.object_masks is not None
        labels, parts = prediction.labels.cpu(), prediction.parts.cpu()
        predicted = {"own": labels, "mask": torch.where(batch.object_masks, parts, torch.zeros_like(parts))}
        true = {"first": batch.parts, "small": batch.parts_small}
        for class_id in sorted(set(batch.class_ids.tolist())):
            chosen = batch.class_ids == class_id
            for (protocol, order), tables in self._tables.items():
                tables[class_id].update(predicted[protocol][chosen], true[order][chosen])

    def counts(self) -> Tensor:
        """(N,) int64: every table, one after the other. What processes sum, to all have the same scores."""
        return torch.cat([scores.table.flatten() for tables in self._tables.values() for scores in tables])

    def set_counts(self, counts: Tensor) -> None:
        """Takes the counts of `counts`, such as their sum over processes, in place of its own."""
        start = 0
        for tables in self._tables.values():
            for place, scores in enumerate(tables):
                shape = scores.table.shape
                tables[place] = PartScores.from_table(counts[start : start + shape.numel()].view(shape))
                start += shape.numel()
        assert start == len(counts)

    def table(self, protocol: str, order: str, class_name: str = ALL_CLASSES) -> NDArray[np.int64]:
        """(P, T) pixel counts of a class; of all, every class's parts are labels of their own and no part is one.

        Where classes have found parts of their own, of all there are 1 + (P - 1) N_c rows: one background.
        """
        tables = [scores.table for scores in self._tables["own" if protocol == "foreground" else protocol, order]]
        if class_name == ALL_CLASSES:
            table = _pool(tables, self._own_parts)
        else:
            table = tables[self.class_names.index(class_name)]
        return table[:, int(protocol == "foreground") :].numpy()

    def seen_classes(self) -> list[str]:
        """Classes of which there was a pixel."""
        return [name for name in self.class_names if self.table("own", "first", name).any()]

    def scores(self, protocol: str, order: str) -> dict[str, dict[str, float]]:
        """By class and, of several, pooled over all: `nmi, ari, miou, majority_miou` in 0..1.

        All are NaN for a class of which no pixel belongs to a true part: there is nothing to compare with.
        """
        names = self.seen_classes()
        rows = names if len(names) == 1 else [*names, ALL_CLASSES]
        scores = {name: score_table(self.table(protocol, order, name)) for name in rows}
        return {name: row if self.has_truth(name) else dict.fromkeys(row, math.nan) for name, row in scores.items()}

    def has_truth(self, class_name: str = ALL_CLASSES) -> bool:
        """True where at least one counted pixel belongs to a true part. Without any, there are no scores."""
        return bool(self.table("foreground", "first", class_name).any())

    def confusion(self) -> dict[str, dict[str, Any]]:
        """By class: `parts`, names of the true parts, none first; by paint order, pixels of each label in each part."""
        return {
            name: {"parts": ["no part", *self._part_names[name]]}
            | {order: self.table("own", order, name).tolist() for order in ORDERS}
            for name in self.seen_classes()
        }

    def pooled(self) -> dict[str, float]:
        """A run's scores while it trains, over all classes, first listed on top: own background, FG-, given mask.

        Empty where no pixel belongs to a true part.
        """
        if not self.has_truth():
            return {}
        own = PartScores.from_table(torch.from_numpy(self.table("own", "first"))).compute()
        mask = score_table(self.table("mask", "first"))
        return own | {"mask_nmi": mask["nmi"], "mask_ari": mask["ari"]}


def _pool(tables: list[Tensor], own_parts: bool) -> Tensor:
    """One table of all classes': their true parts side by side, and their found parts below each other if their own."""
    nothing = torch.stack([table[:, 0] for table in tables]).sum(0)
    if not own_parts:
        return torch.cat([nothing[:, None], *(table[:, 1:] for table in tables)], dim=1)
    background = torch.cat([nothing[:1], *(table[0, 1:] for table in tables)])
    no_part = torch.cat([table[1:, 0] for table in tables])
    parts = torch.block_diag(*(table[1:, 1:] for table in tables))
    return torch.cat([background[None], torch.cat([no_part[:, None], parts], dim=1)])
