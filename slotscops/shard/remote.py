"""Shards behind a URL: each file is fetched once per node into a bounded cache, checked by sha256 and read there.

All URLs that fsspec opens will do: `https://`, `s3://`, `gs://`, ... `SLOTSCOPS_CACHE` names the cache's folder, which
should lie on a local disk of the node (default: ~/.cache/slotscops). `SLOTSCOPS_CACHE_GB` bounds its size (default:
100). All processes of the node and all data sets share it. Above the bound, the least recently opened file is removed.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout

from slotscops.core import console
from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import fsync, sha256_of_file, write_bytes

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try; starts again after data has arrived
_MOST_AT_ONCE, _LEAST_AT_ONCE = 8 << 20, 64 << 10  # bytes of one request; halved when a transfer breaks
_CONNECT_SECONDS, _SILENCE_SECONDS = 15, 30  # after so many silent seconds the request is tried again
_WAIT_FOR_ROOM = 0.2  # seconds
_EVICTED_SHARE = 0.05  # of a full cache; with less, the files are looked at more often
_AT_A_TIME = 8  # parallel transfers of one process


def is_remote(shards: str | Path) -> bool:
    """Whether the shards are given by a URL."""
    return "://" in str(shards)


def shards_argument(text: str) -> str | Path:
    """A command's `--shards`: a URL stays as it is typed."""
    return text if is_remote(text) else Path(text)


def check_local(shards: str | Path) -> Path:
    """A folder to write to. Raises UserError if it is a URL."""
    if is_remote(shards):
        raise UserError(f"{shards}: shards and features are written to a folder; write them there, then upload it")
    return Path(shards)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL and its copy in the cache, which has the same layout. It is pickled to worker processes."""

    url: str
    cache: Path
    max_bytes: int  # of the whole cache

    @staticmethod
    def of(url: str) -> "RemoteFolder":
        """Raises UserError if the cache settings in the environment are invalid."""
        cache = Path(os.environ.get("SLOTSCOPS_CACHE") or Path.home() / ".cache" / "slotscops")
        gigabytes = os.environ.get("SLOTSCOPS_CACHE_GB") or "100"
        try:
            max_bytes = int(float(gigabytes) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = 0
        if max_bytes <= 0:
            raise UserError(f"SLOTSCOPS_CACHE_GB is '{gigabytes}', needed a number of gigabytes above 0")
        return RemoteFolder(url.rstrip("/"), cache.absolute(), max_bytes)

    @property
    def copy(self) -> Path:
        """Folder of the local copies of the files."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.url.split("://", 1)[1].rpartition("@")[2])[-60:].strip("-")
        return self.cache / f"{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    def fetch_anew(self, name: str) -> Path:
        """Fetches a small file that may have changed, such as `index/dataset.json`. It is never evicted.

        Raises:
            FileNotFoundError: the server has none.
            RunError: as `opened`.
        """
        content = self._read_whole(name)
        target = self.copy / name
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
        target = self.copy / name
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(_lock_of(target))
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
        missing = [file for file in wanted if not (self.copy / file[0]).is_file()]
        if len(missing) < 2 or sum(num_bytes for _, _, num_bytes in missing) > self.max_bytes / 2:
            return  # the files would evict each other
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(self._fetch_one, missing))

    def _fetch_one(self, file: tuple[str, str, int]) -> None:
        with self.opened(*file):
            pass

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _fetch(self, name: str, target: Path, sha256: str, num_bytes: int | None) -> None:
        content = self._read_whole(name) if num_bytes is None else b""
        num_bytes = num_bytes or len(content)
        if num_bytes > self.max_bytes:
            raise UserError(
                f"{self.url_of(name)}: has {num_bytes / 1e9:.3g} GB, the cache at most {self.max_bytes / 1e9:.3g}; set "
                "SLOTSCOPS_CACHE_GB to more, best to more than the whole data set"
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
        files, path = self._connect(name)
        patience = _Patience(self.url_of(name))
        while True:
            try:
                return bytes(files.cat_file(path))
            except Exception as error:  # each file system raises its own kinds of errors
                patience.try_again_after(error)

    def _transfer(self, name: str, partial: Path, num_bytes: int) -> None:
        """Appends the missing bytes to the partial file."""
        files, path = self._connect(name)
        patience, at_once = _Patience(self.url_of(name)), _MOST_AT_ONCE
        have = partial.stat().st_size
        while have < num_bytes:
            end = min(have + at_once, num_bytes)
            try:
                content = files.cat_file(path, start=have, end=end)
                if len(content) == num_bytes:  # the server does not support ranges
                    have = 0
                elif len(content) != end - have:
                    raise ConnectionError(f"{len(content)} bytes came, asked for {end - have}")
            except Exception as error:
                at_once = max(at_once // 2, _LEAST_AT_ONCE)
                patience.try_again_after(error)
                continue
            with self._writing(), partial.open("r+b") as file:
                file.seek(have)
                file.write(content)
            have += len(content)
            patience = _Patience(self.url_of(name))

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

    def _connect(self, name: str) -> tuple[Any, str]:
        """The file system and the file's path in it."""
        protocol = self.url.split("://", 1)[0]
        try:
            return fsspec.core.url_to_fs(self.url_of(name), **_patient_options(protocol))  # type: ignore[no-any-return]
        except ImportError as error:
            raise UserError(
                f"{self.url}: {first_line(error)}; pip install 'slotscops[remote]', or fsspec's package for {protocol}"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.url}: {first_line(error)}; give a folder, https:// or s3://") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.cache}: the cache of remote shards cannot be written ({error.strerror or first_line(error)}); "
                "set SLOTSCOPS_CACHE to a folder with room"
            ) from None


class _Patience:
    """Retries temporary errors, each time after a longer pause, and gives up with a one-line error."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pauses = iter(_PAUSES)

    def try_again_after(self, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self._url}: is not there") from None
        what = f"{type(error).__name__}: {first_line(error)}"
        if not _may_pass(error):
            raise RunError(f"{self._url}: cannot be fetched ({what}); check the URL and your credentials") from None
        pause = next(self._pauses, None)
        if pause is None:
            raise RunError(
                f"{self._url}: cannot be fetched, tried {len(_PAUSES) + 1} times over {sum(_PAUSES):g} s ({what}); "
                "see to the network or the server and start again, what came is kept"
            ) from None
        console.warn(f"{self._url}: {what}; trying again in {pause:g} s")
        time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)  # timeout, too many requests
    # botocore raises a different class for each kind of credentials error.
    return not isinstance(error, PermissionError | ValueError) and "Credential" not in type(error).__name__


def _patient_options(protocol: str) -> dict[str, Any]:
    """The options of each file system that turn a silent server into an error."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if protocol == "s3":
        return {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS}}
    return {}


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


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
    lock = FileLock(_lock_of(path.with_name(name)), timeout=0)
    try:
        with lock:
            path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True
