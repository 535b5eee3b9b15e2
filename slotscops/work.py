"""Work that is split over processes without any of them waiting for another, and over the cores of one machine.

Each unit of work ends in a file that appears whole or not at all and has the same content whoever writes it. So a
process does its own units first and then whatever is still missing; one that dies leaves its units to the others.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slotscops import console
from slotscops.config import differences
from slotscops.errors import RunError, UserError
from slotscops.files import write_json

_TASKS_PER_MESSAGE = 4
_SHORT = 100  # letters that a line can spare for two values


def units_in_turn(num_units: int) -> Iterator[int]:
    """All unit numbers, starting with this process's own share, so that processes begin at different places."""
    first = console.rank() * num_units // console.world_size()
    for step in range(num_units):
        yield (first + step) % num_units


def claim(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Writes down at `path` what is made in its folder, or refuses where that is something else.

    Args:
        remedy: what the user can do then.
    """
    if not path.is_file():
        write_json(path, content)
        return
    try:
        present = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged; {remedy}") from None
    for name in differences(present, content):
        before, now = present, content
        for step in name.split("."):
            before, now = before.get(step, {}), now.get(step, {})
        values = f"({before}, now {now})" if len(f"{before}{now}") < _SHORT else "(too long to print)"
        raise UserError(f"{path.parent}: was made with another {name.removeprefix('settings.')} {values}; {remedy}")


def usable_cores() -> int:
    """Cores of this machine for each of the processes that the launcher started on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class WorkerPool:
    """Maps a function over many arguments on several cores, results in order. One worker works in this process."""

    def __init__(self, num_workers: int) -> None:
        self._executor = None
        if num_workers > 1:
            context = multiprocessing.get_context("forkserver")  # a fork of a process with threads can hang
            context.set_forkserver_preload(["slotscops.shard_writer"])
            self._executor = ProcessPoolExecutor(num_workers, mp_context=context)

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        """Raises RunError if a worker dies, as when memory runs out."""
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
