"""The index beside the shards: the position of each member of each sample, and a description of the whole data set.

Shapes: N samples of a shard, M members of a sample (`records.MEMBERS`).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from slotscops.core.address import Address
from slotscops.core.errors import UserError, first_line
from slotscops.core.files import read_bytes, sha256_of_bytes, sha256_of_json, size_of_file, write_bytes, write_json
from slotscops.core.pixels import Context
from slotscops.core.records import MEMBERS
from slotscops.shard.remote import RemoteFolder

FORMAT = 2
# A foreign data set must not be able to name files outside its folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 1 << 15  # pixels, side of a crop; a larger value means a damaged file
_DTYPES = {"key_bytes": np.uint8, "crc32": np.uint32}  # the others are int64


@dataclass(frozen=True)
class ShardIndex:
    """Positions of the members of one shard. Row i belongs to the i-th sample of the tar."""

    key_bytes: NDArray[np.uint8]  # all keys, UTF-8, one after the other
    key_ends: NDArray[np.int64]  # (N,) end of each key in key_bytes
    offsets: NDArray[np.int64]  # (N, M) first byte of each member's content in the tar
    sizes: NDArray[np.int64]  # (N, M) bytes
    crc32: NDArray[np.uint32]  # (N, M)
    class_ids: NDArray[np.int64]  # (N,) row of the data set's class table

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(array.nbytes for array in vars(self).values())

    def key(self, row: int) -> str:
        start = self.key_ends[row - 1] if row else 0
        return self.key_bytes[start : self.key_ends[row]].tobytes().decode()

    @staticmethod
    def from_keys(keys: list[str], **arrays: NDArray[Any]) -> "ShardIndex":
        encoded = [key.encode() for key in keys]
        return ShardIndex(
            key_bytes=np.frombuffer(b"".join(encoded), np.uint8),
            key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
            **arrays,
        )

    def write(self, path: Path) -> None:
        write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in vars(self).items()}))

    @staticmethod
    def read(path: Path, sha256: str | None = None) -> "ShardIndex":
        """Raises UserError if the file is missing, has another sha256, or its arrays do not fit each other."""
        try:
            content = path.read_bytes()
            if sha256 is not None and sha256_of_bytes(content) != sha256:
                raise UserError(f"{path}: is damaged (sha256 differs from dataset.json); {_REBUILD}")
            index = ShardIndex(**load(content))
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise UserError(f"{path}: is no readable shard index ({first_line(error)}); {_REBUILD}") from None
        if not index._fits():
            raise UserError(f"{path}: its arrays do not fit each other; {_REBUILD}")
        return index

    def _fits(self) -> bool:
        """Whether the arrays fit each other and all keys are printable."""
        num, members = self.key_ends.size, (self.key_ends.size, len(MEMBERS))
        shapes = dict.fromkeys(vars(self), (num,)) | dict.fromkeys(("offsets", "sizes", "crc32"), members)
        shapes["key_bytes"] = (self.key_bytes.size,)
        for name, array in vars(self).items():
            if array.shape != shapes[name] or array.dtype != _DTYPES.get(name, np.int64):
                return False
        starts = np.concatenate([[0], self.key_ends])
        if starts[-1] != len(self.key_bytes) or not (np.diff(starts) > 0).all():
            return False
        if (self.key_bytes[starts[:-1]] & 0xC0 == 0x80).any():  # a key that begins inside a UTF-8 character
            return False
        try:
            return self.key_bytes.tobytes().decode().isprintable()
        except UnicodeDecodeError:
            return False


@dataclass(frozen=True)
class ShardEntry:
    """One row of `dataset.json`'s table of shards."""

    name: str  # "train-000000"
    num_samples: int
    num_bytes: int  # of the tar
    sha256: str  # of the tar
    index_sha256: str


