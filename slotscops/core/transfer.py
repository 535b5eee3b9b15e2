"""Reads byte ranges of files behind URLs, with patience: temporary errors are tried again, and waiting is reported.

URLs that fsspec opens will do: `https://`, `s3://`, `gs://`, ..., but not `ftp://` and archives such as `zip://`.
Shards and teacher weights are fetched with this. What was fetched lies below `SLOTSCOPS_CACHE` (default:
~/.cache/slotscops).
"""

import functools
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from slotscops.core import console
from slotscops.core.address import Address
from slotscops.core.errors import RunError, UserError, first_line
from slotscops.core.files import lock_refusal

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try; starts again after data has arrived
MOST_AT_ONCE, LEAST_AT_ONCE = 8 << 20, 64 << 10  # bytes of one request; halved when a transfer breaks
_CONNECT_SECONDS, _SILENCE_SECONDS = 15, 30  # after so many silent seconds the request is tried again
SAY_AFTER_S, _SAY_EVERY_S = 5.0, 30.0  # of waiting for one request
_NOT_SUPPORTED = {"ftp", "zip", "tar", "libarchive"}  # no ranges, or files inside of files
_PIECE_BYTES = 256 << 10  # read at once


def cache_folder() -> Path:
    """The folder of the copies of remote files."""
    return Path(os.environ.get("SLOTSCOPS_CACHE") or Path.home() / ".cache" / "slotscops").absolute()


def connect(address: Address, named: Address, instead: str) -> "Source":
    """A file behind a URL, not yet asked for.

    Args:
        named: what messages name, such as the folder of the file.
        instead: what the user can give where the URL is of no use; it ends a message.

    Raises:
        UserError: no such kind of URL, or its package is not installed.
        RunError: it cannot be reached.
    """
    protocol = address.reveal().split("://", 1)[0]
    if "::" in address.reveal().split("?")[0] or protocol in _NOT_SUPPORTED:
        raise UserError(f"{named}: {protocol}:// is not supported; {instead}, or its https://, s3:// or gs:// address")
    try:
        files, path = fsspec.core.url_to_fs(address.reveal(), **_patient_options(address))
    except ImportError as error:
        raise UserError(
            f"{named}: {first_line(error)}; pip install 'slotscops[remote]', or fsspec's package for {protocol}"
        ) from None
    except ValueError as error:
        raise UserError(f"{named}: {named.clean(first_line(error))}; give a path, https:// or s3://") from None
    except Exception as error:  # some file systems connect here
        reason = f"{type(error).__name__}: {named.clean(first_line(error))}"
        raise RunError(f"{named}: cannot be reached ({reason}); check the address and the network") from None
    return WebSource(files, path) if protocol in ("http", "https") else Source(files, path)


class Source:
    """A file of one of fsspec's file systems."""

    def __init__(self, files: Any, path: str) -> None:
        self._files, self._path = files, path

    def read(self, start: int, end: int, write: Callable[[int, bytes], None], whole_size: int | None = None) -> None:
        """Hands the bytes from `start` up to `end`, or to the end of the file, on to `write`, each with its position.

        Args:
            write: takes the position in the file, and the bytes there.
            whole_size: bytes of the whole file. A server that knows no ranges is read up to there, from the beginning.
        """
        content = bytes(self._files.cat_file(self._path, start=start, end=end))
        if whole_size is not None and len(content) == whole_size:
            start, end = 0, whole_size
        write(start, content[: end - start])


class WebSource(Source):
    """A file of a web server, read in pieces, so that a body without an end costs no memory."""

    def read(self, start: int, end: int, write: Callable[[int, bytes], None], whole_size: int | None = None) -> None:
        fsspec.asyn.sync(self._files.loop, self._read, start, end, write, whole_size)

    async def _read(
        self, start: int, end: int, write: Callable[[int, bytes], None], whole_size: int | None = None
    ) -> None:
        headers = {"Accept-Encoding": "identity"}
        if whole_size is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        session = await self._files.set_session()
        async with session.get(self._files.encode_url(self._path), headers=headers) as response:
            if response.status == 404:
                raise FileNotFoundError(self._path)
            response.raise_for_status()
            if whole_size is not None and response.status != 206:
                start, end = 0, whole_size
            decode = _decoder(response.headers.get("Content-Encoding", ""))
            async for coded in response.content.iter_chunked(_PIECE_BYTES):
                piece = decode(coded, end - start)[: end - start]
                write(start, piece)
                start += len(piece)
                if start == end:  # what the server sends beyond it is not read
                    response.close()
                    return


def _decoder(encoding: str) -> Callable[[bytes, int], bytes]:
    """Undoes a compression that was not asked for; the second argument bounds what comes out."""
    if encoding.lower() in ("", "identity"):
        return lambda piece, _: piece
    if encoding.lower() in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress  # knows both by their headers
    raise ValueError(f"sent with Content-Encoding {encoding}, asked for none")


@contextmanager
def saying_that_it_waits(url: Address) -> Iterator[None]:
    """Says so while the body takes long, so that a slow server is not taken for a hang."""
    ended = threading.Event()

    def tell() -> None:
        since, pause = time.monotonic(), SAY_AFTER_S
        while not ended.wait(pause):
            console.warn(f"{url}: waiting for the server, {time.monotonic() - since:.0f} s so far")
            pause = _SAY_EVERY_S

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Patience:
    """Retries temporary errors, each time after a longer pause, and gives up with a one-line error."""

    def __init__(self, url: Address) -> None:
        self._url = url
        self._pauses = iter(PAUSES)

    def try_again_after(self, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self._url}: is not there") from None
        what = f"{type(error).__name__}: {self._url.clean(first_line(error))}"
        if not _may_pass(error):
            raise RunError(f"{self._url}: cannot be fetched ({what}); check the URL and your credentials") from None
        pause = next(self._pauses, None)
        if pause is None:
            raise RunError(
                f"{self._url}: cannot be fetched, tried {len(PAUSES) + 1} times over {sum(PAUSES):g} s ({what}); "
                "check the network and the server, then start again: what has arrived is kept"
            ) from None
        console.warn(f"{self._url}: {what}; trying again in {pause:g} s")
        time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)  # timeout, too many requests
    # botocore raises a different class for each kind of credentials error.
    return not isinstance(error, PermissionError | ValueError) and "Credential" not in type(error).__name__


def _patient_options(address: Address) -> dict[str, Any]:
    """The options of each file system that turn a silent server into an error."""
    protocol, _, rest = address.reveal().partition("://")
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        # Bodies are decompressed in `_WebSource`, which bounds what comes out.
        client = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
        return {"client_kwargs": client, "encoded": "?" in rest}  # a signed query is sent as it is written
    if protocol == "s3":
        return {"config_kwargs": {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS}}
    return {}


@functools.cache
def check_locks(cache: Path) -> None:
    """Raises UserError where the file system has no locks: FileLock would wait for them for ever."""
    if (refusal := lock_refusal(cache)) is not None:
        raise UserError(
            f"{cache}: the cache of remote files needs a file system with locks ({refusal}); set SLOTSCOPS_CACHE to a "
            "folder on a local disk"
        )


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
