"""Predictions over a whole split, counted by the protocols; the same numbers for any number of processes.

Shapes: B images, S slots, H x W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slotscops.core.pictures import comparison
from slotscops.core.pixels import SIDE_PER_BOX
from slotscops.core.records import Batch
from slotscops.loader.batches import evaluation_batches
from slotscops.loader.split import Split
from slotscops.metrics.landmarks import LandmarkRegression
from slotscops.metrics.protocols import Prediction, Predictor, ProtocolScores
from slotscops.model.network import SlotScops
from slotscops.shard.index import Dataset

BATCH_SIZE = 16
_PICTURED_IMAGES = 8
_MAX_LANDMARK_IMAGES = 10_000  # of the training split, to fit 3 S + 1 numbers a coordinate to


def network_predictor(network: SlotScops, device: torch.device, classes: Sequence[int] | None = None) -> Predictor:
    """The slot that takes the largest share of each pixel, among all and among the parts.

    Args:
        classes: for each class of the data the network's own, where they differ and each has slots of its own.
    """
    lookup = None if classes is None else torch.tensor(classes)

    @torch.inference_mode()
    def predict(batch: Batch) -> Prediction:
        inputs = batch.features if network.takes_features else batch.images
        assert inputs is not None
        class_ids = batch.class_ids if lookup is None else lookup[batch.class_ids]
        output = network(inputs.to(device), class_ids=class_ids.to(device))
        maps = network.segment_maps(output, batch.images.to(device))  # (B, S, H, W)
        return Prediction(maps.argmax(dim=1), maps[:, 1:].argmax(dim=1) + 1)

    return predict


def score_predictions(
    predict: Predictor, batches: Iterable[Batch], dataset: Dataset, num_predicted: int, own_parts: bool = False
) -> ProtocolScores:
    """Counts predicted against true labels over all batches; labels are compared at the crops' own size."""
    scores = ProtocolScores(_part_names(dataset), num_predicted, own_parts)
    for batch in batches:
        scores.update(predict(batch), batch)
    return scores


def evaluate_split(
    network: SlotScops,
    split: Split,
    accelerator: Accelerator | None = None,
    limit: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ProtocolScores | None:
    """Scores on one split, or on its first `limit` crops; the same for any number of processes.

    Args:
        should_stop: asked before each batch; where it answers True on any process, all get None and no scores.
    """
    device = accelerator.device if accelerator else next(network.parameters()).device
    was_training = network.training
    network.eval()
    predict = network_predictor(network, device)
    batches = takewhile(lambda _: not should_stop(), scored_batches(split, accelerator, limit))
    own_parts = network.num_classes is not None
    scores = score_predictions(predict, batches, split.dataset, network.num_slots, own_parts)
    network.train(was_training)
    if sum_over_processes(torch.tensor([int(should_stop())]), accelerator).item():
        return None
    scores.set_counts(sum_over_processes(scores.counts(), accelerator))
    return scores


def landmark_errors(
    predict: Predictor, train: Split, split: Split, num_predicted: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """By class: error of the true parts' centres, regressed on `train` from the predicted ones; see `landmarks`."""
    regression = LandmarkRegression(_part_names(split.dataset), num_predicted, SIDE_PER_BOX)
    for batch in scored_batches(train, accelerator, _MAX_LANDMARK_IMAGES):
        regression.fit(predict(batch), batch)
    regression.set_fit_counts(sum_over_processes(regression.fit_counts(), accelerator))
    for batch in scored_batches(split, accelerator):
        regression.score(predict(batch), batch)
    regression.set_score_counts(sum_over_processes(regression.score_counts(), accelerator))
    return regression.errors()


def picture_of_split(network: SlotScops, split: Split) -> Any:
    """PIL image of the split's first crops: photos, parts found, true parts."""
    batch = next(iter(evaluation_batches(split, _PICTURED_IMAGES)))
    device = next(network.parameters()).device
    return comparison(batch.images, network_predictor(network, device)(batch).labels, batch.parts)


def _part_names(dataset: Dataset) -> dict[str, list[str]]:
    """Part names by class, in the order of class ids."""
    return {name: dataset.part_names[name] for name in dataset.class_names}


def scored_batches(split: Split, accelerator: Accelerator | None, limit: int | None = None) -> Iterable[Batch]:
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    return evaluation_batches(split, BATCH_SIZE, rank, num_ranks, limit)


def sum_over_processes(counts: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Whole numbers summed over all processes."""
    if accelerator is None:
        return counts
    summed: Tensor = accelerator.reduce(counts.to(accelerator.device), "sum")
    return summed.cpu()
