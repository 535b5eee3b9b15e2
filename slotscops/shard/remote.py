"""Shards behind a URL: each file is fetched once per node into a bounded cache, checked by sha256 and read there.

URLs that fsspec opens will do: `https://`, `s3://`, `gs://`, ..., but not `ftp://` and archives such as `zip://`.
`SLOTSCOPS_CACHE` names the cache's folder, which should lie on a local disk of the node (default: ~/.cache/slotscops).
`SLOTSCOPS_CACHE_GB` bounds its size (default: 100). All processes of the node and all data sets share it. Above the
bound, the least recently opened file is removed.

A server is not trusted: no more is read of a file than the index says it has, or than an index can honestly have, and
nothing is written outside the folder of the copies.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from slotscops.core.address import Address
from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import fsync, is_plain_name, sha256_of_file, write_bytes
from slotscops.core.transfer import (
    LEAST_AT_ONCE,
    MOST_AT_ONCE,
    Patience,
    Source,
    cache_folder,
    check_locks,
    connect,
    lock_of,
    saying_that_it_waits,
)

_PAGE_STARTS = (b"<!doctype html", b"<html")
_WAIT_FOR_ROOM = 0.2  # seconds
_EVICTED_SHARE = 0.05  # of a full cache; with less, the files are looked at more often
_AT_A_TIME = 8  # parallel transfers of one process
# Of dataset.json, a manifest or a shard's index. A row of dataset.json has 300 bytes, a sample in an index about 150.
_MAX_INDEX_BYTES = 256_000_000
_Shards = str | Path | Address


def is_remote(shards: _Shards) -> bool:
    """Whether the shards are given by a URL."""
    return Address(shards).is_remote


def shards_argument(text: str) -> Path | Address:
    """A command's `--shards`: a URL stays as it is typed."""
    return Address(text) if is_remote(text) else Path(text)


