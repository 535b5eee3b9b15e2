"""Batches in the order of the plan for training, and in the order of the shards for evaluation.

A loader worker has no state. It is told which sample numbers to read, so the order and the mirroring are the same for
any number of workers.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing import queues
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader

from slotscops.core import console
from slotscops.core.errors import RunError, SilentLoaderError, UserError, first_line
from slotscops.core.machine import keep_freed_memory
from slotscops.core.records import Batch
from slotscops.loader.plan import TrainingPlan
from slotscops.loader.shared_memory import PREFETCHED_BATCHES
from slotscops.loader.split import Split

_WORKER_GRACE_S = 15  # seconds for which a worker goes on after a SIGTERM
_START_S = 60.0  # beyond the timeout: workers import PyTorch before their first batch
_LOOK_EVERY_S = 5.0  # while a batch is late, whether its worker still lives


def training_batches(
    split: Split, training_plan: TrainingPlan, num_workers: int, pin_memory: bool, timeout_s: float = float("inf")
) -> Iterator[Batch]:
    """The microbatches of this process in the order of the plan, read ahead by `num_workers` worker processes.

    Args:
        timeout_s: how long a batch of a worker may take, in seconds.

    Raises:
        UserError: if the split holds no samples.
        SilentLoaderError: if a worker does not answer in time, or the thread that receives its batches has ended, when
            a batch is asked for.
        RunError: if a worker died, when a batch is asked for.
    """
    if len(split) == 0:
        raise UserError(
            f"{split.dataset.location}: the split '{split.name}' holds no samples; there is nothing to train on"
        )
    return _name_lost_workers(_data_loader(split, training_plan, num_workers, pin_memory), timeout_s)


def _name_lost_workers(batches: Iterable[Batch], timeout_s: float) -> Iterator[Batch]:
    iterator, start_s = iter(batches), _START_S
    while True:
        try:
            batch = _next_batch(iterator, timeout_s + start_s)
        except (RunError, UserError):  # errors about the data, which a healthy worker reports
            raise
        except (ConnectionError, EOFError, RuntimeError) as error:
            if "Too many open files" in str(error):
                raise RunError(
                    "too many open files for what loader workers send; raise the limit, as with ulimit -n 1024, or "
                    "set data.num_workers=0"
                ) from error
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise RunError(
                "a loader worker died, killed, out of memory, or for what it said above; start again to go on from the "
                "last checkpoint, with fewer data.num_workers if memory or open files were short"
            ) from error
        if batch is None:
            return
        start_s = 0.0
        yield batch


def _next_batch(iterator: Iterator[Batch], timeout_s: float) -> Batch | None:
    """The next batch, or None after the last. While it is late, the DataLoader says so every few seconds."""
    since = time.monotonic()
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            # For a GPU, a thread receives the batches and pins them. Its errors do not reach the DataLoader.
            receiver: Thread | None = getattr(iterator, "_pin_memory_thread", None)
            if receiver is not None and not receiver.is_alive():
                raise SilentLoaderError(
                    "the thread that receives the batches of the loader workers has ended, for what it said above; "
                    "raise the limit of open files if these were short, as with ulimit -n 1024, or set "
                    "data.num_workers=0"
                ) from None
            if time.monotonic() - since >= timeout_s:
                raise SilentLoaderError(
                    f"no loader worker has answered for {timeout_s / 60:g} minutes (train.timeout_minutes); see to the "
                    "disk or the network that the shards are on and start again, with data.num_workers=0 if the "
                    "workers hang"
                ) from None


def move_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the batches on `device`.

    On a GPU each batch is copied on a stream of its own. The host queues a step long before the GPU has computed it, so
    the copy for the next step runs beside the present one, and no step waits for a batch that it does not need yet.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        moved.record_stream(working)
        yield moved


def evaluation_batches(
    split: Split, batch_size: int, rank: int = 0, num_ranks: int = 1, limit: int | None = None, num_workers: int = 0
) -> Iterator[Batch]:
    """The evaluation batches of one process. Together the processes read every sample once, in the shards' order.

    The batches are the same for any number of processes, because another batch may change the last bits of a
    convolution. Each process gets a consecutive range of whole batches. The last batch may be smaller.

    Args:
        batch_size: samples in a batch.
        rank, num_ranks: number of this process, and number of processes.
        limit: read only so many samples from the start of the split.
    """
    samples = range(min(len(split), limit or len(split)))
    starts = range(0, len(samples), batch_size)
    mine = starts[rank * len(starts) // num_ranks : (rank + 1) * len(starts) // num_ranks]
    batches = [list(samples[start : start + batch_size]) for start in mine]
    return iter(_data_loader(split, batches, num_workers, pin_memory=False))


def _data_loader(split: Split, batches: Any, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        split,
        batch_sampler=batches,
        collate_fn=_already_a_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Each start of a loader draws a number. With the global generator, a resumed run would draw one more.
        generator=torch.Generator(),
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        # Forking a process that runs PyTorch's threads can hang.
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_start_worker,
        timeout=_LOOK_EVERY_S if num_workers else 0,
    )


def _worker_context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # import PyTorch once, not in every worker
    return context


def _already_a_batch(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    outlive_signals()
    keep_freed_memory()  # of the last batch, for the next: otherwise reading takes up to a fifth longer
    # By default, Python prints a traceback, drops the batch and goes on; the training process would wait for ever.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _batch: object) -> None:
    """Ends a worker that cannot hand its batch over, as where shared memory is full."""
    console.warn(f"a loader worker cannot hand a batch over ({first_line(error)}); it ends")
    os._exit(1)


def outlive_signals() -> None:
    """Makes a loader worker ignore signals to the process group, so that the last step still gets its data.

    SIGTERM still ends the worker, 15 seconds later, because Python also ends workers with SIGTERM when it exits.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE_S))
