"""Scores of trained networks and of baselines on shards, through one scorer.

    python -m slotscops.evaluate --checkpoint RUN... --baseline position,kmeans,dff [--shards SHARDS] [--json FILE]

Three protocols side by side, in both paint orders of overlapping parts; see `protocols`. Works alone or under a
launcher, with the same numbers for any number of processes.

Shapes: B images, S slots, H x W pixels.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slotscops import baselines, console, scoreboard, supervised
from slotscops.build import Trained, load_model
from slotscops.config import to_mapping
from slotscops.crops import SIDE_PER_BOX
from slotscops.errors import UserError
from slotscops.evaluate_options import parse_options
from slotscops.features import open_cache, warn_if_random
from slotscops.index import Dataset, open_dataset
from slotscops.landmarks import LandmarkRegression
from slotscops.loader import Split, evaluation_batches
from slotscops.model import SlotScops
from slotscops.protocols import ORDERS, PROTOCOLS, Prediction, Predictor, ProtocolScores
from slotscops.records import Batch
from slotscops.scoreboard import Scored
from slotscops.startup import join_processes
from slotscops.visualise import comparison

_BATCH_SIZE = 16
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
    batches = takewhile(lambda _: not should_stop(), _batches(split, accelerator, limit))
    own_parts = network.num_classes is not None
    scores = score_predictions(predict, batches, split.dataset, network.num_slots, own_parts)
    network.train(was_training)
    if _sum(torch.tensor([int(should_stop())]), accelerator).item():
        return None
    scores.set_counts(_sum(scores.counts(), accelerator))
    return scores


def landmark_errors(
    predict: Predictor, train: Split, split: Split, num_predicted: int, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """By class: error of the true parts' centres, regressed on `train` from the predicted ones; see `landmarks`."""
    regression = LandmarkRegression(_part_names(split.dataset), num_predicted, SIDE_PER_BOX)
    for batch in _batches(train, accelerator, _MAX_LANDMARK_IMAGES):
        regression.fit(predict(batch), batch)
    regression.set_fit_counts(_sum(regression.fit_counts(), accelerator))
    for batch in _batches(split, accelerator):
        regression.score(predict(batch), batch)
    regression.set_score_counts(_sum(regression.score_counts(), accelerator))
    return regression.errors()


def picture_of_split(network: SlotScops, split: Split) -> Any:
    """PIL image of the split's first crops: photos, parts found, true parts."""
    batch = next(iter(evaluation_batches(split, _PICTURED_IMAGES)))
    device = next(network.parameters()).device
    return comparison(batch.images, network_predictor(network, device)(batch).labels, batch.parts)


def _part_names(dataset: Dataset) -> dict[str, list[str]]:
    """Part names by class, in the order of class ids."""
    return {name: dataset.part_names[name] for name in dataset.class_names}


def _batches(split: Split, accelerator: Accelerator | None, limit: int | None = None) -> Iterable[Batch]:
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    return evaluation_batches(split, _BATCH_SIZE, rank, num_ranks, limit)


