"""Terminal output: progress, tables and one-line errors. Only the main process prints, except for errors."""

import errno
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Never, TextIO, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slotscops.core.errors import ClaimError, RunError, SilentLoaderError, UserError, first_line, visible

_PLAIN_LINE_EVERY_S = 10.0
_LEAST_NAME = 12  # columns of a terminal for the names of a table that is spread over several
_UNLIMITED = 100_000
_MOST_OPEN_FILES = 16_384


class _Screen(Console):
    """A rich console that does not end the program where its reader is gone."""

    def on_broken_pipe(self) -> Never:
        raise BrokenPipeError


# One object for bars and lines, so that a line goes above a running bar instead of through it.
_STDERR = _Screen(stderr=True, highlight=False, soft_wrap=True)
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


def say(message: str) -> None:
    """Prints a line on stdout."""
    if is_main():
        _print(visible(message), sys.stdout)


def print_text(text: str) -> None:
    """Prints our own text of several lines on stdout as it is, such as settings in YAML or a JSON schema."""
    if is_main():
        _print(text, sys.stdout)


def warn(message: str) -> None:
    """Prints a line on stderr, from any process."""
    _print(f"slotscops: {visible(message)}", sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    with _work_goes_on(stream):
        print(text, file=stream, flush=True)


@contextmanager
def _work_goes_on(stream: TextIO) -> Iterator[None]:
    """What the body cannot print is lost. Neither a reader that is gone, as after `| head`, nor a full disk ends work.

    What a full disk did not take of stdout stays in its buffer, and `run_command` says so at the end.
    """
    try:
        yield
    except BrokenPipeError:
        _print_to_nobody(stream)
    except OSError:
        pass


def _print_to_nobody(stream: TextIO) -> None:
    """Lets a stream whose reader is gone lead nowhere, so that the interpreter can flush it when it exits."""
    with suppress(OSError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], num_names: int = 1) -> None:
    """Prints a table; columns after the names are right-aligned.

    Where a terminal is too narrow, names break into several lines and the other columns are spread over several tables
    with the same rows, so that no name and no number is cut.

    Args:
        num_names: how many columns at the left say what a row is about; each of the tables repeats them.
    """
    if not is_main():
        return
    cells = [[visible(cell) for cell in row] for row in rows]
    width = _table_width()
    name_width, groups = _spread(columns, cells, num_names, width)
    for group in groups:
        table = Table(title=escape(visible(title)) if group is groups[0] else None, title_justify="left")
        for number in [*range(num_names), *group]:
            is_name = number < num_names
            table.add_column(
                columns[number],
                justify="left" if number == 0 else "right",
                overflow="fold",
                max_width=name_width if number == 0 else None,
                min_width=None if is_name else _cells_width(number, cells),
            )
        for row in cells:
            table.add_row(*(escape(row[number]) for number in [*range(num_names), *group]))
        with _work_goes_on(sys.stdout):
            _Screen(width=width).print(table)


def _table_width() -> int:
    """Columns of the terminal. A file or a pipe has no width."""
    return Console().width if sys.stdout.isatty() else _UNLIMITED


