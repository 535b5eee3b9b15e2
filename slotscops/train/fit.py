"""Runs a whole training, from settings to the exit code."""

import time
from collections.abc import Sequence
from contextlib import suppress

from slotscops.config import Config
from slotscops.core import console
from slotscops.train import failures
from slotscops.train.candidates import check_candidates, choose_start
from slotscops.train.loop import Trainer
from slotscops.train.processes import read_on_first_process, start_accelerator, timeout_of
from slotscops.train.run.checkpoint import Checkpoint
from slotscops.train.run.folder import RunFolder
from slotscops.train.stopwatch import peak_memory_bytes
from slotscops.train.trackers import close_trackers

_REHEARSED_STEPS = 3  # the first step is slower than the rest


def fit(config: Config, resume: str = "auto", dry_run: bool = False, trackers: Sequence[str] = ()) -> int:
    """Trains to `train.total_steps`; a dry run takes a few steps, writes nothing and prints the run's cost.

    Args:
        resume: `auto` continues from the run's newest complete checkpoint, `none` refuses if there is one, and anything
            else is the path of a run or checkpoint to continue from.
        trackers: trackers to log to besides TensorBoard, such as `wandb` or `mlflow`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that asked the run to stop.

    Raises:
        UserError: settings, data, features and checkpoint do not fit each other.
        RunError: a loss or gradient that is not finite, a lost process or loader worker, no room for the last
            checkpoint; names step and cause.
    """
    check_candidates(config)
    accelerator = start_accelerator(config, () if dry_run else trackers)
    folder = RunFolder.of(config)
    trainer = None
    try:
        with failures.named(lambda: trainer.step if trainer else 0):
            start_from = None
            if not dry_run:
                start_from = read_on_first_process(lambda: find_start(folder, resume), timeout_of(config))
            trainer = Trainer(config, accelerator, start_from)
            del start_from  # its tensors take memory
            if config.basis.candidates > 1 and not trainer.step and not dry_run:
                choose_start(trainer)
            signal_number = _rehearse(trainer) if dry_run else trainer.train()
    except BaseException as error:
        if trainer is not None and not dry_run and accelerator.is_main_process:
            with suppress(OSError):  # the reason may be a folder that cannot be written
                trainer.folder.note("failed", trainer.step, repr(error), trainer.files.missing)
        close_trackers(accelerator)  # not end_training, which would wait for lost processes
        raise
    finally:
        folder.release()
    close_trackers(accelerator)
    accelerator.end_training()
    return 128 + signal_number if signal_number else 0


def find_start(folder: RunFolder, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from, or None. A folder with checkpoints is owned before they are read.

    In a training, only the first process calls it.
    """
    if folder.checkpoints.is_dir():
        folder.own()
    return folder.find_checkpoint(resume)


def _rehearse(trainer: Trainer) -> int:
    """Takes a few steps, writes nothing and prints what the whole run would cost."""
    batches = trainer.open_batches(_REHEARSED_STEPS)
    for _ in range(_REHEARSED_STEPS):
        start = time.perf_counter()
        loss, _ = trainer.take_step(batches)
        loss_value = loss.item()
        step_s = time.perf_counter() - start
    trainer.finite.check()
    trainer.damage.agree(trainer.accelerator, trainer.step, write=False)
    train, basis = trainer.config.train, trainer.config.basis
    num_steps = train.total_steps
    if basis.candidates > 1:
        num_steps += basis.candidates * min(basis.candidate_steps, train.total_steps)
    weights_mb = sum(parameter.nbytes for parameter in trainer.network.parameters()) / 1e6
    console.say(
        f"dry run: loss {loss_value:.5g}, {step_s:.3f} s a step of {train.batch_size} images, so about "
        f"{num_steps * step_s / 3600:.2f} h for {num_steps} steps on "
        f"{trainer.accelerator.num_processes} process(es) of {trainer.accelerator.device.type}; "
        f"peak memory {peak_memory_bytes(trainer.accelerator.device) / 1e9:.2f} GB, "
        f"{weights_mb:.0f} MB of weights. Nothing was written."
    )
    return 0
