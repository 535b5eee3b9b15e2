"""Terminal output: progress, tables and one-line errors. Only the main process prints, except for errors."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slotscops.core.errors import RunError, UserError

_PLAIN_LINE_EVERY_S = 10.0
# One object for bars and lines, so that a line goes above a running bar instead of through it.
_STDERR = Console(stderr=True, highlight=False, soft_wrap=True)
Item = TypeVar("Item")


def rank() -> int:
    """Number of this process among all, as the launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def _is_first_on_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say(message: str) -> None:
    """Prints a line on stdout without interpreting markup."""
    if is_main():
        Console(highlight=False, soft_wrap=True).print(message, markup=False)


def warn(message: str) -> None:
    """Prints a line on stderr, from any process."""
    print(f"slotscops: {message}", file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; columns after the first are right-aligned."""
    if not is_main():
        return
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A pipe has no width, and rich's default of 80 columns would cut the cells.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def track(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yields the items and shows progress: as a bar on a terminal, otherwise as one line every ten seconds."""
    if not is_main():
        yield from items
    elif sys.stderr.isatty():
        with progress_bar() as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.advance(task)
    else:
        yield from _track_plainly(items, total, what)


def track_silently(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Like `track` on a terminal; otherwise shows nothing, for work that prints its own lines."""
    return track(items, total, what) if sys.stderr.isatty() else iter(items)


def say_plainly(message: str) -> None:
    """Prints a line of progress; on a terminal it goes above the bar."""
    if is_main():
        _STDERR.print(message, markup=False)


def progress_bar() -> Progress:
    """A rich progress bar on stderr with count and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_STDERR,
    )


def _track_plainly(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _PLAIN_LINE_EVERY_S:
            last = now
            print(f"{what}: {count}/{total}, {count / (now - start):.1f}/s", file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> None:
    """Runs a command's main function and exits with its code.

    A user's mistake exits with 2 and a failure while running with 1; each prints one line on stderr. Ctrl-C exits with
    130.
    """
    try:
        code = command()
    except UserError as error:
        # Every process of a node sees the same files and settings, so one line is enough.
        if _is_first_on_node():
            warn(_one_line(error))
        code = 2
    except RunError as error:
        warn(f"rank {rank()}: {_one_line(error)}" if world_size() > 1 else _one_line(error))
        code = 1
    except KeyboardInterrupt:
        warn("interrupted")
        code = 130
    sys.stdout.flush()
    if code == 1 and world_size() > 1:
        os._exit(code)  # a normal exit would wait for lost processes, for minutes if the network is down
    sys.exit(code)


def _one_line(error: Exception) -> str:
    """The last line of the message. Errors from loader workers hold a traceback; the error's type is removed too."""
    last = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
    return last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
