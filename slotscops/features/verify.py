"""Checks every hash of a data set and names each damaged member of a shard and row of a feature file.

python -m slotscops.shard --verify SHARDS
"""

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from slotscops.core import console
from slotscops.core.errors import DamageError, RunError, UserError
from slotscops.core.files import sha256_of_file
from slotscops.core.pool import WorkerPool
from slotscops.core.records import MEMBERS
from slotscops.features.cache import FeatureCache, find_projection_damage
from slotscops.features.cache import find_damage as find_feature_damage
from slotscops.features.manifest import REMOVE_AND_REBUILD, read_manifest
from slotscops.shard.index import ShardDataset, ShardEntry, ShardIndex, dataset_path, open_dataset, read_dataset
from slotscops.shard.reader import MEND, ShardReader

_FILES_PER_ROUND = 32  # files checked between two updates of the progress bar


def verify_shards(shards: Path, num_workers: int) -> int:
    """Prints one line for each damage.

    Raises:
        UserError: no data set there.
        RunError: something is damaged.
    """
    found = 0
    for line in find_damage(shards, num_workers):
        console.say(line)
        found += 1
    if found:
        raise RunError(f"{shards}: {found} damages found")
    console.say(f"{shards}: every file is as it was written")
    return 0


def find_damage(shards: Path, num_workers: int) -> Iterator[str]:
    """Yields a line for each damaged file, member and row."""
    if not dataset_path(shards).is_file():
        open_dataset(shards)  # raises an error that says what is missing
    try:
        dataset = read_dataset(shards)
    except UserError as error:
        yield str(error)
        return
    entries = [entry for split in dataset.splits.values() for entry in split]
    caches = []
    for path in sorted(shards.glob("features/*/manifest.json")):
        try:
            caches.append(_open_manifest(path, dataset))
        except UserError as error:
            yield str(error)
    for cache in caches:
        yield from find_projection_damage(cache)
    rounds = [entries[start : start + _FILES_PER_ROUND] for start in range(0, len(entries), _FILES_PER_ROUND)]
    with WorkerPool(num_workers, __name__) as pool:
        for part in console.track(rounds, len(rounds), f"checking {len(entries)} shards, rounds of {_FILES_PER_ROUND}"):
            for lines in pool.map(partial(_check_shard, dataset), part):
                yield from lines
            for cache in caches:
                for lines in pool.map(partial(find_feature_damage, cache), part):
                    yield from lines


def _open_manifest(path: Path, dataset: ShardDataset) -> FeatureCache:
    cache = FeatureCache(path.parent, read_manifest(path), dataset)
    if cache.manifest["shard_digest"] != dataset.digest:
        raise UserError(f"{path}: belongs to other shards; {REMOVE_AND_REBUILD}")
    return cache


# ---- shards ------------------------------------------------------------------------------------------------------


def _check_shard(dataset: ShardDataset, entry: ShardEntry) -> list[str]:
    lines = []
    try:
        index = dataset.read_index(entry)
    except UserError as error:
        lines.append(str(error))
        index = None
    path = dataset.tar_path(entry)
    try:
        came, sha256 = path.stat().st_size, sha256_of_file(path)
    except OSError as error:
        return [*lines, f"{path}: cannot be read ({error.strerror}); {MEND}"]
    others = [other for split in dataset.splits.values() for other in split if other.sha256 == sha256]
    if others and entry.sha256 != sha256:
        return [*lines, f"{path}: holds the content of {others[0].name} (files swapped?); {MEND}"]
    of_members = [] if index is None else _check_members(ShardReader(dataset, entry, index))
    if entry.sha256 != sha256:
        if came != entry.num_bytes:
            lines.append(f"{path}: has {came} bytes, needed {entry.num_bytes}; {MEND}")
        if index is not None:
            of_members += _check_between_members(path, index)
        if index is None or not (of_members or came != entry.num_bytes):
            lines.append(f"{path}: is damaged (sha256 differs from dataset.json); {MEND}")
    return lines + of_members


def _check_members(reader: ShardReader) -> list[str]:
    lines = []
    for row in range(len(reader.index)):
        for member in MEMBERS:
            try:
                reader.read_member(row, member)
            except DamageError as error:
                lines.append(str(error))
    return lines


def _check_between_members(path: Path, index: ShardIndex) -> list[str]:
    """Checks tar headers and padding, which other readers need although reading by index ignores them."""
    lines = []
    end = 0
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        for row in range(len(index)):
            for column, member in enumerate(MEMBERS):
                offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
                wanted = b"\0" * (-end % tarfile.BLOCKSIZE) + tar_header(f"{index.key(row)}.{member}", size)
                if end <= num_bytes and os.pread(file.fileno(), len(wanted), end) != wanted:
                    lines.append(f"{path}: the tar header of {index.key(row)}.{member} is damaged; {MEND}")
                end = offset + size
    return lines


def tar_header(name: str, size: int) -> bytes:
    """The blocks before a member's content, as `slotscops.shard.writer` writes them."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)
