"""One process of a simulated cluster: what it takes to start, to step, to log and to resume, outside the network.

    python -m slotscops.benchmark.rank SHARDS SMALL RUN_DIR RANK NUM_RANKS BATCH_SIZE

It is the trainer itself, alone on this machine, with the share of the samples that this rank has of the global batch.
Sums over processes are therefore free. Measured in a process of its own, so that nothing is cached for it beforehand.
"""

import json
import pickle
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slotscops.benchmark.cluster import SIZE
from slotscops.benchmark.start import resident_bytes
from slotscops.config import Config, load_config
from slotscops.core.records import Batch
from slotscops.loader.plan import TrainingPlan
from slotscops.train.fit import find_start
from slotscops.train.loop import Trainer
from slotscops.train.processes import start_accelerator
from slotscops.train.run.writer import CheckpointWriter

READ_BATCHES = 6
_TAKEN = 20  # steps
_LOGGED = 5


class SimulatedRank(Trainer):
    """A trainer whose plan is that of one rank of many, and which adds up the time that its steps compute."""

    rank, num_ranks = 0, 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.computed_s = 0.0
        for owner, name in (
            (self, "_loss"),
            (self.accelerator, "backward"),
            (self._stepper, "step"),
            (self._stepper, "zero_grad"),
            (torch.nn.utils, "clip_grad_norm_"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            self.computed_s += time.perf_counter() - start
            return result

        return run

    def _plan(self, num_steps: int) -> TrainingPlan:
        return plan_of(self.config, len(self.split), self.rank, self.num_ranks, self.samples_seen, num_steps)

    def step_outside(self, batch: Batch) -> float:
        """Takes a step. Returns the seconds that are neither waiting for data nor computing."""
        self.stopwatch.restart()
        self.computed_s = 0.0
        start = time.perf_counter()
        self.take_step(iter([batch]))
        return time.perf_counter() - start - self.stopwatch.waited_s - self.computed_s


def plan_of(
    config: Config, num_samples: int, rank: int, num_ranks: int, samples_seen: int, num_steps: int
) -> TrainingPlan:
    """The plan of one rank for the next steps."""
    batch_size = config.train.batch_size
    last = samples_seen + num_steps * batch_size
    return TrainingPlan(num_samples, config.seed, batch_size, rank, num_ranks, 1, samples_seen, last)


def settings(shards: Path, run_dir: Path, batch_size: int) -> Config:
    return load_config(
        None,
        [
            f"data.shards={shards}",
            f"run_dir={run_dir}",
            f"data.size={SIZE}",
            "data.num_workers=0",
            "encoder.name=features",
            f"train.batch_size={batch_size}",
            "train.total_steps=1000000",
            "train.eval_every_steps=0",
        ],
    )


def measure(shards: Path, small: Path, run_dir: Path, rank: int, num_ranks: int, batch_size: int) -> dict[str, Any]:
    """Starts, takes steps, logs, saves and resumes as one rank; see `scale` for the figures.

    Args:
        small: a data set of one shard. It is started with first, so that the program's own start can be told from what
            the size of the data set adds.
    """
    (program_s, _), _, _ = _start(settings(small, run_dir / "small", num_ranks), 0, num_ranks)
    before = resident_bytes()
    _forget_peak()
    (seconds, processor_s), trainer, batches = _start(settings(shards, run_dir, batch_size), rank, num_ranks)
    figures: dict[str, Any] = {"first_batch_s": program_s + seconds, "program_s": program_s}
    figures["first_batch_processor_s"] = processor_s
    figures["held_megabytes"] = (resident_bytes() - before) / 1e6
    figures["sent_to_a_worker_megabytes"] = len(pickle.dumps(trainer.split)) / 1e6
    batch = next(batches)
    figures["read_ms_a_sample"] = 1e3 * _median_s(lambda: next(batches), READ_BATCHES - 2) / len(batch)
    figures["step_ms"] = 1e3 * _bookkeeping_s(trainer, batch)
    last_step = trainer.take_step(iter([batch]))
    before_s = time.process_time()
    figures["log_ms"] = 1e3 * _median_s(lambda: trainer.log(*last_step), _LOGGED)
    figures["log_processor_ms"] = 1e3 * (time.process_time() - before_s) / _LOGGED
    # The third of these steps takes its samples from two epochs.
    config, ends = trainer.config, len(trainer.split) - 5 * batch_size // 2
    figures["epoch_end_ms"] = 1e3 * max(_time_plan(plan_of(config, len(trainer.split), rank, num_ranks, ends, 5)))
    figures["descriptors"] = num_descriptors()
    figures["megabytes"] = (_peak_bytes() - before) / 1e6
    with CheckpointWriter(trainer.folder.checkpoints, keep=3) as writer:
        trainer.save(writer)
    with _counted_opens(trainer.folder.checkpoints) as opened:
        start_from = find_start(trainer.folder, "auto")
        Trainer(config, trainer.accelerator, start_from)
    figures["opened_on_resume"] = max(opened.values())
    trainer.folder.release()
    return figures


def _start(config: Config, rank: int, num_ranks: int) -> tuple[tuple[float, float], "SimulatedRank", Iterator[Batch]]:
    """Seconds, and seconds of a processor, until the first batch is there; the trainer; the batches after the first."""
    accelerator = start_accelerator(config)
    start, processor_start = time.perf_counter(), time.process_time()
    trainer = SimulatedRank(config, accelerator)
    trainer.rank, trainer.num_ranks = rank, num_ranks
    trainer.open_run()
    batches = trainer.open_batches(READ_BATCHES)
    next(batches)
    return (time.perf_counter() - start, time.process_time() - processor_start), trainer, batches


def _bookkeeping_s(trainer: SimulatedRank, batch: Batch) -> float:
    """Median seconds of a step that are neither waiting for data nor computing, and of planning it."""
    seconds = [trainer.step_outside(batch) for _ in range(_TAKEN)]
    num_samples = len(trainer.split)
    plan = plan_of(trainer.config, num_samples, trainer.rank, trainer.num_ranks, 0, _TAKEN)
    return statistics.median(seconds) + statistics.median(_time_plan(plan))


def _median_s(run: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _time_plan(plan: TrainingPlan) -> list[float]:
    """Seconds that each microbatch takes to plan."""
    seconds, microbatches = [], iter(plan)
    start = time.perf_counter()
    for _ in microbatches:
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


@contextmanager
def _counted_opens(folder: Path) -> Iterator[Counter[str]]:
    """How often each file below a folder is opened in the body."""
    opened, is_counting = Counter[str](), True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if is_counting and event == "open" and str(arguments[0]).startswith(str(folder)):
            path = Path(str(arguments[0]))
            if path.is_file():
                opened[path.name] += 1

    sys.addaudithook(note)  # it cannot be removed
    yield opened
    is_counting = False


def num_descriptors() -> int:
    """Open files and sockets of this process (Linux)."""
    return len(list(Path("/proc/self/fd").iterdir()))


def _forget_peak() -> None:
    """Sets the recorded peak of this process' memory to what it uses now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    folders, numbers = [Path(name) for name in sys.argv[1:4]], [int(number) for number in sys.argv[4:7]]
    print(json.dumps(measure(folders[0], folders[1], folders[2], *numbers)))