def _sum(counts: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Whole numbers summed over all processes."""
    if accelerator is None:
        return counts
    summed: Tensor = accelerator.reduce(counts.to(accelerator.device), "sum")
    return summed.cpu()


# ---- command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.read:
        scoreboard.show("scores read from files", [method for path in options.read for method in scoreboard.read(path)])
        return 0
    harness = _open_harness(options)
    methods = [
        _score_run(harness, trained, path) for trained, path in zip(harness.runs, options.checkpoint, strict=True)
    ]
    methods += [_score_baseline(harness, name) for name in options.baseline]
    about = {
        "shards": harness.dataset.location,
        "split": options.split,
        "num_crops": harness.dataset.num_samples(options.split),
    }
    scoreboard.show(f"{about['split']} of {about['shards']}, {about['num_crops']} crops", methods)
    if options.json and console.is_main():
        scoreboard.write(options.json, about, methods)
    return 0


@dataclass(frozen=True)
class _Harness:
    """What all methods of one command share."""

    dataset: Dataset
    options: argparse.Namespace
    runs: list[Trained]
    accelerator: Accelerator | None  # None: a single process


def _open_harness(options: argparse.Namespace) -> _Harness:
    accelerator = join_processes() if console.world_size() > 1 else None
    runs = [load_model(path) for path in options.checkpoint]
    dataset = open_dataset(options.shards or runs[0].config.data.shards)
    if not dataset.num_samples(options.split):
        raise UserError(f"{dataset.location}: the split '{options.split}' holds no samples; there is nothing to score")
    first = runs[0].config if runs else None
    if options.teacher is None:
        options.teacher = first.teacher.network if first else "vgg19"
    if options.layer is None:
        options.layer = first.teacher.layer if first else "relu5_4"
        options.size = options.size or (first.teacher_size if first else None)
    options.size = options.size or dataset.size
    options.clusters = options.clusters or (runs[0].network.num_slots if runs else 6)
    return _Harness(dataset, options, runs, accelerator)


def _score_run(harness: _Harness, trained: Trained, path: Path) -> Scored:
    if harness.accelerator is not None:
        device = harness.accelerator.device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = trained.network.to(device)
    cache, config = None, trained.config
    if harness.dataset.size != config.data.size:
        raise UserError(
            f"{harness.dataset.location}: holds crops of {harness.dataset.size} px, {path} was trained at "
            f"{config.data.size}; make shards with python -m slotscops.shard --size {config.data.size}"
        )
    if network.takes_features:
        teacher, sha256 = config.teacher, trained.state.teacher_sha256
        cache = open_cache(harness.dataset, teacher.layer, config.teacher_size, sha256, teacher.network)
        warn_if_random(cache)
    train, split = (Split(harness.dataset, name, cache, with_labels=True) for name in ("train", harness.options.split))
    classes = _classes_of_network(trained, harness.dataset, path) if network.num_classes is not None else None
    predict = network_predictor(network, device, classes)
    scored = _score(harness, str(path), predict, train, split, network.num_slots, classes is not None)
    return scored._replace(kind="run", settings=to_mapping(config))


def _classes_of_network(trained: Trained, dataset: Dataset, path: Path) -> list[int]:
    """For each class of the data, its number in the network's own."""
    names = trained.state.class_names
    unknown = [name for name in dataset.class_names if name not in names]
    if unknown:
        raise UserError(
            f"{dataset.location}: holds {', '.join(unknown)}, but {path} has slots of its own for "
            f"{', '.join(names)} only; score it on shards of these"
        )
    return [names.index(name) for name in dataset.class_names]


def _score_baseline(harness: _Harness, name: str) -> Scored:
    options, cache, title = harness.options, None, name
    if not harness.dataset.num_samples("train"):
        raise UserError(f"{harness.dataset.location}: holds no training samples, which a baseline is fit to")
    if name != "position":
        cache = open_cache(harness.dataset, options.layer, options.size, network=options.teacher)
        warn_if_random(cache)
        network = "" if options.teacher == "vgg19" else f"{options.teacher} "
        transform = "" if options.transform == "none" else f" {options.transform}"
        title = f"{name} {network}{options.layer} {options.size} px{transform}"
    title += "" if options.refinement == "none" else f" {options.refinement}"
    train, split = (Split(harness.dataset, part, cache, with_labels=True) for part in ("train", options.split))
    # Every process fits the same: samples and starts are drawn from the seed.
    refine = options.refinement != "none"
    if name == "supervised":
        predict = supervised.fit(train, options.seed, options.transform, refine)
        return _score(harness, title, predict, train, split, supervised.num_predicted(split), own_parts=True)
    predict = baselines.fit(name, train, options.clusters, options.seed, options.transform, refine)
    return _score(harness, title, predict, train, split, options.clusters)


def _score(
    harness: _Harness,
    name: str,
    predict: Predictor,
    train: Split,
    split: Split,
    num_predicted: int,
    own_parts: bool = False,
) -> Scored:
    total = math.ceil(len(split) / _BATCH_SIZE / console.world_size())
    batches = console.track(_batches(split, harness.accelerator), total, f"scoring {name}, batches")
    scores = score_predictions(predict, batches, split.dataset, num_predicted, own_parts)
    scores.set_counts(_sum(scores.counts(), harness.accelerator))
    landmarks = {}
    if harness.options.landmarks:
        landmarks = landmark_errors(predict, train, split, num_predicted, harness.accelerator)
    rows = {protocol: {order: scores.scores(protocol, order) for order in ORDERS} for protocol in PROTOCOLS}
    return Scored(name, "baseline", num_predicted - 1, rows, landmarks)


if __name__ == "__main__":
    console.run_command(main)
