"""Tar archives read in place: their members are found once and then read by offset, by any number of processes.

Nothing is ever unpacked to files of its own, so no member's name can reach outside. A `.tar.gz` cannot be read by
offset: it is first unpacked, whole, to one plain tar.
"""

import fcntl
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import lock_refusal, replace_when_complete

_MAX_UNPACKED_BYTES = 32 << 30  # PASCAL-Part's archive has less than 1 GB; more is a decompression bomb
_MAX_MEMBER_BYTES = 500_000_000  # a photo of 100 million pixels that is not compressed has 300 MB
_MAX_MEMBERS = 1_000_000  # VOC2010 has some 45,000
_MAX_HEADER_BYTES = 256 << 10  # of what extends a member's header: a long name, or attributes of at most 64 KB on Linux
_MAX_GLOBAL_FIELDS = 100  # of headers that hold for all members
_MAX_NAME = 4096  # characters of a member's name, as long as a path on Linux
_COPY_BYTES = 1 << 20
_FETCH = "fetch the archive again"


class Place(Protocol):
    """Where files of one kind lie, asked for by name: a folder or a part of an archive."""

    def names(self) -> list[str]:
        """All files here, sorted."""

    def path(self, name: str) -> Path:
        """The path by which messages name the file."""

    def open(self, name: str) -> BinaryIO:
        """Opens the file. Raises UserError if there is none or it may not be read."""


def spellings(name: str) -> list[str]:
    """The name itself, then the same name with its ending as other programs write it: `.JPG`, `.jpeg`, `.MAT`."""
    stem, dot, ending = name.rpartition(".")
    others = ("JPG", "jpeg", "JPEG") if ending == "jpg" else (ending.upper(),)
    return [name, *(f"{stem}{dot}{other}" for other in others)]


@dataclass(frozen=True)
class FolderPlace:
    """Files in a folder."""

    folder: Path

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def path(self, name: str) -> Path:
        return self.folder / name

    def open(self, name: str) -> BinaryIO:
        path = self.path(name)
        try:
            found = next(filter(Path.is_file, map(self.path, spellings(name))), None)
            if found is not None:  # neither a folder nor a pipe, which would never end
                return found.open("rb")
            raise UserError(f"{path}: no such file; fetch it again")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class ArchivePlace:
    """Files of one folder inside an archive, at any depth."""

    archive: Path  # as the user calls it
    plain: Path  # the tar to read: the archive itself, or what was unpacked of it
    folder: str  # last names of the folder, such as ImageSets/Main

    def names(self) -> list[str]:
        return sorted(self._members())

    def path(self, name: str) -> Path:
        return self.archive / self.folder / name

    def open(self, name: str) -> BinaryIO:
        members = self._members()
        place = next((members[spelling] for spelling in spellings(name) if spelling in members), None)
        if place is None:
            raise UserError(f"{self.path(name)}: no such file; {_FETCH}")
        offset, size = place
        if size > _MAX_MEMBER_BYTES:
            raise UserError(f"{self.path(name)}: has {size:,} bytes; at most {_MAX_MEMBER_BYTES:,} are read")
        try:
            with self.plain.open("rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            # The archive is at fault, not the photo. A process that left it out would make other shards than the rest.
            raise RunError(f"{self.plain}: cannot be read any more ({error.strerror}); start again") from None
        if len(content) != size:
            raise RunError(f"{self.plain}: has become shorter while it was read; start again")
        return io.BytesIO(content)

    def _members(self) -> dict[str, tuple[int, int]]:
        return _members_by_folder(self.plain, self.archive).get(self.folder, {})


class _BoundedHeader(tarfile.TarInfo):
    """A member's header with extensions of bounded size: tarfile reads an extension whole, however large it says it is.

    tarfile's own comments name `_proc_member` as the method that subclasses may override.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:  # tarfile would go back, and read the same members again without end
            raise tarfile.ReadError(f"a member of {self.size:,} bytes")
        extensions = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if self.type in (*extensions, tarfile.SOLARIS_XHDTYPE) and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, needed at most {_MAX_HEADER_BYTES:,}")
        if len(archive.pax_headers) > _MAX_GLOBAL_FIELDS:
            raise tarfile.ReadError(f"more than {_MAX_GLOBAL_FIELDS} global header fields")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a sparse file; pack the archive without tar's --sparse")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]


@lru_cache(maxsize=8)  # once a process: 40,000 members take a second
def _members_by_folder(plain: Path, archive: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Folder -> file name -> (offset, size) of each regular file.

    Each folder is listed twice: under its last name and under its last two names, such as `Main` and `ImageSets/Main`.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        # Only headers are read.
        with tarfile.open(plain, "r:", tarinfo=_BoundedHeader) as tar:
            for member in _members_of(tar):
                *folders, name = member.name.removeprefix("./").split("/")
                if not member.isreg() or member.issparse() or ".." in folders or member.name.startswith("/"):
                    continue
                for folder in dict.fromkeys(["/".join(folders[-1:]), "/".join(folders[-2:])]):
                    if name in found.setdefault(folder, {}):
                        raise UserError(f"{archive}: holds two files {folder}/{name}; {_FETCH}")
                    found[folder][name] = (member.offset_data, member.size)
            _check_end(plain, tar.offset)
    except (OSError, tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive}: is no readable tar ({first_line(error)}); {_FETCH}") from None
    return found


def _members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one by one; tarfile itself would keep them all."""
    count = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        count += 1
        if count > _MAX_MEMBERS or len(member.name) > _MAX_NAME:
            limits = f"at most {_MAX_MEMBERS:,} with names of at most {_MAX_NAME:,} characters"
            raise tarfile.ReadError(f"too many members or too long a name, needed {limits}")
        yield member


def _check_end(plain: Path, offset: int) -> None:
    """Raises unless there is a block of zeros, the end of a tar. tarfile stops at damage too, without an error."""
    with plain.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {offset:,}")


# ---- compressed archives -----------------------------------------------------------------------------------------


def is_compressed(archive: Path) -> bool:
    try:
        with archive.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror})") from None