class ShardTable(Sequence[ShardEntry]):
    """The shards of a split. Each row takes 100 bytes in arrays instead of 500 as an object with two hashes as text."""

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self.num_samples = np.array([entry.num_samples for entry in entries], np.int64)
        self._num_bytes = np.array([entry.num_bytes for entry in entries], np.int64)
        self._names = np.array([entry.name.encode() for entry in entries], np.bytes_)
        self._hashes = np.frombuffer(
            b"".join(bytes.fromhex(entry.sha256 + entry.index_sha256) for entry in entries), np.dtype((np.void, 64))
        )

    def __len__(self) -> int:
        return len(self.num_samples)

    @overload
    def __getitem__(self, shard: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, shard: slice) -> list[ShardEntry]: ...
    def __getitem__(self, shard: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        hashes = self._hashes[shard].tobytes().hex()
        return ShardEntry(
            self._names[shard].decode(),
            int(self.num_samples[shard]),
            int(self._num_bytes[shard]),
            hashes[:64],
            hashes[64:],
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class ShardDataset:
    """The content of `SHARDS/index/dataset.json`."""

    folder: Path  # for remote shards, the folder of their local copies, which exist once opened
    settings: dict[str, Any]  # of the sharding: size, classes, box shares, ...
    class_names: list[str]  # class_ids are rows of this table
    part_names: dict[str, list[str]]  # by class; part label = position + 1
    splits: Mapping[str, Sequence[ShardEntry]]
    remote: RemoteFolder | None = None

    @property
    def location(self) -> str:
        """Folder or URL of the data set, as messages name it: without a password or the values of a query."""
        return str(self.folder if self.remote is None else self.remote.url)

    @property
    def size(self) -> int:
        """Side of the crops, pixels."""
        return int(self.settings["size"])

    @property
    def context(self) -> Context:
        """How much of their surroundings the crops show."""
        return Context(**self.settings.get("context", {}))

    @cached_property
    def digest(self) -> str:
        """One hash over settings, tables and every shard's own hash."""
        return sha256_of_json(_to_json(self))

    def tar_path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.name}.tar"

    @contextmanager
    def opened(self, name: str, sha256: str, num_bytes: int | None = None) -> Iterator[Path]:
        """A file of the data set by its path inside the folder; fetched if it is remote, see `RemoteFolder.opened`."""
        if self.remote is None:
            yield self.folder / name
        else:
            with self.remote.opened(name, sha256, num_bytes) as path:
                yield path

    def num_samples(self, split: str) -> int:
        """Number of samples in all shards of a split."""
        return int(self.samples_of_shards(split).sum())

    def samples_of_shards(self, split: str) -> NDArray[np.int64]:
        """Number of samples in each shard of a split."""
        entries = self.split(split)
        if isinstance(entries, ShardTable):
            return entries.num_samples
        return np.array([entry.num_samples for entry in entries], np.int64)

    def split(self, name: str) -> Sequence[ShardEntry]:
        """The shards of a split, in order. Raises UserError if there is no such split."""
        if name not in self.splits:
            raise UserError(f"{self.location}: has no split '{name}', only {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def read_index(self, entry: ShardEntry) -> ShardIndex:
        """The index of one shard. Raises UserError if it is damaged or does not fit `dataset.json`."""
        with self.opened(f"index/{entry.name}.safetensors", entry.index_sha256) as path:
            index = ShardIndex.read(path, entry.index_sha256)
        if len(index) and not 0 <= index.class_ids.min() <= index.class_ids.max() < len(self.class_names):
            raise UserError(f"{index_path(self.folder, entry.name)}: names classes beyond dataset.json's; {_REBUILD}")
        if len(index) != entry.num_samples:
            raise UserError(
                f"{index_path(self.folder, entry.name)}: lists {len(index)} samples, dataset.json says "
                f"{entry.num_samples}; {_REBUILD}"
            )
        return index


_REBUILD = "make the shards again with python -m slotscops.shard into an empty folder"


def index_path(shards: Path, shard: str) -> Path:
    return shards / "index" / f"{shard}.safetensors"


def dataset_path(shards: Path) -> Path:
    return shards / "index" / "dataset.json"


def open_dataset(shards: str | Path | Address, check_files: bool = True) -> ShardDataset:
    """Reads `dataset.json` of a folder or a URL, and checks that every tar of a folder has the size it says.

    Args:
        check_files: False if `check_tars` is called later, or by another process of this machine.

    Raises:
        UserError: no shards there (the message gives the command that makes them), or they are unfinished or damaged.
        RunError: the server cannot be reached.
    """
    address = Address(shards)
    if address.is_remote:
        return _open_remote(RemoteFolder.of(address))
    dataset = read_dataset(Path(address.reveal()))
    if check_files:
        check_tars(dataset)
    return dataset


def check_tars(dataset: ShardDataset) -> None:
    """Raises UserError if a tar is missing or has not the size that `dataset.json` says. Remote ones are not looked at.

    One look at each file: on a network's file system that is what an open of a large data set costs.
    """
    if dataset.remote is not None:
        return
    for entry in (entry for entries in dataset.splits.values() for entry in entries):
        path = dataset.tar_path(entry)
        num_bytes = size_of_file(path)
        if num_bytes is None:
            raise UserError(f"{path}: is missing; bring it back or {_REBUILD}")
        if num_bytes != entry.num_bytes:
            raise UserError(f"{path}: has {num_bytes} bytes, needed {entry.num_bytes}; {_REBUILD}")


def _open_remote(remote: RemoteFolder) -> ShardDataset:
    try:
        remote.fetch_anew("index/dataset.json")
    except FileNotFoundError as error:
        raise UserError(f"{error}; upload a whole folder written by python -m slotscops.shard") from None
    return replace(read_dataset(remote.copy), remote=remote)


def read_dataset(shards: Path) -> ShardDataset:
    """Reads `dataset.json` without checking the shards. Raises UserError as `open_dataset` does."""
    path = dataset_path(shards)
    if not path.is_file():
        unfinished = (shards / "index" / "plan.json").is_file()
        state = "holds shards that were not finished" if unfinished else "holds no shards"
        raise UserError(
            f"{shards}: {state}; make them with: python -m slotscops.shard --root DIR --out {shards}"
            f" (or --toy --out {shards})"
        )
    try:
        content = json.loads(read_bytes(path))
        dataset = _from_json(shards, content)
        digest = content["digest"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); {_REBUILD}") from None
    if dataset.digest != digest:
        raise UserError(f"{path}: its content does not fit its own digest; {_REBUILD}")
    return dataset


def write_dataset(dataset: ShardDataset) -> None:
    content = _to_json(dataset) | {"digest": dataset.digest}
    content["splits"] = {split: list(rows) for split, rows in content["splits"].items()}
    write_json(dataset_path(dataset.folder), content)


def _to_json(dataset: ShardDataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": dataset.settings,
        "class_names": dataset.class_names,
        "part_names": dataset.part_names,
        "splits": {split: _Rows(entries) for split, entries in dataset.splits.items()},
    }


class _Rows(Sequence[dict[str, Any]]):
    """The rows of the table of shards as JSON has them, each made when it is asked for."""

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: Any) -> Any:
        return vars(self._entries[number])


def _from_json(shards: Path, content: dict[str, Any]) -> ShardDataset:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
    dataset = ShardDataset(
        folder=shards,
        settings=dict(content["settings"]),
        class_names=_names(content["class_names"]),
        part_names={class_name: _names(names) for class_name, names in content["part_names"].items()},
        splits={
            split: ShardTable([_entry(**entry) for entry in entries]) for split, entries in content["splits"].items()
        },
    )
    if not 1 <= dataset.size <= _MAX_SIZE or not {*dataset.class_names} <= {*dataset.part_names}:
        raise ValueError("its settings and tables do not fit each other")
    if not all(isinstance(number, int | float) for number in vars(dataset.context).values()):
        raise ValueError("its context must be numbers")
    return dataset


def _names(names: list[str]) -> list[str]:
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError("class and part names must be printable text")
    return list(names)


def _entry(name: str, num_samples: int, num_bytes: int, sha256: str, index_sha256: str) -> ShardEntry:
    kinds = [type(value) for value in (num_samples, num_bytes, sha256, index_sha256)]
    if (
        kinds != [int, int, str, str]
        or not 0 <= min(num_samples, num_bytes) <= max(num_samples, num_bytes) < 1 << 63
        or not _SHARD_NAME.fullmatch(name)
    ):
        raise ValueError(f"{name!r} is no row of the table of shards")
    if not _SHA256.fullmatch(sha256) or not _SHA256.fullmatch(index_sha256):
        raise ValueError(f"a hash of {name!r} is none")
    return ShardEntry(name, num_samples, num_bytes, sha256, index_sha256)
