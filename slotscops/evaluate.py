"""Scores of a trained network on shards.

    python -m slotscops.evaluate --checkpoint RUN --shards SHARDS [--split val] [--json FILE]
    python -m slotscops.evaluate --baseline kmeans --shards SHARDS

Protocol: full image, own background. The network's slot 0 counts as background, every pixel of every crop counts, one
contingency table per class. FG-NMI and FG-ARI look only at pixels that belong to a true part: never compare them with
full-image numbers.

Shapes: B images, S slots, H x W pixels.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slotscops import baselines, console
from slotscops.build import Trained, load_model
from slotscops.errors import UserError
from slotscops.features import open_cache, warn_if_random
from slotscops.files import json_numbers, write_json
from slotscops.index import Dataset, open_dataset
from slotscops.loader import Split, evaluation_batches
from slotscops.metrics import PartScores
from slotscops.model import SlotScops
from slotscops.records import Batch
from slotscops.visualise import comparison

_BATCH_SIZE = 16
_PICTURED_IMAGES = 8
COLUMNS = ("nmi", "ari", "fg_nmi", "fg_ari", "miou")
Predictor = Callable[[Batch], Tensor]  # batch -> (B, H, W) labels, 0 = background


@dataclass(frozen=True)
class ClassScores:
    """One contingency table a class."""

    class_names: list[str]
    tables: list[PartScores]

    def per_class(self) -> dict[str, dict[str, float]]:
        """Scores of every class of which there was a pixel."""
        return {
            name: scores.compute()
            for name, scores in zip(self.class_names, self.tables, strict=True)
            if int(scores.table.sum())
        }

    def pooled(self) -> dict[str, float]:
        """Scores over all classes: every class's parts are labels of their own, background is one."""
        tables = [scores.table for scores in self.tables]
        background = torch.stack([table[:, 0] for table in tables]).sum(0)
        joined = torch.cat([background[:, None], *(table[:, 1:] for table in tables)], dim=1)
        return PartScores.from_table(joined).compute()


def score_predictions(
    predict: Predictor, batches: Iterable[Batch], dataset: Dataset, num_predicted: int
) -> ClassScores:
    """Counts predicted against true labels over all batches; labels are compared at the crops' own size."""
    tables = [PartScores(num_predicted, len(dataset.part_names[name]) + 1) for name in dataset.class_names]
    for batch in batches:
        assert batch.parts is not None
        predicted = predict(batch).cpu()
        for class_id in sorted(set(batch.class_ids.tolist())):
            chosen = batch.class_ids == class_id
            tables[class_id].update(predicted[chosen], batch.parts[chosen])
    return ClassScores(dataset.class_names, tables)


def network_predictor(network: SlotScops, device: torch.device) -> Predictor:
    """The slot that takes the largest share of each pixel."""

    @torch.inference_mode()
    def predict(batch: Batch) -> Tensor:
        inputs = batch.features if network.takes_features else batch.images
        assert inputs is not None
        labels: Tensor = network(inputs.to(device)).maps(batch.images.shape[-2:]).argmax(dim=1)
        return labels

    return predict


def evaluate_split(
    network: SlotScops, split: Split, accelerator: Accelerator | None = None, limit: int | None = None
) -> ClassScores:
    """Scores on one split, the same for any number of processes."""
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = accelerator.device if accelerator else next(network.parameters()).device
    batches = evaluation_batches(split, _BATCH_SIZE, rank, num_ranks, limit)
    was_training = network.training
    network.eval()
    scores = score_predictions(
        network_predictor(network, device), batches, split.dataset, num_predicted=network.num_slots
    )
    network.train(was_training)
    if accelerator is None:
        return scores
    summed = [accelerator.reduce(table.table.to(device), "sum").cpu() for table in scores.tables]
    return ClassScores(scores.class_names, [PartScores.from_table(table) for table in summed])


def picture_of_split(network: SlotScops, split: Split) -> Any:
    """PIL image of the split's first crops: photos, parts found, true parts."""
    batch = next(iter(evaluation_batches(split, _PICTURED_IMAGES)))
    device = next(network.parameters()).device
    return comparison(batch.images, network_predictor(network, device)(batch), batch.parts)


# ---- command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.baseline:
        title, scores = _score_baseline(options)
    else:
        title, scores = _score_checkpoint(options)
    rows = scores.per_class()
    if len(rows) != 1:
        rows["all classes"] = scores.pooled()
    cells = [(name, *(f"{100 * row[column]:.1f}" for column in COLUMNS)) for name, row in rows.items()]
    console.show_table(title, ("class", "NMI", "ARI", "FG-NMI", "FG-ARI", "mIoU"), cells)
    console.say("x 100; full image with the network's own background; FG: pixels of true parts only")
    if options.json:
        write_json(
            options.json,
            {"title": title, "split": options.split, "scores": {name: json_numbers(row) for name, row in rows.items()}},
        )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slotscops.evaluate", description="Score a run, or a baseline.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a run's folder or one of its checkpoints")
    what.add_argument("--baseline", choices=baselines.NAMES, help="score clusters instead of a network")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--json", type=Path, help="write the scores here, in 0..1")
    parser.add_argument("--layer", default="relu5_4", help="of a baseline's features (default: %(default)s)")
    parser.add_argument("--size", type=int, help="of a baseline's features, pixels (default: that of the shards)")
    parser.add_argument("--clusters", type=int, default=6, help="of a baseline, background included (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="of a baseline")
    return parser.parse_args(arguments)


def _score_checkpoint(options: argparse.Namespace) -> tuple[str, ClassScores]:
    trained = load_model(options.checkpoint)
    network = trained.network.to("cuda" if torch.cuda.is_available() else "cpu")
    split = _open_split(open_dataset(options.shards), options.split, trained)
    title = f"{trained.path} on {options.split} of {options.shards}, {len(split)} crops"
    return title, evaluate_split(network, split)


def _open_split(dataset: Dataset, name: str, trained: Trained) -> Split:
    cache, config = None, trained.config
    if dataset.size != config.data.size:
        raise UserError(
            f"{dataset.folder}: holds crops of {dataset.size} px, the run was trained at {config.data.size}; "
            f"make shards with python -m slotscops.shard --size {config.data.size}"
        )
    if trained.network.takes_features:
        cache = open_cache(dataset, config.teacher.layer, config.teacher_size, trained.state.teacher_sha256)
        warn_if_random(cache)
    return Split(dataset, name, cache, with_labels=True)


def _score_baseline(options: argparse.Namespace) -> tuple[str, ClassScores]:
    dataset = open_dataset(options.shards)
    cache = None
    if options.baseline != "position":
        cache = open_cache(dataset, options.layer, options.size or dataset.size)
        warn_if_random(cache)
    train, split = (Split(dataset, name, cache, with_labels=True) for name in ("train", options.split))
    predict = baselines.fit(options.baseline, train, options.clusters, options.seed)
    batches = evaluation_batches(split, _BATCH_SIZE)
    title = f"baseline {options.baseline} on {options.split} of {options.shards}, {len(split)} crops"
    return title, score_predictions(predict, batches, dataset, num_predicted=options.clusters)


if __name__ == "__main__":
    console.run_command(main)
