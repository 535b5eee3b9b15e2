"""Ends a run on a signal: all processes finish the same step, save a checkpoint and exit with 128 + its number."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# SIGUSR1 is what schedulers send some time before they take the machine away.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Under a launcher, one Ctrl-C arrives twice: from the terminal and from the launcher, which passes it on.
_SAME_KEYSTROKE_S = 1.0


class StopRequest:
    """While it is open, SIGTERM, SIGINT and SIGUSR1 are remembered instead of ending the process.

    A second SIGINT, more than a second after the first, ends it at once with code 130.
    """

    def __init__(self) -> None:
        self.signal_number = 0  # of the first signal; 0 if there was none
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_number == 0:
            self.signal_number, self._asked_at = number, now
        elif number == signal.SIGINT and now - self._asked_at > _SAME_KEYSTROKE_S:
            os._exit(128 + number)


class Agreement:
    """Lets all processes act on a signal at the same step, although it may reach only one of them.

    Each process gives a number at each step, and one step later all of them receive the largest. The exchange runs
    between the hosts (gloo) while the next step computes, so that no process and no GPU waits for it.
    """

    def __init__(self, timeout: timedelta) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        # A separate group keeps the order of its calls independent of that of the gradients.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    def exchange(self, number: int) -> int:
        """Sends this step's number and returns the largest number of the step before, or 0 at the first step."""
        if self._group is None:
            return number
        largest = self.finish()
        mine = torch.tensor([number])
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = (mine, work)
        return largest

    def finish(self) -> int:
        """Returns the largest of the numbers that were sent last."""
        if self._sent is None:
            return 0
        numbers, work = self._sent
        self._sent = None
        work.wait()
        return int(numbers)
