"""Terminal output: progress, tables and one-line errors. Only the main process prints, except for errors."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slotscops.core.errors import ClaimError, RunError, UserError

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


def is_first_on_node() -> bool:
    """Whether this process is the one of its machine that does what is done once a machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def visible(text: object) -> str:
    """The text in one line that a terminal only shows: what it would obey, such as an escape sequence, is spelled out.

    Names of files, of archive members and of settings come from others, and so do the messages of servers. One with a
    newline could otherwise forge a line of ours.
    """
    shown = str(text).encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def say(message: str) -> None:
    """Prints a line on stdout without interpreting markup."""
    if is_main():
        Console(highlight=False, soft_wrap=True).print(visible(message), markup=False)


def print_text(text: str) -> None:
    """Prints our own text of several lines on stdout as it is, such as settings in YAML or a JSON schema."""
    if is_main():
        print(text)


def warn(message: str) -> None:
    """Prints a line on stderr, from any process."""
    _tell(f"slotscops: {visible(message)}")


def _tell(line: str) -> None:
    """Prints on stderr. If nobody reads it any more, as after `2>&1 | head`, the work goes on without."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; columns after the first are right-aligned."""
    if not is_main():
        return
    table = Table(title=escape(visible(title)), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
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
        with suppress(OSError):  # see _tell
            _STDERR.print(visible(message), markup=False)


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
            _tell(f"{visible(what)}: {count}/{total}, {count / (now - start):.1f}/s")


def run_command(command: Callable[[], int]) -> None:
    """Runs a command's main function and exits with its code.

    A user's mistake exits with 2 and a failure while running with 1; each prints one line on stderr. Ctrl-C exits with
    130. A file or folder that cannot be read or written is named with what to do.
    """
    try:
        code = command()
    except UserError as error:
        # Every process of a node sees the same files and settings, so one line is enough. A claim is refused at another
        # time in each process, and the launcher ends the others when the first of them ends.
        if is_first_on_node() or isinstance(error, ClaimError):
            warn(_one_line(error))
        code = 2
    except RunError as error:
        warn(f"rank {rank()}: {_one_line(error)}" if world_size() > 1 else _one_line(error))
        code = 1
    except BrokenPipeError:
        code = _after_lost_reader()
    except OSError as error:
        if error.errno is None:  # no word of the system, so nothing a user could mend
            raise
        warn(explain_system_error(error))
        code = 1 if error.errno in _FAILURES else 2
    except KeyboardInterrupt:
        warn("interrupted")
        code = 130
    try:
        sys.stdout.flush()
    except OSError:
        code = code or _after_lost_reader()
    if code == 1 and world_size() > 1:
        os._exit(code)  # a normal exit would wait for lost processes, for minutes if the network is down
    sys.exit(code)


_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_REMEDIES = {
    errno.ENOSPC: "make room there and start again",
    errno.EDQUOT: "make room within your quota and start again",
    errno.EIO: "the disk may be failing: copy what is there to another one",
    errno.EACCES: "check its permissions, or name another place",
    errno.EPERM: "check its permissions, or name another place",
    errno.EROFS: "name a place on a file system that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "name another place, or move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}


def explain_system_error(error: OSError) -> str:
    """One line: the file or folder, what the system said of it, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its file system")
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return f"{place}{(error.strerror or str(error)).lower()}; {remedy}"


def _after_lost_reader() -> int:
    """The exit code of a command whose output nobody reads any more, as after `| head`; Python must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _one_line(error: Exception) -> str:
    """The message. In an error that PyTorch brings from a loader worker, it is the last line of a traceback."""
    message = str(error).strip() or type(error).__name__
    if not message.startswith("Caught "):
        return message
    return message.splitlines()[-1].strip().removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
