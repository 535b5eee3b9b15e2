"""The folder of a run: the names of its files, and the choice of the checkpoint to continue from."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slotscops.config import Config, config_from_mapping, load_config, to_mapping, write_config
from slotscops.core import console
from slotscops.core.address import hide_secrets
from slotscops.core.claims import differences
from slotscops.core.errors import UserError, shorten
from slotscops.core.files import json_numbers, read_bytes, remove_abandoned, write_bytes, write_json
from slotscops.features.cache import FeatureCache
from slotscops.loader.plan import ORDER
from slotscops.shard.index import ShardDataset
from slotscops.train.run.checkpoint import (
    Checkpoint,
    State,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
)
from slotscops.train.run.owner import release_ownership, take_ownership
from slotscops.train.run.side_files import SideFiles

Found = TypeVar("Found")
_MAX_LOOKS = 20  # tries to read a checkpoint of a run that trains and removes old checkpoints meanwhile
# Settings that may change between two starts of one run without making it another run.
_FREE_TO_CHANGE = (
    "run_dir",
    "data.shards",
    "data.num_workers",
    "data.max_damaged_share",
    "encoder.weights",
    "teacher.weights",
)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, all below `path`."""

    path: Path

    @staticmethod
    def of(config: Config) -> "RunFolder":
        return RunFolder(Path(config.run_dir))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def damaged(self) -> Path:
        """Every damaged sample found so far, by key: what is wrong, and the step that found it."""
        return self.path / "damaged.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        """Says whether the run is running, interrupted, finished or failed, at which step, and why."""
        return self.path / "status.json"

    @property
    def evaluation(self) -> Path:
        """The last evaluation's step and, by class, pixel counts of slots by true parts."""
        return self.path / "evaluation.json"

    @property
    def candidates(self) -> Path:
        """The starts of the basis that were tried, their numbers, and which one the run began from."""
        return self.path / "candidates.json"

    @property
    def scores(self) -> Path:
        """What `evaluate --json` wrote here, which the run's page shows."""
        return self.path / "scores.json"

    @property
    def cost(self) -> Path:
        """One line for each command of the run that a script timed: its stage and seconds."""
        return self.path / "cost.jsonl"

    @property
    def machine(self) -> Path:
        """Describes the machine on which the run was last started."""
        return self.path / "machine.json"

    @property
    def page(self) -> Path:
        """The run's own page, to be opened in a browser."""
        return self.path / "report.html"

    def tracker_id(self, tracker: str) -> Path:
        """Holds the id of the run at a tracker such as Weights & Biases."""
        return self.path / f"{tracker}_id"

    def open(self, config: Config, step: int) -> None:
        """Makes the folder, writes the resolved settings, and drops logged steps beyond the one resumed from.

        Raises:
            UserError: if the folder cannot be written, or another process trains there.
        """
        self.take(step)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.pictures.mkdir(exist_ok=True)
            remove_abandoned(self.path)
            write_config(config, self.config)
            if config.data.shards.has_secret:
                console.say(
                    f"{self.config}: keeps {config.data.shards} without its password or signed query; give "
                    "data.shards=URL again at the next start"
                )
            if self.metrics.exists():
                self._repair_metrics(step)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder with run_dir=DIR"
            ) from None

    def own(self) -> None:
        """Makes this process the owner of the folder. Raises UserError if another one is."""
        take_ownership(self.path)

    def take(self, step: int) -> None:
        """Makes this process the owner of the folder.

        Args:
            step: the step that the run continues from; 0 for a run that begins.

        Raises:
            UserError: if another process owns the folder, or one has trained in it since this one looked.
        """
        take_ownership(self.path)
        newest = max((int(path.name.removeprefix("step-")) for path in list_checkpoints(self.checkpoints)), default=0)
        if step == 0 and newest:
            release_ownership(self.path)
            raise UserError(f"{self.path}: another process has trained there meanwhile, to step {newest}; start again")

    def release(self) -> None:
        """Gives up the ownership, so that another process may train here."""
        release_ownership(self.path)

    def _repair_metrics(self, step: int) -> None:
        """Keeps the logged steps up to `step`, and moves damaged lines to another file."""
        rows, damaged = _split_metrics(self.metrics)
        if damaged:
            aside = self.metrics.with_name(f"{self.metrics.name}.damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            console.warn(f"{self.metrics}: {len(damaged)} damaged line(s) were moved to {aside.name}")
        kept = [row for row in rows if row["step"] <= step]
        write_bytes(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def note(self, state: str, step: int, reason: str = "", missing: Mapping[str, str] | None = None) -> None:
        """Records whether the run is running, interrupted, finished or failed.

        Args:
            missing: what could not be written so far, and why.
        """
        status: dict[str, Any] = {"state": state, "step": step, "reason": shorten(hide_secrets(reason))}
        missing = {kind: why for kind, why in (missing or {}).items() if kind != self.status.name}
        write_json(self.status, status | ({"missing": missing} if missing else {}))

    def close(self, config: Config, step: int, signal_number: int, files: SideFiles) -> None:
        """Records and prints how far the run came, if it did not fail."""
        if step >= config.train.total_steps:
            files.write("status.json", lambda: self.note("finished", step, "", files.missing), keep=1)
            console.say(
                f"{self.path}: trained {step} steps; score it with: python -m slotscops.evaluate "
                f"--checkpoint {self.path} --shards {config.data.shards}"
            )
            return
        reason = signal.Signals(signal_number).name if signal_number else "train.stop_after_steps"
        files.write("status.json", lambda: self.note("interrupted", step, reason, files.missing), keep=1)
        console.say(f"{self.path}: stopped at step {step} ({reason}); start again to go on")

    def log(self, row: dict[str, Any]) -> None:
        """Appends one logged step, whole or not at all."""
        line = (json.dumps(json_numbers(row)) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            written = 0
            try:
                while written < len(line):  # a nearly full disk takes only a part of the line
                    written += file.write(line[written:])
            except OSError:
                file.truncate(end)
                raise

    def find_checkpoint(self, resume: str) -> Checkpoint | None:
        """The checkpoint to go on from, read, or None to start afresh.

        Args:
            resume: `auto` takes the newest that verifies, `none` starts afresh, anything else is a checkpoint's path.

        Raises:
            UserError: `none` over a run that has checkpoints; no checkpoint of the run verifies.
        """
        present = list_checkpoints(self.checkpoints)
        if resume not in ("auto", "none"):
            return _resolve(Path(resume), load_checkpoint)
        if not present:
            return None
        if resume == "none":
            raise UserError(
                f"{self.path}: holds the checkpoints of a run; go on with --resume auto or choose another run_dir"
            )
        return _newest_whole(present, load_checkpoint)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest whole checkpoint of the run at `path`.

    Raises:
        UserError: there is no such path, or no whole checkpoint in it.
    """
    return _resolve(path, verify_checkpoint)


def _resolve(path: Path, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of the checkpoint that `path` leads to, or of the newest one that it does not refuse."""
    if path.name == "best" and not path.exists():
        path = best_checkpoint(path.parent) or path
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint; give runs/NAME or runs/NAME/checkpoints/step-N")
    if (path / "manifest.json").is_file():
        return read(path)
    present = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not present:
        raise UserError(f"{path}: holds no checkpoint; give runs/NAME or runs/NAME/checkpoints/step-N")
    return _newest_whole(present, read)


def load_newest(path: Path) -> Checkpoint:
    """Reads the newest whole checkpoint of a run, or the checkpoint that `path` is.

    A run that trains meanwhile removes its older checkpoints. If the one that is being read disappears, the next newest
    one is read.

    Raises:
        UserError: there is no such path, no whole checkpoint in it, or the checkpoint has another format.
    """
    for _ in range(_MAX_LOOKS):
        before = _look(path)
        try:
            return _resolve(path, load_checkpoint)
        except UserError:
            if _look(path) == before:
                raise
    return _resolve(path, load_checkpoint)


def _look(path: Path) -> list[tuple[str, int]]:
    """The checkpoints that `path` leads to as they are now: place and number of each folder on its file system."""
    present = [path.resolve(), *list_checkpoints(path / "checkpoints"), *list_checkpoints(path)]
    seen = []
    for checkpoint in present:
        with suppress(OSError):  # removed since it was listed
            seen.append((str(checkpoint), checkpoint.stat().st_ino))
    return seen


def run_of_checkpoint(checkpoint: Path) -> Path:
    """runs/NAME of runs/NAME/checkpoints/step-N."""
    return checkpoint.resolve().parent.parent


def read_config(checkpoint: Path) -> Config:
    """The settings a checkpoint's model was built with, from `config.yaml` of its run or beside its tensors."""
    for folder in (checkpoint, run_of_checkpoint(checkpoint)):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml")
    raise UserError(f"{checkpoint}: no config.yaml beside it or in its run folder; copy it there")


def check_same_run(saved: State, config: Config, dataset: ShardDataset, cache: FeatureCache, path: Path) -> None:
    """Refuses to go on with settings, data or a version that make another model or another order of samples."""
    if saved.order != ORDER:
        raise UserError(
            f"{path}: its samples come in the order of rule {saved.order}, this version knows rule {ORDER}; go on with "
            "the version that began the run or start a new run with run_dir=DIR"
        )
    earlier = to_mapping(config_from_mapping(saved.config, str(path)))
    for name in differences(earlier, to_mapping(config)):
        if name in _FREE_TO_CHANGE or (name.startswith("train.") and name != "train.optimizer"):
            continue
        raise UserError(f"{path}: was trained with another {name}; restore it or start a new run with run_dir=DIR")
    digests = {"shards": (saved.shard_digest, dataset.digest), "features": (saved.feature_digest, cache.digest)}
    for name, (before, now) in digests.items():
        if before != now:
            raise UserError(
                f"{path}: was trained on other {name} ({before[:12]}, now {now[:12]}); "
                f"point data.shards to the {name} it began with or start a new run with run_dir=DIR"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps, without damaged lines, such as a last line that a crash cut short."""
    return _split_metrics(path)[0]


def _split_metrics(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The logged steps, and the damaged lines. A last line without a line end is in neither."""
    *lines, _cut_short = read_bytes(path).split(b"\n")
    rows, damaged = [], []
    for line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row["step"]) is not int:
                raise ValueError("no logged step")
        except (ValueError, KeyError, RecursionError):
            damaged.append(line)
        else:
            rows.append(row)
    return rows, damaged


def _newest_whole(checkpoints: list[Path], read: Callable[[Path], Found]) -> Found:
    reasons: dict[Path, str] = {}
    for path in reversed(checkpoints):
        try:
            found = read(path)
        except UserError as error:
            reasons[path] = str(error)
            continue
        for other, reason in reasons.items():
            if other.exists():  # otherwise a run that trains has removed it meanwhile
                console.warn(f"passed over a checkpoint: {reason}")
        return found
    raise UserError(f"{reasons[checkpoints[-1]]} (no other checkpoint of the run is whole)")
