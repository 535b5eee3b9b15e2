"""The index beside the shards: where each member of each sample lies, and what the data set as a whole is.

Shapes: N samples of a shard, M members of a sample (`records.MEMBERS`).
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from slotscops.errors import UserError, first_line
from slotscops.files import sha256_of_json, write_bytes, write_json
from slotscops.records import MEMBERS

FORMAT = 2


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of one shard lie. Row i belongs to the i-th sample of the tar."""

    key_bytes: NDArray[np.uint8]  # all keys, UTF-8, one after the other
    key_ends: NDArray[np.int64]  # (N,) end of each key in key_bytes
    offsets: NDArray[np.int64]  # (N, M) first byte of each member's content in the tar
    sizes: NDArray[np.int64]  # (N, M) bytes
    crc32: NDArray[np.uint32]  # (N, M)
    class_ids: NDArray[np.int64]  # (N,) row of the data set's class table

    def __len__(self) -> int:
        return len(self.key_ends)

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
    def read(path: Path) -> "ShardIndex":
        """Raises UserError where the file is missing, damaged, or its arrays do not fit each other."""
        try:
            index = ShardIndex(**load_file(path))
            num = len(index)
            shapes = {name: array.shape for name, array in vars(index).items()}
            whole = (num == 0 and len(index.key_bytes) == 0) or index.key_ends[-1] == len(index.key_bytes)
            members = (num, len(MEMBERS))
            fits = shapes["offsets"] == shapes["sizes"] == shapes["crc32"] == members and shapes["class_ids"] == (num,)
        except (OSError, SafetensorError, TypeError, IndexError) as error:
            raise UserError(f"{path}: is no readable shard index ({first_line(error)}); {_REBUILD}") from None
        if not (fits and whole and bool((np.diff(index.key_ends) > 0).all())):
            raise UserError(f"{path}: its arrays do not fit each other; {_REBUILD}")
        return index


@dataclass(frozen=True)
class ShardEntry:
    """One row of `dataset.json`'s table of shards."""

    name: str  # "train-000000"
    num_samples: int
    num_bytes: int  # of the tar
    sha256: str  # of the tar
    index_sha256: str


@dataclass(frozen=True)
class Dataset:
    """What `SHARDS/index/dataset.json` says."""

    folder: Path
    settings: dict[str, Any]  # of the sharding: size, classes, box shares, ...
    class_names: list[str]  # class_ids are rows of this table
    part_names: dict[str, list[str]]  # by class; part label = position + 1
    splits: dict[str, list[ShardEntry]]

    @property
    def size(self) -> int:
        """Side of the crops, pixels."""
        return int(self.settings["size"])

    @cached_property
    def digest(self) -> str:
        """One hash over settings, tables and every shard's own hash."""
        return sha256_of_json(_to_json(self))

    def tar_path(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.name}.tar"

    def num_samples(self, split: str) -> int:
        return sum(entry.num_samples for entry in self.split(split))

    def split(self, name: str) -> list[ShardEntry]:
        if name not in self.splits:
            raise UserError(f"{self.folder}: has no split '{name}', only {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def read_index(self, entry: ShardEntry) -> ShardIndex:
        index = ShardIndex.read(index_path(self.folder, entry.name))
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


def open_dataset(shards: Path) -> Dataset:
    """Reads `dataset.json` and checks that every tar is there with the size it says.

    Raises:
        UserError: no shards there (with the command that makes them), an unfinished or damaged data set.
    """
    path = dataset_path(shards)
    if not path.is_file():
        unfinished = (shards / "index" / "plan.json").is_file()
        state = "holds shards that were not finished" if unfinished else "holds no shards"
        raise UserError(
            f"{shards}: {state}; make them with: python -m slotscops.shard --root DIR --out {shards}"
            f" (or --toy --out {shards})"
        )
    try:
        content = json.loads(path.read_text())
        dataset = _from_json(shards, content)
        digest = content["digest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); {_REBUILD}") from None
    if dataset.digest != digest:
        raise UserError(f"{path}: its content does not fit its own digest; {_REBUILD}")
    for entries in dataset.splits.values():
        for entry in entries:
            _check_tar(dataset, entry)
    return dataset


def write_dataset(dataset: Dataset) -> None:
    write_json(dataset_path(dataset.folder), _to_json(dataset) | {"digest": dataset.digest})


def _check_tar(dataset: Dataset, entry: ShardEntry) -> None:
    path = dataset.tar_path(entry)
    if not path.is_file():
        raise UserError(f"{path}: is missing; bring it back or {_REBUILD}")
    if path.stat().st_size != entry.num_bytes:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, needed {entry.num_bytes}; {_REBUILD}")


def _to_json(dataset: Dataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": dataset.settings,
        "class_names": dataset.class_names,
        "part_names": dataset.part_names,
        "splits": {split: [vars(entry) for entry in entries] for split, entries in dataset.splits.items()},
    }


def _from_json(shards: Path, content: dict[str, Any]) -> Dataset:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
    return Dataset(
        folder=shards,
        settings=dict(content["settings"]),
        class_names=list(content["class_names"]),
        part_names={name: list(parts) for name, parts in content["part_names"].items()},
        splits={split: [ShardEntry(**entry) for entry in entries] for split, entries in content["splits"].items()},
    )
