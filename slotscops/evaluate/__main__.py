"""Scores trained networks and baselines on shards with the same code.

    python -m slotscops.evaluate --checkpoint RUN... --baseline position,kmeans,dff [--shards SHARDS] [--json FILE]
    python -m slotscops.evaluate --checkpoint RUN --shards SHARDS --photos ROOT [--merge left-right]

Computes three protocols for crops and, with --photos, one for whole photos, each with two paint orders of overlapping
parts; see `metrics.protocols`. It runs as a single process or under a launcher.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from slotscops.config import BaselineTransform, to_mapping
from slotscops.core import console
from slotscops.core.errors import UserError
from slotscops.datasets.merging import PartMerge, open_merge
from slotscops.evaluate import baselines, ceiling, scoreboard
from slotscops.evaluate.options import parse_options
from slotscops.evaluate.results_page import write_results_page
from slotscops.evaluate.scoreboard import Row, Scored
from slotscops.features.cache import FeatureCache, open_cache, warn_if_random
from slotscops.features.compact import Compact
from slotscops.loader.split import Split
from slotscops.metrics.photos import PhotoLabeller
from slotscops.metrics.protocols import ORDERS, PHOTO, PROTOCOLS, Predictor
from slotscops.metrics.scoring import (
    BATCH_SIZE,
    landmark_errors,
    network_predictor,
    score_predictions,
    scored_batches,
    sum_over_processes,
)
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.network import SlotScops
from slotscops.shard.index import ShardDataset, open_dataset
from slotscops.train.build import Trained, load_model
from slotscops.train.processes import join_processes
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.page import write_page
from slotscops.train.run.published import is_published

if TYPE_CHECKING:  # imported where it is needed
    from slotscops.evaluate.whole_photos import WholePhotos


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.read:
        scoreboard.show(
            "scores read from files",
            [method for path in options.read for method in scoreboard.read(path)],
            options.full,
        )
        if options.page and console.is_main():
            write_results_page(options.page, options.read)
            console.say(f"page: {options.page}")
        return 0
    with ExitStack() as stack:
        harness = _open_harness(options, stack)
        if "dff" in options.baseline:  # before the other methods are scored, which may take long
            check_dff(harness)
        methods = [
            _score_run(harness, trained, path) for trained, path in zip(harness.runs, options.checkpoint, strict=True)
        ]
        methods += [_score_baseline(harness, name) for name in options.baseline]
    _report(options, harness, methods)
    return 0


def _report(options: Namespace, harness: "_Harness", methods: list[Scored]) -> None:
    if console.is_main() and not any(method.has_scores for method in methods):
        console.warn(
            f"{harness.dataset.location}: the photos of '{options.split}' have no true parts, so there are no scores; "
            "make shards of photos with part labels"
        )
    about = {
        "shards": harness.dataset.location,
        "split": options.split,
        "num_crops": harness.dataset.num_samples(options.split),
        "num_photos": len(harness.photos) if harness.photos else 0,
        "merge": harness.merge and {"name": harness.merge.name, "groups": harness.merge.groups},
    }
    photos = f", {about['num_photos']} whole photos" if harness.photos else ""
    title = f"{about['split']} of {about['shards']}, {about['num_crops']} crops{photos}"
    scoreboard.show(title, methods, options.full)
    if options.json and console.is_main():
        scoreboard.write(options.json, about, methods)
        folder = RunFolder(options.json.parent)
        if options.json == folder.scores and folder.config.is_file():
            write_page(folder)


@dataclass(frozen=True)
class _BaselineSettings:
    """How the baselines are fit, with all defaults filled in."""

    teacher: str
    layer: str
    size: int  # of the photos that the teacher reads, pixels
    compact: Compact  # the form of the cache
    clusters: int  # G, background included
    transform: BaselineTransform
    refine: bool
    seed: int


@dataclass(frozen=True)
class _Harness:
    """The data and settings that all methods of one command share."""

    dataset: ShardDataset
    split: str
    landmarks: bool
    baseline: _BaselineSettings
    runs: list[Trained]
    accelerator: Accelerator | None  # None: a single process
    merge: PartMerge | None  # None: every true part counts for itself
    photos: "WholePhotos | None"  # None: crops only

    def open_split(self, name: str, cache: FeatureCache | None) -> Split:
        return Split(self.dataset, name, cache, with_labels=True, merge=self.merge)

    @property
    def device(self) -> torch.device:
        if self.accelerator is not None:
            return torch.device(self.accelerator.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _open_harness(options: Namespace, stack: ExitStack) -> _Harness:
    accelerator = join_processes() if console.world_size() > 1 else None
    runs = [load_model(path) for path in options.checkpoint]
    dataset = open_dataset(options.shards or shards_of_run(runs[0], options.checkpoint[0]))
    if not dataset.num_samples(options.split):
        raise UserError(f"{dataset.location}: the split '{options.split}' holds no samples; there is nothing to score")
    harness = _Harness(
        dataset=dataset,
        split=options.split,
        landmarks=options.landmarks,
        baseline=_baseline_settings(options, runs, dataset),
        runs=runs,
        accelerator=accelerator,
        merge=open_merge(options.merge, dataset.part_names) if options.merge else None,
        photos=None,
    )
    if options.photos is None:
        return harness
    # Imported here, because it imports the segmenter and with it huggingface_hub, which crops do not need.
    from slotscops.evaluate.whole_photos import open_whole_photos

    # Opened before any work, so that missing photos or weights stop the command at once.
    cache = _open_baseline_cache(harness) if {"kmeans", "dff"} & set(options.baseline) else None
    split = harness.open_split(options.split, None)
    return replace(harness, photos=open_whole_photos(options, split, runs, cache, harness.device, stack))


def shards_of_run(trained: Trained, path: Path) -> Path:
    """The folder that a run was trained on, if it lies below the current one.

    The settings of a model that somebody handed over are not trusted: no address in them is contacted, and no path
    elsewhere is opened, unless the user gives it.

    Raises:
        UserError: the user has to name the shards.
    """
    address = trained.config.data.shards
    folder = Path(address.reveal())
    if is_published(path) or address.is_remote or folder.is_absolute() or ".." in folder.parts:
        raise UserError(
            f"{path}: its settings name the shards {address}, which are not opened unasked, because a model may come "
            f"from elsewhere; name the shards to score it on with --shards (--shards {address})"
        )
    return folder


def _baseline_settings(options: Namespace, runs: list[Trained], dataset: ShardDataset) -> _BaselineSettings:
    """Settings of the baselines. Missing options come from the first run, or are defaults if no run is scored."""
    first = runs[0].config if runs else None
    size = options.size
    compact = Compact(options.components, options.store or "float16")
    if options.layer is None and first:
        size = size or first.teacher_size
        if options.components is None and options.store is None:
            compact = Compact.of(first.teacher)
    return _BaselineSettings(
        teacher=options.teacher or (first.teacher.network if first else "vgg19"),
        layer=options.layer or (first.teacher.layer if first else "relu5_4"),
        size=size or dataset.size,
        compact=compact,
        clusters=options.clusters or (runs[0].network.num_slots if runs else 6),
        transform=options.transform,
        refine=options.refinement != "none",
        seed=options.seed,
    )


def _score_run(harness: _Harness, trained: Trained, path: Path) -> Scored:
    device = harness.device
    network = trained.network.to(device)
    cache, config = None, trained.config
    if harness.dataset.size != config.data.size:
        raise UserError(
            f"{harness.dataset.location}: holds crops of {harness.dataset.size} px, {path} was trained at "
            f"{config.data.size}; make shards with python -m slotscops.shard --size {config.data.size}"
        )
    if network.takes_features:
        teacher, sha256 = config.teacher, trained.state.teacher_sha256
        compact = Compact.of(teacher)
        cache = open_cache(
            harness.dataset, teacher.layer, config.teacher_size, sha256, teacher.network, compact=compact
        )
        check_same_projection(cache, network, path)
        warn_if_random(cache)
    train, split = (harness.open_split(name, cache) for name in ("train", harness.split))
    classes = _classes_of_network(trained, harness.dataset, path) if network.num_classes is not None else None
    predict = network_predictor(network, device, classes)
    label = harness.photos.labeller_of_run(trained) if harness.photos is not None else None
    scored = _score(harness, str(path), predict, train, split, network.num_slots, classes is not None, label)
    return replace(scored, kind="run", settings=to_mapping(config), step=trained.state.step)


def check_same_projection(cache: FeatureCache, network: SlotScops, path: Path) -> None:
    """Raises UserError if the network was trained on components that another matrix made than those of the cache."""
    encoder = network.encoder
    assert isinstance(encoder, FeatureEncoder)
    own, matrix = encoder.projection, cache.projection
    if own is not None and (matrix is None or not torch.equal(own.cpu(), matrix)):
        raise UserError(
            f"{cache.folder}: its projection is not the one that {path} was trained with, because it was fitted to "
            "other crops; score the model on the shards of its training"
        )


def _open_baseline_cache(harness: _Harness) -> FeatureCache:
    settings = harness.baseline
    return open_cache(
        harness.dataset, settings.layer, settings.size, network=settings.teacher, compact=settings.compact
    )


def check_dff(harness: _Harness) -> None:
    """Raises UserError if the features hold negative numbers, which a non-negative factorisation cannot rebuild."""
    cache = _open_baseline_cache(harness)
    if cache.has_negative:
        raise UserError(
            f"{cache.folder}: holds negative numbers, which dff, a non-negative factorisation, cannot rebuild; leave "
            "dff out, or name a layer after a ReLU"
        )


def _classes_of_network(trained: Trained, dataset: ShardDataset, path: Path) -> list[int]:
    """For each class of the data, its number in the network.

    Raises:
        UserError: if the network does not know a class of the data.
    """
    names = trained.state.class_names
    unknown = [name for name in dataset.class_names if name not in names]
    if unknown:
        raise UserError(
            f"{dataset.location}: holds {', '.join(unknown)}, but {path} has slots of its own for "
            f"{', '.join(names)} only; score it on shards of these"
        )
    return [names.index(name) for name in dataset.class_names]


def _score_baseline(harness: _Harness, name: str) -> Scored:
    settings, cache, title = harness.baseline, None, name
    if not harness.dataset.num_samples("train"):
        raise UserError(f"{harness.dataset.location}: holds no training samples, which a baseline is fit to")
    if name != "position":
        cache = _open_baseline_cache(harness)
        warn_if_random(cache)
        network = "" if settings.teacher == "vgg19" else f"{settings.teacher} "
        transform = "" if settings.transform == "none" else f" {settings.transform}"
        form = settings.compact.name_suffix().replace("-", " ")
        title = f"{name} {network}{settings.layer} {settings.size} px{form}{transform}"
    title += " pamr" if settings.refine else ""
    train, split = (harness.open_split(part, cache) for part in ("train", harness.split))
    # Every process fits the same model, because samples and starts are drawn from the seed.
    if name == "supervised":
        predict = ceiling.fit(train, settings.seed, settings.transform, settings.refine)
        return _score(harness, title, predict, train, split, ceiling.num_predicted(split), own_parts=True)
    baseline = baselines.fit(name, train, settings.clusters, settings.seed, settings.transform, settings.refine)
    label = harness.photos.labeller_of_baseline(baseline, cache) if harness.photos is not None else None
    return _score(harness, title, baseline, train, split, settings.clusters, label=label)


def _score(
    harness: _Harness,
    name: str,
    predict: Predictor,
    train: Split,
    split: Split,
    num_predicted: int,
    own_parts: bool = False,
    label: PhotoLabeller | None = None,
) -> Scored:
    total = math.ceil(len(split) / BATCH_SIZE / console.world_size())
    batches = console.track(scored_batches(split, harness.accelerator), total, f"scoring {name}, batches")
    scores = score_predictions(predict, batches, split.part_names, num_predicted, own_parts)
    protocols: tuple[str, ...] = PROTOCOLS
    if harness.photos is not None and label is not None:
        harness.photos.score(label, scores, name)
        protocols = (*PROTOCOLS, PHOTO)
    scores.set_counts(sum_over_processes(scores.counts(), harness.accelerator))
    landmarks = {}
    if harness.landmarks:
        landmarks = landmark_errors(predict, train, split, num_predicted, harness.accelerator)
    rows = {
        Row(protocol, order, class_name): row
        for protocol in protocols
        for order in ORDERS
        for class_name, row in scores.scores(protocol, order).items()
    }
    merge = harness.merge.name if harness.merge else None
    return Scored(name, "baseline", num_predicted - 1, rows, landmarks, told_class=own_parts, merge=merge)


if __name__ == "__main__":
    console.run_command(main)