def _spread(
    columns: Sequence[str], cells: Sequence[Sequence[str]], num_names: int, width: int
) -> tuple[int, list[list[int]]]:
    """The width of the first column, and the numbers of the other columns in each of the tables."""
    frame = 3  # a line and two spaces for each column
    widths = [
        max(_cells_width(number, cells), *(cell_len(word) for word in heading.split() or [""]))
        for number, heading in enumerate(columns)
    ]
    others = list(range(num_names, len(columns)))
    room = width - 1 - sum(widths[number] + frame for number in range(1, len(columns))) - frame
    least = min(widths[0], max(_LEAST_NAME, width // 3))
    if room >= least:
        return min(widths[0], room), [others]
    groups: list[list[int]] = [[]]
    fixed = width - 1 - (least + frame) - sum(widths[number] + frame for number in range(1, num_names))
    left = fixed
    for number in others:
        if groups[-1] and left < widths[number] + frame:
            groups.append([])
            left = fixed
        groups[-1].append(number)
        left -= widths[number] + frame
    return least, groups


def _cells_width(column: int, cells: Sequence[Sequence[str]]) -> int:
    return max((cell_len(row[column]) for row in cells), default=0)


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
    """Prints a line of progress on stderr; on a terminal it goes above the bar."""
    if not is_main():
        return
    if sys.stderr.isatty():
        with _work_goes_on(sys.stderr):
            _STDERR.print(visible(message), markup=False)
    else:
        _print(visible(message), sys.stderr)


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
            _print(f"{visible(what)}: {count}/{total}, {count / (now - start):.1f}/s", sys.stderr)


def run_command(command: Callable[[], int]) -> None:
    """Runs a command's main function and exits with its code.

    A user's mistake exits with 2 and a failure while running with 1; each prints one line on stderr. Ctrl-C exits with
    130. An error of the operating system names the file or folder and says what to do.
    """
    hangs = False
    raise_limit_of_open_files()
    try:
        code = command()
    except UserError as error:
        # Every process of a node sees the same files and settings, so one line is enough. But processes find a refused
        # claim at different times, and the launcher ends all others when the first one ends. So each of them prints it.
        if is_first_on_node() or isinstance(error, ClaimError):
            warn(_one_line(error))
        code = 2
    except RunError as error:
        warn(f"rank {rank()}: {_one_line(error)}" if world_size() > 1 else _one_line(error))
        code, hangs = 1, isinstance(error, SilentLoaderError)
    except OSError as error:
        if error.errno is None:  # not from the operating system: a fault of ours, which needs its traceback
            raise
        warn(explain_system_error(error))
        code = 1 if error.errno in _FAILURES else 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _is_full_gpu(error)):
            raise
        warn(
            f"too little memory is free ({first_line(error)}); end other programs that use it, or take smaller batches"
        )
        code = 1
    except KeyboardInterrupt:
        warn("interrupted")
        code = 130
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _print_to_nobody(sys.stdout)
    except OSError as error:
        warn(f"not all of the output was written: {explain_system_error(error)}")
        _print_to_nobody(sys.stdout)
        code = code or 1
    with _work_goes_on(sys.stderr):
        sys.stderr.flush()
    if code == 1 and (world_size() > 1 or hangs):
        # A normal exit would wait for lost processes, for minutes if the network is down, and for ever if the disk is.
        os._exit(code)
    sys.exit(code)


_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE}
_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of the process or the machine, whatever the file
_REMEDIES = {
    errno.ENOSPC: "make room there and start again",
    errno.EDQUOT: "make room within your quota and start again",
    errno.EPIPE: "a process that this one talked to has ended; start again",
    errno.EIO: "the disk may be failing: copy what is there to another one",
    errno.EACCES: "check its permissions, or name another place",
    errno.EPERM: "check its permissions, or name another place",
    errno.EROFS: "name a place on a file system that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "name another place, or move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files, as with ulimit -n 1024, and start again",
    errno.ENFILE: "the machine has too many open files: end other programs, or raise fs.file-max",
    errno.ENOMEM: "the memory is full: end other programs, or take smaller batches",
}


def _is_full_gpu(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # not imported here: some commands start without it
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def raise_limit_of_open_files() -> None:
    """Lets this process and its workers open as many files as the system allows, up to a bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explain_system_error(error: OSError) -> str:
    """One line: the file or folder, what the system said of it, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path and its file system")
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return f"{place}{(error.strerror or str(error)).lower()}; {remedy}"


def _one_line(error: Exception) -> str:
    """The error's message. PyTorch reports a loader worker's error as a whole traceback; we take its last line.

    Where a file could not be opened because the process has too many open, nothing is wrong with the file, and what the
    message advises for it would not help.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _LIMITS:
            return explain_system_error(cause)
        cause = cause.__cause__ or cause.__context__
    message = (str(error.args[0]) if error.args else "").strip() or type(error).__name__
    if not message.startswith("Caught "):
        return message
    _traceback, name, own = message.rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
    return own if name else message.splitlines()[-1].strip()
