"""Work that several processes share.

Each unit of work produces one file. The file appears whole or not at all, and its content does not depend on which
process writes it. A process begins with its own share of the units and goes on with all that nobody has begun. While it
does a unit it holds a lease, so that no unit is done twice; if it dies, the others do its unit.

A claim in the folder says what the work is. Of several starts with different settings, one makes the claim and the
others are refused; starts with the same settings share the work.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slotscops.core import console
from slotscops.core.errors import ClaimError
from slotscops.core.files import has_ended, read_bytes, write_once, writer_name

_SHORT = 100  # characters; longer pairs of values are not printed in the message
_BEAT_S = 20.0  # seconds between two signs of life of a process that holds a lease
_SILENT_S = 600.0  # a lease of another machine without a sign of life for so long has no owner any more
_POLL_S = 0.2  # seconds between two looks at the units that others are doing
_WRITING_S = 1.0  # an empty claim may be one that is just being written, where the file system has no hard links


def leased_units(names: list[str], folder: Path, is_done: Callable[[int], bool], what: str = "") -> Iterator[int]:
    """Yields the units that this process is to do, until all are done, by this process or another one.

    While a process does a unit it holds a lease, the file `.NAME.lease` in the folder, and no other process begins the
    unit. In the end a process waits for the units of others. If an owner was killed, another process does its unit: at
    once if the owner ran on this machine, else after ten minutes.

    Args:
        names: the name of each unit.
        is_done: whether the file of a unit is there.
        what: name of the units for a display of progress, which counts those of all processes; empty for none.
    """
    units = _finished_units(names, folder, is_done)
    for unit, is_mine in console.track(units, len(names), what) if what else units:
        if is_mine:
            yield unit


def _finished_units(names: list[str], folder: Path, is_done: Callable[[int], bool]) -> Iterator[tuple[int, bool]]:
    """Every unit once, and whether this process is to do it now. Other units are done when they are yielded."""
    first = console.rank() * len(names) // console.world_size()  # so that processes begin at different places
    left = [*range(first, len(names)), *range(first)]
    while left:
        of_others = []
        for unit in left:
            if is_done(unit):
                yield unit, False
                continue
            with _lease(folder / f".{names[unit]}.lease") as is_mine:
                if not is_mine:
                    of_others.append(unit)
                else:  # looked at again: it may have been finished before the lease was taken
                    yield unit, not is_done(unit)
        left = of_others
        if left:
            time.sleep(_POLL_S)


def remove_leases(folder: Path) -> None:
    """Removes the leases of processes that were killed just before they gave them back. No unit may be left to do."""
    for pattern in (".*.lease", ".*.taking"):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


@contextmanager
def _lease(path: Path) -> Iterator[bool]:
    """Holds a lease while the body runs. Yields whether this process got it."""
    if not write_once(path, writer_name().encode()) and not _take_over(path):
        yield False
        return
    stop = threading.Event()

    def show_life() -> None:
        while not stop.wait(_BEAT_S):
            with suppress(OSError):  # given back, or on a disk that cannot be written any more
                path.touch()

    beating = threading.Thread(target=show_life, daemon=True)
    beating.start()
    try:
        yield True
    finally:
        stop.set()
        beating.join()
        path.unlink(missing_ok=True)


def _take_over(path: Path) -> bool:
    """Takes a lease whose owner was killed. Of several processes that try it at once, one gets it.

    The file `.NAME.taking` keeps the others out between the look at the lease and its removal. Without it, a process
    that looked before could remove the new lease of the one that has just taken over.
    """
    with suppress(FileNotFoundError):  # its owner has just given it back; it is looked at again later
        if not _is_left(path):
            return False
        taking = path.with_suffix(".taking")
        if not write_once(taking, writer_name().encode()):
            if _is_left(taking):
                taking.unlink()
            return False
        try:
            if not _is_left(path):  # another process was faster
                return False
            path.unlink()
            return write_once(path, writer_name().encode())
        finally:
            taking.unlink(missing_ok=True)
    return False


def _is_left(path: Path) -> bool:
    """Whether the process that wrote the file has ended, or has given no sign of life for ten minutes."""
    return has_ended(path.read_text(), time.time() - path.stat().st_mtime > _SILENT_S)


def claim(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Records in `path` what its folder will hold. Of several processes, the first one decides.

    Args:
        remedy: what the user can do about the error; it ends the message.

    Raises:
        ClaimError: the folder was made with other settings, or the claim is damaged.
    """
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    if not path.exists() and write_once(path, text.encode()):
        return
    try:
        present = dict(json.loads(_read_claim(path)))
    except (ValueError, TypeError, RecursionError):
        raise ClaimError(f"{path}: is damaged; {remedy}") from None
    for name in differences(present, content):
        before: Any = present
        now: Any = content
        for step in name.split("."):
            before, now = ((found or {}).get(step) for found in (before, now))
        values = f"({before}, now {now})" if len(f"{before}{now}") < _SHORT else "(too long to print)"
        raise ClaimError(f"{path.parent}: was made with another {name.removeprefix('settings.')} {values}; {remedy}")


def _read_claim(path: Path) -> str:
    ends = time.monotonic() + _WRITING_S
    while not (text := read_bytes(path).decode()) and time.monotonic() < ends:
        time.sleep(0.05)
    return text


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two nested mappings differ."""
    names: list[str] = []
    for name in sorted(set(first) | set(second)):
        mine, other = first.get(name), second.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            names += differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            names.append(f"{prefix}{name}")
    return names
