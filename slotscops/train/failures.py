"""Turns training errors into one line that names rank, step and cause, even if another process failed first."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from slotscops.core import console
from slotscops.core.errors import RunError, UserError, first_line

# Messages of gloo and NCCL when another process is gone or does not answer.
_LOST = re.compile(
    r"connection (closed|reset|refused|was (closed|reset))|closed by peer|timed? ?out|timeout|broken pipe|"
    r"socket|connect failure|remote process exited|watchdog|read error|write error",
    re.IGNORECASE,
)
_ASKING_S = 3.0  # seconds to wait for the other processes' reasons


@contextmanager
def named(step: Callable[[], int]) -> Iterator[None]:
    """Turns errors inside into a RunError that names step and cause, and tells the other processes the reason.

    Errors other than a lost process or a lack of memory are raised unchanged, with their traceback.

    Args:
        step: returns the number of steps done.
    """
    try:
        yield
    except UserError as error:
        _tell(first_line(error))
        raise
    except RunError as error:
        _tell(f"after step {step()}: {first_line(error)}")
        raise type(error)(f"after step {step()}: {error}") from error
    except Exception as error:
        cause = _explain(error)
        _tell(f"after step {step()}: {cause or type(error).__name__}")
        if cause is None:
            console.warn(f"rank {console.rank()}, after step {step()}: {type(error).__name__}: {first_line(error)}")
            raise
        raise RunError(f"after step {step()}: {cause}") from error


def _explain(error: Exception) -> str | None:
    """The cause in one line, or None for an unexpected error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory; lower train.batch_size or raise train.accumulation_steps"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(text)):
        if console.world_size() == 1:
            return None
        return f"{_who_left()}; start again to go on from the last checkpoint"
    return None


# ---- why each process failed ------------------------------------------------------------------------------------


def _tell(reason: str) -> None:
    """Stores the reason for this process's failure, where the other processes can read it."""
    _within_time(lambda store: store.set(_key(console.rank()), reason))


def _who_left() -> str:
    """Names the processes that failed before this one with their reasons, or those that do not answer."""
    _tell(_WAITING)
    others = [number for number in range(console.world_size()) if number != console.rank()]
    reasons: dict[int, str] = {}

    def ask(store: Any) -> None:
        ends = time.monotonic() + _ASKING_S
        while len(reasons) < len(others) and time.monotonic() < ends:
            for number in others:
                if number not in reasons and store.check([_key(number)]):
                    reasons[number] = store.get(_key(number)).decode()
            time.sleep(0.1)

    if not _within_time(ask):
        return "lost the main process: it was killed, or this node was cut off from it"
    causes = {number: reason for number, reason in reasons.items() if reason != _WAITING}
    if causes:
        return "; ".join(f"rank {number} failed: {reason}" for number, reason in sorted(causes.items()))
    silent = [number for number in others if number not in reasons]
    listed = ", ".join(f"rank {number}" for number in silent) or "the network"
    return f"lost {listed}: killed, or it gave no answer within train.timeout_minutes"


def _within_time(use: Callable[[Any], None]) -> bool:
    """Whether the processes' shared store can be used. Trying it over a dead network would wait for minutes."""
    if not dist.is_initialized() or console.world_size() == 1:
        return False
    done = threading.Event()

    def run() -> None:
        # If the process that hosted the store is gone, this process cannot tell the others anything.
        with suppress(RuntimeError, dist.DistError):
            use(dist.distributed_c10d._get_default_store())
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(_ASKING_S + 2)


_WAITING = "waits for another process"


def _key(rank: int) -> str:
    # If the launcher restarts its processes, the store is kept from the last start.
    return f"slotscops/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/left/{rank}"
