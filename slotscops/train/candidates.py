"""Chooses the start of the basis without labels: several starts are trained for some steps, and the best one is kept.

K-means finds different clusters from different starts, and which ones decides more about a run than most settings do.
The choice is made before step 1. A run that is interrupted meanwhile makes it anew, and makes the same one; a run that
goes on from a checkpoint has made it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.config import Config
from slotscops.core import console
from slotscops.core.errors import RunError, UserError
from slotscops.core.files import json_numbers
from slotscops.loader.plan import held_out_samples
from slotscops.loader.split import Split
from slotscops.metrics.without_labels import DATA_TERMS, score_without_labels
from slotscops.train.build import load_model
from slotscops.train.loop import Trainer
from slotscops.train.processes import on_first_process, open_training_data, timeout_of


def check_candidates(config: Config) -> None:
    """Raises a UserError if the settings leave nothing to choose from, or nothing to choose by."""
    basis = config.basis
    if basis.candidates == 1:
        return
    if basis.init == "random":
        raise UserError(
            f"basis.candidates is {basis.candidates}, but basis.init is random and has no clusters to choose from; set "
            "basis.init=kmeans or basis.candidates=1"
        )
    if basis.choose_by == "likelihood" and not any(getattr(config.losses, name) for name in DATA_TERMS):
        raise UserError(
            "basis.choose_by is likelihood, but neither losses.semantic nor losses.mixture is on; set one of them, or "
            "basis.choose_by=agreement"
        )


def candidate_seeds(seed: int, num_candidates: int) -> list[int]:
    """The seeds of the candidates' clusters. The first is the run's own, so that one candidate is no change."""
    others = [np.random.SeedSequence([seed, number]).generate_state(1)[0] for number in range(1, num_candidates)]
    return [seed, *map(int, others)]


def choose_start(trainer: Trainer) -> None:
    """Trains each candidate, keeps the best one's start in `trainer`, at step 0, and its numbers in its `candidates`.

    Every candidate takes the first steps of the run: the same photos in the same order, without those held out, at the
    same learning rates. All processes train each candidate together, as they train the run. All must call this.

    Raises:
        UserError: if the training split is too small to hold any photo out, or the run's folder cannot be written.
        RunError: if no candidate has finite numbers.
    """
    config, accelerator = trainer.config, trainer.accelerator
    num_samples = len(trainer.split)
    num_held_out = min(config.basis.candidate_images, num_samples // 4)
    if not num_held_out:
        raise UserError(
            f"{trainer.dataset.location}: has {num_samples} photos to train on, too few to hold any out for "
            "basis.candidates; set basis.candidates=1"
        )
    # Before the work, not after it, is when to find out that the folder cannot be written.
    on_first_process(lambda: trainer.folder.open(config, step=0), timeout_of(config))
    held_out = held_out_samples(num_samples, num_held_out, config.seed)
    num_steps = min(config.basis.candidate_steps, config.train.total_steps)
    rows: list[dict[str, Any]] = []
    seeds = candidate_seeds(config.seed, config.basis.candidates)
    for number, seed in enumerate(seeds):
        accelerator.free_memory()  # of the candidate before
        trainer.begin(seed, compiled=False)  # compiling would take longer than the few steps
        batches = trainer.open_batches(num_steps, num_held_out)
        for _ in range(num_steps):
            trainer.take_step(batches)
        del batches  # ends the loader's workers
        scores = score_without_labels(trainer.network, trainer.split, config, held_out, accelerator)
        rows.append({"candidate": number, "seed": seed, **scores})
        console.say(f"candidate {number + 1} of {len(seeds)}, {num_steps} steps: {_in_words(scores)}")
    chosen = on_first_process(lambda: find_best([row[config.basis.choose_by] for row in rows]), timeout_of(config))
    console.say(f"the run begins from candidate {chosen + 1}, the best by {config.basis.choose_by}")
    accelerator.free_memory()
    trainer.begin(seeds[chosen])
    trainer.candidates = {
        "chosen": chosen,
        "choose_by": config.basis.choose_by,
        "steps": num_steps,
        "held_out_images": num_held_out,
        "candidates": [json_numbers(row) for row in rows],
    }


def find_best(values: Sequence[float]) -> int:
    """The place of the largest value, the first of several. NaN is never the best.

    Raises:
        RunError: if all are NaN.
    """
    if all(math.isnan(value) for value in values):
        raise RunError(
            "no candidate of the basis has finite numbers after its first steps; lower train.learning_rate or "
            "train.clip_norm"
        )
    return max(range(len(values)), key=lambda place: (not math.isnan(values[place]), values[place]))


def score_run(
    run: Path, split: str = "val", num_images: int = 512, shards: str | None = None, mirrored: bool = False
) -> dict[str, float]:
    """The scores by which candidates are chosen, of a finished run. No label of a part is read.

    Args:
        run: a run, or one of its checkpoints.
        split: the split whose first photos are scored.
        shards: where the shards are; None takes the run's own.
        mirrored: compare parts with those of mirrored crops even if training did not mirror. Their features must be
            cached.

    Returns:
        As `score_without_labels`.

    Raises:
        UserError: the run has no model, or shards or features are missing or do not fit.
    """
    trained = load_model(run)
    config = trained.config
    mirror = config.data.mirror or mirrored
    address = config.data.shards if shards is None else type(config.data.shards)(shards)
    config = replace(config, data=replace(config.data, mirror=mirror, shards=address))
    dataset, cache = open_training_data(config)
    photos = Split(dataset, split, cache, with_labels=False)
    samples = np.arange(min(num_images, len(photos)))
    return score_without_labels(trained.network, photos, config, samples)


def _in_words(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if not name.startswith("loss_"))
