"""How far two networks agree on the parts of the same photos. No label of a part is read.

Shapes: B photos, S slots (slot 0 the background), L x L pixels of the label maps, G classes with slots of their own (1
if all classes share their slots).
"""

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core.seeding import seeded
from slotscops.loader.split import Split
from slotscops.metrics.scores import PartScores, adjusted_rand_index
from slotscops.metrics.scoring import scored_batches, sum_over_processes
from slotscops.model.network import SlotScops

_LONGEST_SIDE = 128  # pixels of the label maps that are compared


class LabelledPhotos(NamedTuple):
    """What a network finds in the photos that this process looks at."""

    labels: Tensor  # (B, L, L) uint8 slot of the largest share, not refined, on the CPU
    class_ids: Tensor  # (B,) int64; zeros if all classes share their slots


@torch.inference_mode()
def label_photos(
    network: SlotScops, split: Split, seed: int = 0, accelerator: Accelerator | None = None
) -> LabelledPhotos:
    """The label maps of all photos of the split, of which each process gets its part.

    Args:
        split: read with features if the network takes them.
        seed: of the noise, for a network whose slots start from random numbers.
        accelerator: None for a single process.
    """
    device = next(network.parameters()).device
    side = min(split.dataset.size, _LONGEST_SIDE)
    was_training = network.training
    network.eval()
    labels, class_ids = [torch.empty(0, side, side, dtype=torch.uint8)], [torch.empty(0, dtype=torch.int64)]
    with seeded(seed, device):
        for batch in scored_batches(split, accelerator):
            moved = batch.to(device)
            inputs = moved.features if network.takes_features else moved.images
            assert inputs is not None
            own_classes = moved.class_ids if network.num_classes is not None else None
            found = network(inputs, class_ids=own_classes).maps((side, side)).argmax(1)
            labels.append(found.to("cpu", torch.uint8))
            class_ids.append(torch.zeros_like(batch.class_ids) if own_classes is None else batch.class_ids)
    network.train(was_training)
    return LabelledPhotos(torch.cat(labels), torch.cat(class_ids).cpu())


def count_pairs_of_labels(
    first: LabelledPhotos,
    second: LabelledPhotos,
    num_slots: int,
    num_classes: int = 1,
    accelerator: Accelerator | None = None,
) -> NDArray[np.int64]:
    """(G, S, S) how many pixels of a class have which slot of the first and of the second network, of all processes.

    Args:
        num_classes: G.
    """
    tables = [PartScores(num_slots, num_slots) for _ in range(num_classes)]
    for class_id in first.class_ids.unique().tolist():
        chosen = first.class_ids == class_id
        tables[class_id].update(first.labels[chosen], second.labels[chosen])
    counts = torch.stack([one.table for one in tables])
    return sum_over_processes(counts, accelerator).numpy()


def stability_of(table: NDArray[np.int64]) -> float:
    """The adjusted Rand index of two networks' label maps, of the pixels that at least one of them gives to a part.

    Pixels that both call background are left out: there are so many pairs of them that the index would hardly depend on
    the parts. The index is corrected for chance, so that numbers of parts can be compared: labels at random have 0 at
    any number. It is the mean over the classes that have such a pixel, and NaN if there is none.

    Args:
        table: (G, S, S) of `count_pairs_of_labels`.
    """
    parts = table.copy()
    parts[:, 0, 0] = 0
    indices = [adjusted_rand_index(of_class) for of_class in parts if of_class.any()]
    return float(np.mean(indices)) if indices else float("nan")
