"""Four protocols that compare found parts with true parts, each with two paint orders. Do not mix their numbers.

- `own`: whole crop, own background. Every pixel of every crop counts, and label 0 of the prediction is its background.
  The crop is made around the true box, so the method is told the box.
- `mask`: whole crop, given object mask, as Choudhury et al. (NeurIPS 2021) score. Inside the true mask a pixel takes
  the best part label, outside it is background. The method is told the box and the true background, so these numbers
  are far higher. Pixels of the object that belong to no true part have the true label "no part".
- `foreground`: only pixels of true parts count, with the labels of `own`. This gives FG-NMI and FG-ARI. The method is
  told the box, and background that it takes for a part costs nothing.
- `photo`: the uncropped photo, own background, at the photo's own size. The method is told nothing. Every pixel counts,
  but for those that `metrics.photos` names. This protocol needs the photos themselves and is computed on request.

A method whose classes have parts of their own is told the class as well, in all four.

The paint order decides which part a pixel belongs to if true masks overlap. `first` takes the part listed first in the
file, as Choudhury et al. do. `small` takes the part with the fewest pixels, so that eyes lie on top of the head.

No protocol counts pixels whose true label is `IGNORED` (255), such as the rim of a label map.

Shapes: B images, H x W pixels, P predicted labels, T true labels of a class.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core.records import Batch
from slotscops.metrics.scores import PartScores, score_table

PROTOCOLS = ("own", "mask", "foreground")  # of crops
PHOTO = "photo"
ALL_PROTOCOLS = (*PROTOCOLS, PHOTO)
TOLD = {"own": ("box",), "mask": ("box", "mask"), "foreground": ("box",), PHOTO: ()}
ORDERS = ("first", "small")
ALL_CLASSES = "all classes"
_COUNTED = ("own", "mask", PHOTO)  # the table of foreground is part of own's


class Prediction(NamedTuple):
    """What a method predicts for a batch."""

    labels: Tensor  # (B, H, W) 0 = background, 1 .. P - 1 parts
    labels_without_background: Tensor  # (B, H, W) 1 .. P - 1, the best part of each pixel if background is excluded


Predictor = Callable[[Batch], Prediction]


class ProtocolScores:
    """Contingency tables, one for each class, protocol and paint order. Memory does not grow with the images."""

    def __init__(self, part_names: dict[str, list[str]], num_predicted: int, own_parts: bool = False) -> None:
        """
        Args:
            part_names: names of the true parts by class, in the order of class ids. A class with n parts has
                T = n + 1 true labels.
            num_predicted: P, background included.
            own_parts: True if each class has predicted parts of its own, so that label 1 of one class differs from
                label 1 of another.
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
        assert batch.part_labels is not None
        assert batch.part_labels_small is not None
        assert batch.object_masks is not None
        labels, parts_only = prediction.labels.cpu(), prediction.labels_without_background.cpu()
        masked = torch.where(batch.object_masks, parts_only, torch.zeros_like(parts_only))
        predicted = {"own": labels, "mask": masked}
        true = {"first": batch.part_labels, "small": batch.part_labels_small}
        for class_id in sorted(set(batch.class_ids.tolist())):
            chosen = batch.class_ids == class_id
            for protocol, found in predicted.items():
                for order, truth in true.items():
                    self._tables[protocol, order][class_id].update(found[chosen], truth[chosen])

    def update_photo(self, class_name: str, found: NDArray[np.uint8], true: Mapping[str, NDArray[np.uint8]]) -> None:
        """Adds the pixels of one whole photo to the protocol `photo` of a class.

        Args:
            found: (H, W) predicted labels.
            true: by paint order, (H, W) labels of the class's true parts.
        """
        for order in ORDERS:
            self._tables[PHOTO, order][self.class_names.index(class_name)].update(found, true[order])

    def counts(self) -> Tensor:
        """(N,) int64: all tables in one vector. Processes sum it, so that all of them get the same scores."""
        return torch.cat([scores.table.flatten() for tables in self._tables.values() for scores in tables])

    def set_counts(self, counts: Tensor) -> None:
        """Replaces the counts of `counts`, for example by their sum over processes."""
        start = 0
        for tables in self._tables.values():
            for place, scores in enumerate(tables):
                shape = scores.table.shape
                tables[place] = PartScores.from_table(counts[start : start + shape.numel()].view(shape))
                start += shape.numel()
        assert start == len(counts)

    def table(self, protocol: str, order: str, class_name: str = ALL_CLASSES) -> NDArray[np.int64]:
        """(P, T) pixel counts of one class or of all classes; the protocol `foreground` drops the column "no part".

        The table of all classes has one column for each part of each class and one shared column "no part". If classes
        have predicted parts of their own, it has 1 + (P - 1) N_c rows, with one shared background.
        """
        tables = [scores.table for scores in self._tables["own" if protocol == "foreground" else protocol, order]]
        if class_name == ALL_CLASSES:
            table = _pool(tables, self._own_parts)
        else:
            table = tables[self.class_names.index(class_name)]
        return table[:, int(protocol == "foreground") :].numpy()

    def seen_classes(self, protocol: str = "own") -> list[str]:
        """Names of the classes of which at least one pixel was counted."""
        counted = "own" if protocol == "foreground" else protocol
        return [name for name in self.class_names if self.table(counted, "first", name).any()]

    def scores(self, protocol: str, order: str) -> dict[str, dict[str, float]]:
        """`nmi`, `ari`, `miou` and `majority_miou` by class, and pooled over all classes if there are several.

        All but `ari` lie in 0..1; `ari` lies in -0.5..1. All are NaN for a class without any pixel of a true part,
        because there is nothing to compare with.
        """
        names = self.seen_classes(protocol)
        rows = names if len(names) == 1 else [*names, ALL_CLASSES]
        scores = {name: score_table(self.table(protocol, order, name)) for name in rows}
        return {
            name: row if self.has_truth(name, protocol) else dict.fromkeys(row, math.nan)
            for name, row in scores.items()
        }

    def has_truth(self, class_name: str = ALL_CLASSES, protocol: str = "own") -> bool:
        """True if at least one counted pixel belongs to a true part. Otherwise there are no scores."""
        counted = PHOTO if protocol == PHOTO else "own"
        return bool(self.table(counted, "first", class_name)[:, 1:].any())

    def confusion(self) -> dict[str, dict[str, Any]]:
        """By class: `parts`, the names of the true labels, and the (P, T) pixel counts of each paint order."""
        return {
            name: {"parts": ["no part", *self._part_names[name]]}
            | {order: self.table("own", order, name).tolist() for order in ORDERS}
            for name in self.seen_classes()
        }

    def slot_pixels(self) -> dict[str, list[int]]:
        """By class that was seen, the number of pixels of each predicted label. Also of photos without true parts."""
        return {name: self.table("own", "first", name).sum(axis=1).tolist() for name in self.seen_classes()}

    def pooled(self) -> dict[str, float]:
        """The scores that a run reports during training, over all classes, in the paint order `first`.

        These are the scores of `PartScores.compute` with the method's own background, and NMI and ARI with the given
        object mask. The result is empty if no pixel belongs to a true part.
        """
        if not self.has_truth():
            return {}
        own = PartScores.from_table(torch.from_numpy(self.table("own", "first"))).compute()
        mask = score_table(self.table("mask", "first"))
        return own | {"mask_nmi": mask["nmi"], "mask_ari": mask["ari"]}


def _pool(tables: list[Tensor], own_parts: bool) -> Tensor:
    """Joins the classes' tables into one: true parts in columns of their own, and predicted parts in rows if own."""
    nothing = torch.stack([table[:, 0] for table in tables]).sum(0)
    if not own_parts:
        return torch.cat([nothing[:, None], *(table[:, 1:] for table in tables)], dim=1)
    background = torch.cat([nothing[:1], *(table[0, 1:] for table in tables)])
    no_part = torch.cat([table[1:, 0] for table in tables])
    parts = torch.block_diag(*(table[1:, 1:] for table in tables))
    return torch.cat([background[None], torch.cat([no_part[:, None], parts], dim=1)])
