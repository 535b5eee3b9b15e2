"""A pool of worker processes on the cores of one machine."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from slotscops.core.errors import RunError

_TASKS_PER_MESSAGE = 4


def usable_cores() -> int:
    """Cores of this machine for each of the processes that the launcher started on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class WorkerPool:
    """Maps a function over many arguments on several cores, results in order. One worker works in this process."""

    def __init__(self, num_workers: int, preload: str) -> None:
        """
        Args:
            preload: the module that holds the mapped functions. It is imported once, not in every worker.
        """
        self._executor = None
        if num_workers > 1:
            context = multiprocessing.get_context("forkserver")  # a fork of a process with threads can hang
            context.set_forkserver_preload([preload])
            self._executor = ProcessPoolExecutor(num_workers, mp_context=context)

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        """The results, in the order of the arguments.

        Raises:
            RunError: a worker died, as when memory runs out.
        """
        if self._executor is None:
            return list(map(function, *arguments))
        try:
            return list(self._executor.map(function, *arguments, chunksize=_TASKS_PER_MESSAGE))
        except BrokenProcessPool:
            raise RunError("a worker process died (out of memory?); start again with fewer --workers") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
