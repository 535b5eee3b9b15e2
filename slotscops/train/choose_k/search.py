"""Measures several numbers of parts with short trainings, and keeps what is measured in one file.

For each number K and each repeat, the photos of the training split that are not held out are divided into two disjoint
halves. One network is trained on each, from a seed of its own: its weights, its order of samples and the clusters that
its basis starts from share nothing with the other's. Then both label the same held-out photos. No label of a part is
read.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import TypeAdapter

from slotscops.config import Config, to_mapping
from slotscops.core import console
from slotscops.core.claims import differences
from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import remove_abandoned, write_json
from slotscops.features.cache import FeatureCache
from slotscops.loader.plan import disjoint_halves, held_out_samples
from slotscops.metrics.stability import LabelledPhotos, count_pairs_of_labels, label_photos, stability_of
from slotscops.metrics.without_labels import score_without_labels
from slotscops.shard.index import ShardDataset
from slotscops.train import failures
from slotscops.train.candidates import candidate_seeds
from slotscops.train.choose_k.rule import RULE, Measured, recommend
from slotscops.train.loop import Trainer
from slotscops.train.monitors import dead_parts
from slotscops.train.processes import on_first_process, open_training_data, timeout_of
from slotscops.train.run.owner import take_ownership

RESULT = "choose_k.json"
NOTE = (
    "This is a recommendation. No label of a part was read, so it may differ from the number of parts that annotators "
    "drew."
)
_ENOUGH_PHOTOS = 2_000  # from which the clusters of the basis are found; a half need not be larger
# Settings that may change between two starts without making other numbers.
_FREE_TO_CHANGE = ("run_dir", "data.shards", "data.num_workers", "slots.num_parts", "encoder.weights")


@dataclass(frozen=True)
class Amount:
    """How much is trained and compared."""

    steps: int  # of each training: the first steps of the recipe
    repeats: int  # pairs of trainings for each number of parts, at least 2
    held_out: int  # photos on which they are compared, but at most a quarter of the split


def choose_k(
    config: Config, numbers: list[int], amount: Amount, out: Path, accelerator: Accelerator, command: str
) -> dict[str, Any]:
    """Measures each number of parts, keeps the results in `out/choose_k.json`, and recommends one number.

    Numbers that an earlier start has finished with the same settings are not trained again. All processes train each
    network together. All must call this.

    Args:
        config: the recipe. Its number of parts, and `basis.candidates`, do not matter.
        numbers: the numbers of parts, in the order in which they are tried.
        command: the training command of the recommendation, with `{}` in the place of the number of parts.

    Returns:
        The content of the file, see `describe`.

    Raises:
        UserError: the folder holds results of other settings, belongs to another process, or cannot be written; the
            training split is too small; settings and data do not fit.
        RunError: the file cannot be written in between.
    """
    config = replace(
        config,
        run_dir=str(out),
        basis=replace(config.basis, candidates=1),
        train=replace(config.train, compile=False, stop_after_steps=None),
    )
    dataset, cache = open_training_data(config)
    settings = identity(config, amount, dataset, cache)
    done = on_first_process(lambda: _open(out, settings), timeout_of(config))
    for number in numbers:
        if number in done:
            console.say(f"{number} parts: measured by an earlier start")
            continue
        done[number] = _measure(config, number, amount, dataset, accelerator)
        console.say(_in_words(done[number]))
        on_first_process(lambda: _keep(out, describe(done, settings, command)), timeout_of(config))
    content = describe(done, settings, command)
    on_first_process(lambda: _keep(out, content), timeout_of(config))
    return content


def identity(config: Config, amount: Amount, dataset: ShardDataset, cache: FeatureCache) -> dict[str, Any]:
    """What has to be the same for results to be comparable: settings, amounts, and digests of shards and features."""
    return {
        "settings": to_mapping(config),
        "choose_k": asdict(amount),
        "shards": dataset.digest,
        "features": cache.digest,
    }


def describe(done: Mapping[int, Measured], settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The content of `choose_k.json`.

    Returns:
        measured: for each number of parts its means and the values of each training, None for NaN.
        recommended: the number of parts, or None if parts died at every one.
        rule, note: how it was chosen, and what it is not.
        next_command: the training with the recommended number; None without one.
        identity: see `identity`.
    """
    measured = [done[number] for number in sorted(done)]
    chosen = recommend(measured)
    return {
        "measured": [_without_nan(asdict(one) | _means(one)) for one in measured],
        "recommended": chosen.num_parts,
        "most_stable": chosen.best,
        "standard_error": _or_none(chosen.standard_error),
        "least_stability": _or_none(chosen.least),
        "rule": RULE,
        "note": NOTE,
        "next_command": None if chosen.num_parts is None else command.format(chosen.num_parts),
        "identity": settings,
    }


# ---- the trainings -----------------------------------------------------------------------------------------------


