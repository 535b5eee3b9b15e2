"""Scores the predictions over a whole split. The scores are the same for any number of processes.

Shapes: B images, S slots, H x W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slotscops.core.errors import RunError
from slotscops.core.pictures import comparison
from slotscops.core.records import Batch
from slotscops.loader.batches import evaluation_batches
from slotscops.loader.split import Split
from slotscops.metrics.landmarks import LandmarkRegression
from slotscops.metrics.protocols import Prediction, Predictor, ProtocolScores
from slotscops.model.network import SlotScops

BATCH_SIZE = 16
_PICTURED_IMAGES = 8
_MAX_LANDMARK_IMAGES = 10_000  # images of the training split, which suffice to fit 3 S + 1 numbers for each coordinate


def network_predictor(network: SlotScops, device: torch.device, classes: Sequence[int] | None = None) -> Predictor:
    """A predictor that labels each pixel with the slot of the largest share.

    Args:
        device: where the network is, and where the predictions are computed.
        classes: for each class id of the data, that of the network. Needed if each class has slots of its own and the
            two numberings differ.

    Calling the predictor raises a RunError if a part map is not finite.
    """
    lookup = None if classes is None else torch.tensor(classes)

    @torch.inference_mode()
    def predict(batch: Batch) -> Prediction:
        inputs = batch.features if network.takes_features else batch.images
        assert inputs is not None
        class_ids = batch.class_ids if lookup is None else lookup[batch.class_ids]
        output = network(inputs.to(device), class_ids=class_ids.to(device))
        maps = network.segment_maps(output, batch.images.to(device))  # (B, S, H, W)
        is_finite = maps.isfinite().flatten(1).all(dim=1)  # (B,)
        if not is_finite.all():
            key = batch.keys[int(is_finite.int().argmin())]
            raise RunError(
                f"{key}: the network's part maps are not finite, so there are no scores; its weights are too large or "
                "damaged, use an older checkpoint"
            )
        return Prediction(maps.argmax(dim=1), maps[:, 1:].argmax(dim=1) + 1)

    return predict


def score_predictions(
    predict: Predictor,
    batches: Iterable[Batch],
    part_names: dict[str, list[str]],
    num_predicted: int,
    own_parts: bool = False,
) -> ProtocolScores:
    """Compares predicted and true labels over all batches, at the size of the crops. See `ProtocolScores`."""
    scores = ProtocolScores(part_names, num_predicted, own_parts)
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
    """Scores a network on one split, or on its first `limit` crops. The same for any number of processes.

    Args:
        split: must be read with labels.
        accelerator: None for a single process.
        should_stop: called before each batch. If it returns True on any process, the evaluation ends early.

    Returns:
        The scores over all processes, or None on every process if the evaluation ended early.
    """
    device = accelerator.device if accelerator else next(network.parameters()).device
    was_training = network.training
    network.eval()
    predict = network_predictor(network, device)
    batches = takewhile(lambda _: not should_stop(), scored_batches(split, accelerator, limit))
    own_parts = network.num_classes is not None
    scores = score_predictions(predict, batches, split.part_names, network.num_slots, own_parts)
    network.train(was_training)
    if sum_over_processes(torch.tensor([int(should_stop())]), accelerator).item():
        return None
    scores.set_counts(sum_over_processes(scores.counts(), accelerator))
    return scores


def landmark_errors(
    predict: Predictor, train: Split, split: Split, num_predicted: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """The landmark error by class on `split`, with the regression fit on `train`. See `metrics.landmarks`."""
    regression = LandmarkRegression(split.part_names, num_predicted, split.dataset.context.side_per_box)
    for batch in scored_batches(train, accelerator, _MAX_LANDMARK_IMAGES):
        regression.fit(predict(batch), batch)
    regression.set_fit_counts(sum_over_processes(regression.fit_counts(), accelerator))
    for batch in scored_batches(split, accelerator):
        regression.score(predict(batch), batch)
    regression.set_score_counts(sum_over_processes(regression.score_counts(), accelerator))
    return regression.errors()


def picture_of_split(network: SlotScops, split: Split) -> Any:
    """A PIL image of the first crops of the split: photos, predicted parts and true parts."""
    batch = next(iter(evaluation_batches(split, _PICTURED_IMAGES)))
    device = next(network.parameters()).device
    return comparison(batch.images, network_predictor(network, device)(batch).labels, batch.part_labels)


def scored_batches(split: Split, accelerator: Accelerator | None, limit: int | None = None) -> Iterable[Batch]:
    """This process's batches of the split, or of its first `limit` crops. See `evaluation_batches`."""
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    return evaluation_batches(split, BATCH_SIZE, rank, num_ranks, limit)


def sum_over_processes(counts: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Sums integer counts over all processes. The result is on the CPU if there is an accelerator."""
    if accelerator is None:
        return counts
    summed: Tensor = accelerator.reduce(counts.to(accelerator.device), "sum")
    return summed.cpu()
