"""Files that appear whole or not at all, and their hashes."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# One component of a path, of letters that every file system takes: it is neither "..", nor hidden, nor a path.
PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
_OWNED = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)\.[^.]*\.partial")  # a temporary file's machine and process
_ABANDONED_S = 24 * 3600  # a temporary file of another machine counts as abandoned when it is this old
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EBADF, errno.EISDIR}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextmanager
def replace_when_complete(
    path: Path, durable: bool = True, place: Callable[[Path, Path], None] = os.replace
) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which is renamed to `path` if the body ends without error.

    The temporary name starts with a dot, names the process that writes it, and ends in `.partial`. It is removed when
    the body raises; `remove_abandoned` removes those of processes that were killed.

    Args:
        durable: the file survives a power cut after this returns. Without it, many small files are written faster.
        place: gives the temporary file (first argument) its final name (second).
    """
    # The name is cut so that the temporary name stays legal: 40 characters are at most 160 bytes of UTF-8.
    prefix = f".{path.name[:40]}.{writer_name()}."
    try:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".partial", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # the user knows nothing of temporary names
        raise
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.chmod(0o666 & ~_current_umask())
        place(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk refuses a write without naming the file
        raise
    if durable:
        fsync(path.parent)


def why_not_writable(path: Path) -> str:
    """What keeps a file from being written there, and what to do, as far as can be seen before; else an empty text.

    For commands that work for long before they write their result.
    """
    if not path.parent.is_dir():
        return "no such folder; make it first"
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return "is a folder; give the name of a file"
    except FileNotFoundError:
        pass
    except OSError as error:  # such as a name that is too long
        return f"{(error.strerror or str(error)).lower()}; give another name"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return "its folder cannot be written; check its permissions, or name another place"
    return ""


def write_once(path: Path, content: bytes) -> bool:
    """Writes a file that must not be there yet. Of several processes that try it at once, exactly one succeeds.

    Returns:
        True if this process wrote the file, False if another process did.
    """
    try:
        with replace_when_complete(path, place=_place_new) as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _place_new(partial: Path, path: Path) -> None:
    """As os.replace, but raises FileExistsError if `path` is there already."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        # A network file system that sent its request twice finds its own link; then the file has two names.
        if partial.stat().st_nlink < 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("xb") as file:  # on a file system without hard links; readers may see it before it is whole
            file.write(partial.read_bytes())
    partial.unlink()


# ---- temporary files that a killed process left -------------------------------------------------------------------


def writer_name() -> str:
    """Names this process among all processes of all machines, for temporary names."""
    return f"{_machine_name()}-{os.getpid()}"


@functools.cache
def _machine_name() -> str:
    """8 hexadecimal digits. They differ between machines, starts of one machine, and containers on it."""
    facts = [socket.gethostname()]
    with suppress(OSError):  # not on Linux
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def remove_abandoned(*folders: Path) -> None:
    """Removes the temporary files and folders of processes that were killed while writing into these folders.

    Those of living processes stay. On this machine, we can see whether the process still runs. On another machine, it
    counts as living if it has written to the file within a day.
    """
    for folder in folders:
        for path in folder.glob(".*.partial"):
            with suppress(OSError):  # another process removes it too
                if is_abandoned(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_abandoned(partial: Path) -> bool:
    """Whether the process that made this temporary file or folder has ended, as its name and its age tell."""
    owner = _OWNED.fullmatch(partial.name)
    if owner and owner[1] == _machine_name() and not _is_running(int(owner[2])):
        return True
    return time.time() - partial.stat().st_mtime > _ABANDONED_S


def has_ended(writer: str, is_silent: bool) -> bool:
    """Whether the process of this `writer_name` has ended. Of another machine it has if it is silent."""
    machine, _, process = writer.partition("-")
    if machine == _machine_name() and process.isdigit():
        return not _is_running(int(process))
    return is_silent


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def is_plain_name(name: str) -> bool:
    """Whether a name from elsewhere can be a component of a path without leading anywhere else."""
    return re.fullmatch(PLAIN_NAME.strip("^$"), name) is not None


def fsync(path: Path) -> None:
    """Makes a file's content, or the renames inside a folder, survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC or not path.is_dir():  # folders of some network file systems
            raise


def lock_refusal(folder: Path) -> str | None:
    """What the system says where files in this folder cannot be locked; None where they can."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
    return None


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes a file that appears whole or not at all; see `replace_when_complete`."""
    with replace_when_complete(path, durable) as file:
        file.write(content)


def decode_text(content: bytes) -> str:
    """The text of a file that a person wrote: UTF-8, or UTF-16 where it begins with a byte order mark.

    The byte order mark, which some editors put first, is removed.

    Raises:
        UnicodeDecodeError: the content is neither.
    """
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if "\0" in text:  # UTF-16 or UTF-32 without its mark
        raise UnicodeDecodeError("utf-8", content, 0, 1, "holds zeros, as no text does")
    return text


def json_numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores with NaN replaced by None, because JSON has no NaN."""
    return {name: None if value != value else value for name, value in scores.items()}


def write_json(path: Path, content: Any) -> None:
    # Bytes of a file name that are not UTF-8 are lone surrogates in Python, which JSON holds only as escapes.
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_bytes(path: Path) -> bytes:
    """The content of a file. An error names the file, also if the file can be opened but its content cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_json_or_none(path: Path) -> Any:
    """The content of a file that one can do without; None if it is missing, cannot be read or is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def size_of_file(path: Path) -> int | None:
    """Bytes of a file, or None if there is no file. Raises OSError if it cannot be asked."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def sha256_of_file(path: Path) -> str:
    """Hex digest of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex digest of the content as JSON with sorted keys, so that equal content gives an equal digest."""
    digest = hashlib.sha256()
    for piece in _json_pieces(content):
        digest.update(piece.encode())
    return digest.hexdigest()


_FEW = 16


def _holds_others(content: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> bool:
    values = content.values() if isinstance(content, dict) else content
    return not all(isinstance(value, str | int | float | None) for value in values)


def _json_pieces(content: Any) -> Iterator[str]:
    """The text of `json.dumps(content, sort_keys=True)` in pieces, so that no large table is copied as a whole.

    Any mapping or sequence is taken apart, also one that makes its rows when they are asked for.
    """
    if isinstance(content, dict | list | tuple) and len(content) <= _FEW and not _holds_others(content):
        yield json.dumps(content, sort_keys=True)  # in C
        return
    if isinstance(content, Mapping) and all(isinstance(key, str) for key in content):
        yield "{"
        for number, key in enumerate(sorted(content)):
            yield f"{', ' if number else ''}{json.dumps(key)}: "
            yield from _json_pieces(content[key])
        yield "}"
    elif isinstance(content, Sequence) and not isinstance(content, str):
        yield "["
        for number, value in enumerate(content):
            yield ", " if number else ""
            yield from _json_pieces(value)
        yield "]"
    else:
        yield json.dumps(content, sort_keys=True)


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