def _measure(config: Config, number: int, amount: Amount, dataset: ShardDataset, accelerator: Accelerator) -> Measured:
    """Trains all networks with that number of parts, and compares them pair by pair."""
    start = time.perf_counter()
    config = replace(config, slots=replace(config.slots, num_parts=number))
    seeds = candidate_seeds(config.seed, 2 * amount.repeats)
    stabilities, likelihoods, dead = [], [], []
    for repeat in range(amount.repeats):
        pair: list[LabelledPhotos] = []
        num_classes, is_finite = 1, True
        held_out, halves = _divide(config, amount, dataset, repeat)
        for half, seed in zip(halves, seeds[2 * repeat : 2 * repeat + 2], strict=True):
            trainer = _train(replace(config, seed=seed), half, amount.steps, accelerator)
            network, photos = trainer.network, replace(trainer.split, only=held_out)
            scores = score_without_labels(network, photos, config, accelerator=accelerator)
            likelihoods.append(scores["likelihood"])
            is_finite = is_finite and not np.isnan(scores["agreement"])
            num_classes = network.num_classes or 1
            pair.append(label_photos(network, photos, config.seed, accelerator))
            del trainer, network
        table = count_pairs_of_labels(pair[0], pair[1], number + 1, num_classes, accelerator)
        stabilities.append(stability_of(table) if is_finite else float("nan"))
        dead += [len(dead_parts(table.sum(axis=2))), len(dead_parts(table.sum(axis=1)))]
    return Measured(number, stabilities, likelihoods, dead, round(time.perf_counter() - start, 1))


def _divide(
    config: Config, amount: Amount, dataset: ShardDataset, repeat: int
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The held-out samples, the same for every training, and the two halves of the others for one repeat."""
    num_samples = dataset.num_samples("train")
    num_held_out = min(amount.held_out, num_samples // 4)
    if not num_held_out:
        raise UserError(
            f"{dataset.location}: has {num_samples} photos to train on, too few to hold some out and to train on two "
            "halves of the others; make shards of at least 4"
        )
    most = max(_ENOUGH_PHOTOS, amount.steps * config.train.batch_size)
    held_out = np.sort(held_out_samples(num_samples, num_held_out, config.seed))
    return held_out, disjoint_halves(num_samples, num_held_out, config.seed, repeat, most)


def _train(config: Config, samples: NDArray[np.int64], num_steps: int, accelerator: Accelerator) -> Trainer:
    """The first steps of a run on these samples of the training split only."""
    accelerator.free_memory()  # of the training before
    num_steps = min(num_steps, config.train.total_steps)
    trainer = None
    with failures.named(lambda: trainer.step if trainer else 0):
        trainer = Trainer(config, accelerator, only=samples)
        batches = trainer.open_batches(num_steps)
        for _ in range(num_steps):
            trainer.take_step(batches)
    return trainer


# ---- the file ----------------------------------------------------------------------------------------------------


def _open(out: Path, settings: dict[str, Any]) -> dict[int, Measured]:
    """Makes the folder and reads what an earlier start has finished there, by number of parts."""
    try:
        take_ownership(out)
    except UserError as error:
        raise UserError(str(error).replace("run_dir=DIR", "--out DIR")) from None
    remove_abandoned(out)
    path = out / RESULT
    if not path.exists():
        return {}
    try:
        content = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        earlier = content["identity"]
        rows = [{name: row[name] for name in Measured.__dataclass_fields__} for row in content["measured"]]
        measured = TypeAdapter(list[Measured]).validate_python([_with_nan(row) for row in rows])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); remove it, or choose another folder with --out DIR"
        ) from None
    changed = [name for name in differences(earlier, settings) if name.removeprefix("settings.") not in _FREE_TO_CHANGE]
    if changed:
        what = ", ".join(name.removeprefix("settings.") for name in changed)
        raise UserError(
            f"{path}: was measured with another {what}; restore it, or choose another folder with --out DIR"
        )
    return {one.num_parts: one for one in measured}


def _keep(out: Path, content: dict[str, Any]) -> None:
    """Writes file and page, each whole or not at all."""
    from slotscops.train.choose_k.page import write_page

    try:
        write_json(out / RESULT, content)
        write_page(out, content)
    except OSError as error:
        raise RunError(f"{out / RESULT}: cannot be written ({error.strerror}); make room and start again") from None


def _means(one: Measured) -> dict[str, Any]:
    names = ("stability", "likelihood", "dead_share", "keeps_its_parts")
    return {name: getattr(one, name) for name in names}


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """NaN, also in lists, becomes None, because JSON has no NaN."""
    return {
        name: [_or_none(one) for one in value] if isinstance(value, list) else _or_none(value)
        for name, value in row.items()
    }


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    return row | {name: [float("nan") if one is None else one for one in value] for name, value in lists.items()}


def _or_none(value: Any) -> Any:
    return None if value != value else value


def _in_words(one: Measured) -> str:
    return (
        f"{one.num_parts} parts: stability {one.stability:.3f}, likelihood {one.likelihood:.4g}, "
        f"{one.dead_share:.0%} of the parts dead, {one.seconds:.0f} s"
    )