@contextmanager
def unpacked(archive: Path, scratch: Path) -> Iterator[Path]:
    """The archive as a plain tar below `scratch`, made by one process while others wait.

    The next process uses what a killed one left behind. The last process to finish removes the folder.

    Raises:
        UserError: the archive is damaged.
    """
    state = archive.stat()
    name = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    plain = scratch / f"{name}.tar"
    lock = _share(scratch, archive, plain)
    try:
        yield plain
    finally:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)
        except OSError:
            pass  # another process still reads there, and will remove it
        os.close(lock)


def _share(scratch: Path, archive: Path, plain: Path) -> int:
    """A shared lock on the folder that holds the finished plain tar."""
    while True:
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            _check_locks(scratch, archive)
            lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # removed by a process that ended just now
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_current(lock, scratch) and plain.is_file():
                return lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_current(lock, scratch) and not plain.is_file():
                for left in scratch.glob(".*.partial"):  # of processes that were killed: no other writes now
                    left.unlink()
                try:
                    _gunzip(archive, plain)
                except BaseException:
                    shutil.rmtree(scratch, ignore_errors=True)  # whoever waits for the lock starts anew
                    raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _check_locks(scratch: Path, archive: Path) -> None:
    if (refusal := lock_refusal(scratch)) is not None:
        raise UserError(
            f"{scratch}: {archive.name} is unpacked there, which needs a file system with locks ({refusal}); "
            "choose an --out on another one, or unpack the archive yourself and give its folder as --root"
        )


def _is_current(lock: int, scratch: Path) -> bool:
    try:
        return (scratch / "lock").stat().st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def _gunzip(archive: Path, plain: Path) -> None:
    written = 0
    try:
        with gzip.open(archive) as packed, replace_when_complete(plain) as file:
            while block := packed.read(_COPY_BYTES):
                written += len(block)
                if written > _MAX_UNPACKED_BYTES:
                    raise UserError(f"{archive}: unpacks to more than {_MAX_UNPACKED_BYTES >> 30} GiB; {_FETCH}")
                file.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: is damaged ({first_line(error)}); {_FETCH}") from None
    except OSError as error:
        raise RunError(f"{plain}: cannot be written ({error.strerror}); make room and start again") from None


def find_archives(root: Path) -> list[Path]:
    """Tars in the folder, or `root` itself where it is one, sorted."""
    pattern = re.compile(r".+\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
    candidates = [root] if root.is_file() else root.iterdir()
    return sorted(path for path in candidates if pattern.match(path.name) and path.is_file())
