"""Reads from a `.safetensors` file behind a URL only the tensors that a network needs.

Such a file begins with a table of its tensors: names, types, shapes and places. The table is read first, then the bytes
of the tensors that are wanted. VGG19 up to relu5_4 is 80 MB of a file of 575. What was fetched is kept as a smaller
`.safetensors` file in `SLOTSCOPS_CACHE/weights`, and the server is not asked again.

A server is not trusted: a table may have 25 MB, and a tensor as many bytes as its shape in the network needs.

Source: the format is described at https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from slotscops.core import console
from slotscops.core.address import Address
from slotscops.core.errors import UserError, first_line
from slotscops.core.files import replace_when_complete
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

_MAX_TABLE_BYTES = 25_000_000  # the largest networks of timm have tables of 0.3 MB
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # of one number of each type
_INSTEAD = "download the file and give its path"
Shapes = Mapping[str, Sequence[int]]


class _Tensor(NamedTuple):
    name: str
    kind: str  # a key of `_BYTES`
    shape: list[int]
    start: int  # place of its first byte, counted from the end of the table
    end: int


def fetch_weights(url: Address, needed: Shapes, check: Callable[[Shapes], None]) -> Path:
    """A local `.safetensors` file with the tensors of these names, fetched if it is not there yet.

    Args:
        needed: the shape of each tensor by its name.
        check: gets the shapes of all tensors in the file before any of them is fetched, and raises if they do not fit.

    Raises:
        UserError: the address lost its secret, is of an unsupported kind or leads to nothing or to no such file, the
            server knows no ranges, or the copy cannot be written.
        RunError: the file cannot be fetched after several tries.
    """
    if url.lost_secret:
        raise UserError(f"{url}: was stored without its password or signed query, as always; give the whole address")
    path = _copy_of(url, needed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_locks(cache_folder())
        with FileLock(lock_of(path)):  # other processes of this machine wait for the copy
            if not path.is_file():
                source = connect(url, url, _INSTEAD)
                table, first = _read_table(source, url)
                check({name: row["shape"] for name, row in table.items()})
                _write(path, source, url, [_describe(url, name, table[name]) for name in needed], first)
            os.utime(path)  # the most recently used file is evicted last
    except FileNotFoundError as error:
        raise UserError(f"weights {error}; check the address, or {_INSTEAD}") from None
    except OSError as error:
        raise UserError(
            f"{path.parent}: the cache of weights cannot be written ({error.strerror or first_line(error)}); set "
            "SLOTSCOPS_CACHE to a folder with room"
        ) from None
    return path


def _copy_of(url: Address, needed: Shapes) -> Path:
    wanted = json.dumps([url.identity(), sorted((name, list(shape)) for name, shape in needed.items())])
    readable = re.sub(r"[^A-Za-z0-9]+", "-", str(url).split("://", 1)[1].split("?")[0])[-60:].strip("-")
    return cache_folder() / "weights" / f"{readable}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.safetensors"


def _read_table(source: Source, url: Address) -> tuple[dict[str, Any], int]:
    """The rows of the table by the tensors' names, and where in the file it ends."""
    num_bytes = int.from_bytes(b"".join(_read(source, url, 0, 8)), "little")
    if not 2 <= num_bytes <= _MAX_TABLE_BYTES:
        raise UserError(f"weights {url}: is no .safetensors file (a web page?); check the address, or {_INSTEAD}")
    content = b"".join(_read(source, url, 8, 8 + num_bytes))
    try:
        rows = dict(json.loads(content))
        rows.pop("__metadata__", None)
        is_table = all(isinstance(row, dict) and _are_counts(row["shape"]) for row in rows.values())
    except (ValueError, TypeError, KeyError, RecursionError):
        is_table = False
    if not is_table:
        raise UserError(f"weights {url}: its table of tensors is damaged; {_INSTEAD}")
    return rows, 8 + num_bytes


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _describe(url: Address, name: str, row: Mapping[str, Any]) -> _Tensor:
    """A row of the table, checked. Raises UserError if its place does not fit its shape and type."""
    kind, shape, place = str(row.get("dtype")), list[int](row["shape"]), row.get("data_offsets")
    start, end = place if isinstance(place, list) and _are_counts(place) and len(place) == 2 else (0, -1)
    if kind not in _BYTES or end - start != _BYTES[kind] * math.prod(shape):
        raise UserError(f"weights {url}: the place of tensor {name} does not fit its type and shape; {_INSTEAD}")
    return _Tensor(name, kind, shape, start, end)


def _write(path: Path, source: Source, url: Address, tensors: Sequence[_Tensor], first: int) -> None:
    """Fetches the tensors and writes them as a file of their own; `first` is where their bytes begin in the remote one.

    Tensors that lie beside each other there are fetched together.
    """
    tensors = sorted(tensors, key=lambda tensor: tensor.start)
    table, ranges, place = {}, list[tuple[int, int]](), 0
    for tensor in tensors:
        end = place + tensor.end - tensor.start
        table[tensor.name] = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": [place, end]}
        place = end
        if ranges and ranges[-1][1] == tensor.start:
            ranges[-1] = (ranges[-1][0], tensor.end)
        else:
            ranges.append((tensor.start, tensor.end))
    console.say(f"{url}: fetching {place / 1e6:.1f} MB, the tensors that the network needs")
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with replace_when_complete(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start, end in ranges:
            for piece in _read(source, url, first + start, first + end):
                file.write(piece)


def _read(source: Source, url: Address, start: int, end: int) -> Iterator[bytes]:
    """Yields the bytes of the file from `start` up to `end`. Raises UserError if the server sends others."""
    patience, at_once = Patience(url), MOST_AT_ONCE
    while start < end:
        asked, pieces = min(end, start + at_once), list[bytes]()

        def keep(place: int, piece: bytes, start: int = start, pieces: list[bytes] = pieces) -> None:
            if place < start:
                raise UserError(f"weights {url}: its server sends whole files only; {_INSTEAD}")
            pieces.append(piece)

        try:
            with saying_that_it_waits(url):
                source.read(start, asked, keep, asked)
            content = b"".join(pieces)
            if len(content) != asked - start:
                raise ConnectionError(f"{len(content)} bytes came, asked for {asked - start}")
        except UserError:
            raise
        except Exception as error:  # each file system raises its own kinds of errors
            at_once = max(at_once // 2, LEAST_AT_ONCE)
            patience.try_again_after(error)
            continue
        yield content
        start, patience = asked, Patience(url)