def check_local(shards: _Shards) -> Path:
    """A folder to write to. Raises UserError if it is a URL."""
    address = Address(shards)
    if address.is_remote:
        raise UserError(f"{address}: shards and features are written to a folder; write them there, then upload it")
    return Path(address.reveal())


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL and its copy in the cache, which has the same layout. It is pickled to worker processes."""

    url: Address
    cache: Path
    max_bytes: int  # of the whole cache

    @staticmethod
    def of(url: str | Address) -> "RemoteFolder":
        """Raises UserError if the address lacks its secret, or the cache settings in the environment are invalid."""
        address = Address(url)
        if address.lost_secret:
            raise UserError(
                f"{address}: was stored without its password or signed query, as always; give the whole address again "
                "with data.shards=URL in training, --shards URL in other commands"
            )
        gigabytes = os.environ.get("SLOTSCOPS_CACHE_GB") or "100"
        try:
            max_bytes = int(float(gigabytes) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = 0
        if max_bytes <= 0:
            raise UserError(f"SLOTSCOPS_CACHE_GB is '{gigabytes}', needed a number of gigabytes above 0")
        return RemoteFolder(address, cache_folder(), max_bytes)

    @property
    def copy(self) -> Path:
        """Folder of the local copies of the files."""
        identity = self.url.identity().rstrip("/")
        readable = re.sub(r"[^A-Za-z0-9]+", "-", re.split("[?#]", identity.split("://", 1)[1])[0])[-60:].strip("-")
        return self.cache / f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def copy_of(self, name: str) -> Path:
        """The local copy of a file by its path in the folder, of which each component is a plain name.

        Raises:
            UserError: a component is not, and might lead out of the folder.
        """
        if not all(is_plain_name(component) for component in name.split("/")):
            raise UserError(f"{self.url}: '{name}' is no name of a file of a data set; nothing is fetched")
        return self.copy / name

    def fetch_anew(self, name: str) -> Path:
        """Fetches a small file that may have changed, such as `index/dataset.json`. It is never evicted.

        Raises:
            FileNotFoundError: the server has none.
            RunError: as `opened`.
        """
        target = self.copy_of(name)
        content = self._read_whole(name)
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, content)
        return target

    @contextmanager
    def opened(self, name: str, sha256: str, num_bytes: int | None = None) -> Iterator[Path]:
        """The local copy of a file, fetched if necessary. It stays there in the body; open files stay valid.

        Args:
            num_bytes: size of the file; if it is unknown, the file is fetched in one request.

        Raises:
            RunError: it cannot be fetched after several tries, or its sha256 is wrong.
            UserError: the cache cannot hold it or cannot be written.
        """
        target = self.copy_of(name)
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            check_locks(self.cache)
            lock = FileLock(lock_of(target))
            lock.acquire()  # other processes that want this file wait for it here
        try:
            if not target.is_file() or num_bytes not in (None, target.stat().st_size):
                try:
                    self._fetch(name, target, sha256, num_bytes)
                except FileNotFoundError as error:
                    raise RunError(f"{error}; upload the shards again") from None
            os.utime(target)  # the most recently opened file is evicted last
            yield target
        finally:
            lock.release()

    def fetch_together(self, wanted: list[tuple[str, str, int]]) -> None:
        """Fetches all missing files, each given as in `opened`, several at a time."""
        missing = [file for file in wanted if not self.copy_of(file[0]).is_file()]
        if len(missing) < 2 or sum(num_bytes for _, _, num_bytes in missing) > self.max_bytes / 2:
            return  # the files would evict each other
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(self._fetch_one, missing))

    def _fetch_one(self, file: tuple[str, str, int]) -> None:
        with self.opened(*file):
            pass

    def url_of(self, name: str) -> Address:
        return self.url.file(name)

    def _fetch(self, name: str, target: Path, sha256: str, num_bytes: int | None) -> None:
        content = self._read_whole(name) if num_bytes is None else b""
        num_bytes = num_bytes or len(content)
        if num_bytes > self.max_bytes:
            raise UserError(
                f"{self.url_of(name)}: has {num_bytes / 1e9:.3g} GB, but the cache holds at most "
                f"{self.max_bytes / 1e9:.3g}; set SLOTSCOPS_CACHE_GB to more than the whole data set has"
            )
        # Its name holds the size that the file will have when complete.
        partial = target.with_name(f".{target.name}.{num_bytes}.partial")
        came = ""
        for _ in range(2):  # resuming a broken transfer may have joined two versions of the file
            self._make_room(partial, num_bytes)
            if content:
                partial.write_bytes(content)
            self._transfer(name, partial, num_bytes)
            came = sha256_of_file(partial)
            if came == sha256:
                with self._writing():
                    fsync(partial)
                    partial.replace(target)
                return
            partial.unlink()
            content = b""
        raise RunError(
            f"{self.url_of(name)}: came twice with sha256 {came[:12]}, needed {sha256[:12]}; upload the shards again"
        )

    def _read_whole(self, name: str) -> bytes:
        """A file of which only the greatest honest size is known."""
        source = self._connect(name)
        patience = Patience(self.url_of(name))
        while True:
            pieces: list[bytes] = []
            try:
                with saying_that_it_waits(self.url_of(name)):
                    source.read(0, _MAX_INDEX_BYTES + 1, partial(_append, pieces))
                break
            except Exception as error:  # each file system raises its own kinds of errors
                patience.try_again_after(error)
        content = b"".join(pieces)
        if len(content) > _MAX_INDEX_BYTES:
            raise RunError(
                f"{self.url_of(name)}: has more than {_MAX_INDEX_BYTES:,} bytes, as no index has; check the URL"
            )
        if content[:200].lstrip().lower().startswith(_PAGE_STARTS):
            raise UserError(
                f"{self.url_of(name)}: a web page came, perhaps to log in, needed the file; give an address that opens "
                "without a login, such as a signed one, or download the folder and give its path"
            )
        return content

    def _transfer(self, name: str, target: Path, num_bytes: int) -> None:
        """Appends the missing bytes to the partial file, and not one more."""
        source = self._connect(name)
        patience, at_once = Patience(self.url_of(name)), MOST_AT_ONCE

        def write(start: int, piece: bytes) -> None:
            with self._writing():
                file.seek(start)
                file.write(piece[: num_bytes - start])

        while (have := min(target.stat().st_size, num_bytes)) < num_bytes:
            end = min(have + at_once, num_bytes)
            try:
                with target.open("r+b") as file, saying_that_it_waits(self.url_of(name)):
                    source.read(have, end, write, num_bytes)
                if (came := target.stat().st_size) < end:
                    raise ConnectionError(f"{max(came - have, 0)} bytes came, asked for {end - have}")
            except UserError:  # of the cache
                raise
            except Exception as error:
                at_once = max(at_once // 2, LEAST_AT_ONCE)
                patience.try_again_after(error)
                continue
            patience = Patience(self.url_of(name))

    def _make_room(self, partial: Path, num_bytes: int) -> None:
        """Evicts until a file of `num_bytes` fits, and reserves its space; waits while all other files are in use.

        All processes of the node wait for the lock meanwhile, and looking at 20,000 files takes a second. So the size
        of the cache is noted, and when it is full, a share of it is evicted at once.
        """
        noted = self.cache / ".bytes"  # an upper bound: a file that is fetched twice counts twice
        while True:
            with self._writing(), FileLock(self.cache / ".room.lock"):
                held = _read_number(noted)
                if held is None or held + num_bytes > self.max_bytes:
                    files = sorted(_files_of(self.cache, except_for=partial))
                    held = sum(size for _, size, _ in files)
                    if held + num_bytes > self.max_bytes:
                        held -= _evict_oldest(files, held + num_bytes - (1 - _EVICTED_SHARE) * self.max_bytes)
                if held + num_bytes <= self.max_bytes:
                    partial.touch()
                    write_bytes(noted, str(held + num_bytes).encode(), durable=False)
                    return
            time.sleep(_WAIT_FOR_ROOM)

    def _connect(self, name: str) -> Source:
        return connect(self.url_of(name), self.url, "unpack the shards to a folder and give its path")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.cache}: the cache of remote shards cannot be written ({error.strerror or first_line(error)}); "
                "set SLOTSCOPS_CACHE to a folder with room"
            ) from None


def _append(pieces: list[bytes], start: int, piece: bytes) -> None:
    pieces.append(piece)


def _files_of(cache: Path, except_for: Path) -> Iterator[tuple[float, int, Path]]:
    """Time last opened, bytes and path of each file that may be evicted. A partial file counts with its full size."""
    for folder, _, names in os.walk(cache):
        for name in names:
            path = Path(folder, name)
            partial = _PARTIAL.fullmatch(name)
            if name.endswith(".json") or path == except_for or (name.startswith(".") and not partial):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed meanwhile; it is counted under its new name or not at all
                continue
            yield status.st_mtime, int(partial[1]) if partial else status.st_size, path


_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _evict_oldest(files: list[tuple[float, int, Path]], num_bytes: float) -> int:
    """Removes the least recently opened files until so many bytes are free. Returns how many are."""
    freed = 0
    for _, size, path in files:
        if freed < num_bytes and _evict(path):
            freed += size
    return freed


def _evict(path: Path) -> bool:
    """Removes a file unless a process is opening or fetching it; returns whether it was removed."""
    name = path.name[1:].rsplit(".", 2)[0] if _PARTIAL.fullmatch(path.name) else path.name
    lock = FileLock(lock_of(path.with_name(name)), timeout=0)
    try:
        with lock:
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True
