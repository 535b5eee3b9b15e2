"""One process at a time owns a run's folder, so that two runs never write into each other's checkpoints."""

import errno
import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from slotscops.core import console
from slotscops.core.errors import UserError
from slotscops.core.files import write_json

_LOCK, _FACTS = ".owner.lock", "owner.json"
_HELD_BY_ANOTHER = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_held: dict[Path, int] = {}  # locked files of this process, by the folder's real path


def take_ownership(folder: Path) -> None:
    """Makes this process the owner of a run's folder until it ends, however it ends.

    The system releases the lock of a process that is killed, so no lock outlives its owner; on a network file system it
    also holds between nodes. `owner.json` says who owns the folder; another start quotes it in its error. On a
    file system without locks, a warning takes their place.

    Raises:
        UserError: if another process owns the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder.resolve()
        if place in _held:
            return
        # filelock would not say whether another process holds the lock or the file system has no locks.
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as refusal:
            os.close(file)
            if refusal.errno in _HELD_BY_ANOTHER:
                raise UserError(
                    f"{folder}: {_describe_owner(folder)} trains there; wait for its end, stop it, or choose another "
                    "folder with run_dir=DIR"
                ) from None
            if refusal.errno not in _NO_LOCKS:
                raise
            console.warn(
                f"{folder}: its file system has no locks ({refusal.strerror}); make sure that nothing else trains there"
            )
            return
        _held[place] = file
        since = datetime.now(UTC).isoformat("T", "seconds")
        write_json(folder / _FACTS, {"host": socket.gethostname(), "process": os.getpid(), "since": since})
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder with run_dir=DIR"
        ) from None


def release_ownership(folder: Path) -> None:
    """The inverse of `take_ownership`; does nothing if this process is not the owner."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        with suppress(OSError):
            (folder / _FACTS).unlink(missing_ok=True)
        os.close(file)  # which releases the lock


def _describe_owner(folder: Path) -> str:
    try:
        facts = json.loads((folder / _FACTS).read_text())
        return f"process {facts['process']} on {facts['host']}, started {facts['since']},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not written yet, or damaged
        return "another process"
