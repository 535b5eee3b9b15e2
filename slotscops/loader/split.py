"""Reads samples of shards and of the feature cache by their number.

The samples of a split are numbered in the order of its shards. Of N samples, number N + i is sample i mirrored left to
right.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from slotscops.core.errors import DamageError, RunError
from slotscops.core.records import Batch
from slotscops.features.cache import FeatureCache
from slotscops.features.rows import FeatureShard
from slotscops.loader.plan import NUM_SUBSTITUTES, substitutes
from slotscops.shard.index import ShardDataset, ShardEntry, ShardIndex
from slotscops.shard.reader import ShardReader, ShardReaders

if TYPE_CHECKING:  # loader workers merge no parts, and start faster without what reads annotations and settings
    from slotscops.datasets.merging import PartMerge

# What a process keeps of the shards that it read last. Opening one again takes 0.13 ms for its index of 1,000 samples
# and 0.06 ms for its features; decoding a crop of 128 px takes 0.14 ms.
_MAX_INDEX_BYTES = 32 << 20  # of a quarter of a million samples
_MAX_FEATURE_SHARDS = 256  # each is a memory map
_SPARSE_BYTES = 6  # in a batch: an int32 place and a float16 value


@dataclass
class Split(Dataset[Batch]):
    """All samples of one split, read by number.

    It is cheap to send to a worker, because each process opens files only when it reads them.
    """

    dataset: ShardDataset
    name: str  # train or val
    cache: FeatureCache | None  # None: batches without features
    with_labels: bool  # read part labels and object masks, for evaluation; training never reads part labels
    replace_damaged: bool = False  # for training; evaluation must fail, as its scores would change
    with_object_masks: bool = False  # read object masks without part labels, for target_mask=object
    sparse_features: bool = False  # give values and places where the cache is sparse; `Batch.to` makes them dense
    merge: "PartMerge | None" = None  # true parts that count as one; None: all parts as they are in the shards
    only: NDArray[np.int64] | None = None  # (N,) the samples of the shards that this split has; None: all of them

    def __len__(self) -> int:
        return int(self._shard_starts[-1]) if self.only is None else len(self.only)

    @property
    def part_names(self) -> dict[str, list[str]]:
        """Names of the true parts by class, in the order of class ids, as the labels of this split number them."""
        names = self.dataset.part_names if self.merge is None else self.merge.part_names
        return {name: names[name] for name in self.dataset.class_names}

    def batch_bytes(self, batch_size: int) -> dict[str, int]:
        """The bytes of each tensor of a batch, by a name of its own."""
        pixels = batch_size * self.dataset.size**2
        features = {} if self.cache is None else {"features": 2 * batch_size * math.prod(self.cache.shape)}
        maps = dict.fromkeys(self._map_members, pixels)
        return {"images": 3 * pixels, "class_ids": 8 * batch_size, **features, **maps}

    def key(self, sample: int) -> str:
        """The record key of a sample."""
        shard, row = self._locate(np.array([sample]))
        return self._index(int(shard[0])).key(int(row[0]))

    def class_ids(self) -> NDArray[np.int64]:
        """(N,) class id of every sample: its row in the class table of the data set."""
        ids = np.concatenate([self._index(shard).class_ids for shard in range(len(self._entries))])
        return ids if self.only is None else ids[self.only]

    def class_ids_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) class id of each of these samples."""
        shards, rows = self._locate(samples)
        places = zip(shards.tolist(), rows.tolist(), strict=True)
        return np.array([self._index(shard).class_ids[row] for shard, row in places], np.int64)

    def read_member(self, sample: int, member: str) -> bytes:
        """The bytes of one member of a sample, for example `parts.png`. Its crc32 is checked."""
        shard, row = self._locate(np.array([sample]))
        return self._readers[int(shard[0])].read_member(int(row[0]), member)

    def read(self, samples: NDArray[np.int64]) -> Batch:
        """Reads samples as one batch, in the given order.

        If `replace_damaged` is set, other samples replace damaged ones, and `Batch.damaged` lists the reasons by key.

        Args:
            samples: (B,) int64 sample numbers.

        Raises:
            DamageError: if a sample is damaged and `replace_damaged` is not set.
            RunError: if all substitutes for a damaged sample are damaged too.
        """
        if self._faults:  # do not read samples again that are known to be damaged
            samples, damaged = self._replace(samples)
        else:
            damaged = {}
        try:
            batch = self._read(samples)
        except DamageError:
            if not self.replace_damaged:
                raise
            for sample in samples.tolist():
                self._look_for_fault(sample)
            samples, more = self._replace(samples)
            damaged |= more
            batch = self._read(samples)
        return replace(batch, damaged=damaged)

    def _replace(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[str, str]]:
        """Replaces samples known to be damaged. Returns the new samples, and the reasons by key of the damaged ones."""
        damaged = {self.key(sample): self._faults[sample] for sample in samples.tolist() if sample in self._faults}
        whole = [self._find_substitute(s) if s in self._faults else s for s in samples.tolist()]
        return np.array(whole, np.int64), damaged

    def _find_substitute(self, sample: int) -> int:
        """A whole sample to use instead. It depends only on the sample and on which samples are damaged."""
        for other in substitutes(sample, len(self)):
            if other not in self._faults:
                self._look_for_fault(other)
            if other not in self._faults:
                return other
        raise RunError(
            f"{self._faults[sample]} ({NUM_SUBSTITUTES} samples tried in its place are damaged too); "
            f"list all damage with: python -m slotscops.shard --verify {self.dataset.location}"
        )

    def _look_for_fault(self, sample: int) -> None:
        try:
            self._read(np.array([sample]))
        except DamageError as error:
            self._faults[sample] = str(error)

    def _read(self, samples: NDArray[np.int64]) -> Batch:
        shards, rows = self._locate(samples)
        self._fetch_together(shards)
        size = self.dataset.size
        mirrored = samples >= len(self)
        pixels = np.empty((len(samples), size, size, 3), np.uint8)
        maps: dict[str, NDArray[Any]] = {
            member: np.empty((len(samples), size, size), np.bool_ if member == "object.png" else np.uint8)
            for member in self._map_members
        }
        places = list(zip(shards.tolist(), rows.tolist(), strict=True))
        for place, (shard, row) in enumerate(places):
            reader = self._readers[shard]
            reader.read_image_into(pixels[place], row)
            for member, labels in maps.items():
                labels[place] = self._merged(_read_map(reader, member, row), member, shard, row)
        arrays: list[NDArray[Any]] = [pixels, *maps.values()]
        for array in arrays:
            array[mirrored] = array[mirrored, :, ::-1]
        tensors = {member: torch.from_numpy(array) for member, array in maps.items()}
        return Batch(
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2),  # channels last in memory
            part_labels=tensors.get("parts.png"),
            object_masks=tensors.get("object.png"),
            class_ids=torch.tensor([self._index(s).class_ids[r] for s, r in places]),
            keys=[self._index(s).key(r) for s, r in places],
            part_labels_small=tensors.get("parts_small.png"),
            **self._read_features(shards, rows, mirrored),
        )

    def _merged(self, labels: NDArray[Any], member: str, shard: int, row: int) -> NDArray[Any]:
        if self.merge is None or member == "object.png":
            return labels
        return self.merge.apply(labels, self.dataset.class_names[self._index(shard).class_ids[row]])

    @property
    def _map_members(self) -> tuple[str, ...]:
        """Names of the members that are read besides the photo."""
        if self.with_labels:
            return ("parts.png", "parts_small.png", "object.png")
        return ("object.png",) if self.with_object_masks else ()

    def _fetch_together(self, shards: NDArray[np.int64]) -> None:
        """Downloads the missing files of a batch of remote samples, several at a time.

        Files that this leaves out are downloaded when they are opened. It does nothing for local shards.
        """
        if self.dataset.remote is None:
            return
        wanted = []
        for entry in [self._entries[shard] for shard in np.unique(shards)]:
            wanted.append((f"{entry.name}.tar", entry.sha256, entry.num_bytes))
            for cache in (self.cache, self.cache and self.cache.mirrored):
                if cache is not None:
                    wanted.append(cache.file(entry))
        self.dataset.remote.fetch_together(wanted)

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        """One batch. The DataLoader calls this with all sample numbers of a batch at once."""
        return self.read(np.asarray(samples, np.int64))

    def _read_features(
        self, shards: NDArray[np.int64], rows: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """The fields of a batch that hold its features."""
        if self.cache is None:
            return {"features": None}
        places = list(zip(shards.tolist(), rows.tolist(), mirrored.tolist(), strict=True))
        if self.sparse_features and len(places) * math.prod(self.cache.shape) <= np.iinfo(np.int32).max:
            sparse = self._read_sparse([(self._feature_shard(shard, flip), row) for shard, row, flip in places])
            if sparse is not None:
                return _join_sparse(sparse, self.cache.shape)
        features = torch.zeros(len(shards), *self.cache.shape, dtype=torch.float16)
        maps = features.view(len(shards), -1).numpy()
        for place, (shard, row, flip) in enumerate(places):
            self._feature_shard(shard, flip).read_row_into(row, maps[place])
        return {"features": features}

    def _read_sparse(
        self, rows: list[tuple[FeatureShard, int]]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.float16]]] | None:
        """Places and values of each row; None if a shard is not sparse, or they are larger than the dense features."""
        counts = [shard.num_sparse_values(row) for shard, row in rows]
        stored = [count for count in counts if count is not None]
        # This is decided before any row is read. More than a third of the values, as places and values, are larger.
        if len(stored) < len(rows) or _SPARSE_BYTES * sum(stored) > self.batch_bytes(len(rows))["features"]:
            return None
        found = [shard.read_sparse_row(row) for shard, row in rows]
        return [pair for pair in found if pair is not None]

    def _locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard number and row in the shard of each sample. Mirroring does not matter."""
        samples = samples % len(self)
        if self.only is not None:
            samples = self.only[samples]
        shards = np.searchsorted(self._shard_starts, samples, side="right") - 1
        return shards, samples - self._shard_starts[shards]

    def _feature_shard(self, shard: int, mirrored: bool) -> FeatureShard:
        if (shard, mirrored) not in self._feature_shards:
            cache = self.cache.mirrored if mirrored and self.cache else self.cache
            assert cache is not None
            if self.dataset.remote is not None:
                for opened in [place for place, features in self._feature_shards.items() if features.is_evicted]:
                    del self._feature_shards[opened]
            self._feature_shards[shard, mirrored] = cache.open_shard(self._entries[shard])
            if len(self._feature_shards) > _MAX_FEATURE_SHARDS:
                self._feature_shards.popitem(last=False)
        self._feature_shards.move_to_end((shard, mirrored))
        return self._feature_shards[shard, mirrored]

    @property
    def _entries(self) -> Sequence[ShardEntry]:
        return self.dataset.split(self.name)

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        """(shards + 1,) number of each shard's first sample, and the number of samples."""
        return np.concatenate([[0], np.cumsum(self.dataset.samples_of_shards(self.name))])

    def _index(self, shard: int) -> ShardIndex:
        # An index is read when it is first needed, so that a large data set can start before all are read.
        if shard not in self._indices:
            index = self.dataset.read_index(self._entries[shard])
            num_kept = max(1, _MAX_INDEX_BYTES // max(1, index.num_bytes))
            while len(self._indices) >= num_kept:
                self._indices.popitem(last=False)
            self._indices[shard] = index
        self._indices.move_to_end(shard)
        return self._indices[shard]

    @cached_property
    def _indices(self) -> OrderedDict[int, ShardIndex]:
        """The indices used last, by number of the shard, the most recent last."""
        return OrderedDict()

    @cached_property
    def _faults(self) -> dict[int, str]:
        """The reason for each sample that this process found to be damaged."""
        return {}

    @cached_property
    def _readers(self) -> ShardReaders:
        return ShardReaders(self.dataset, self._entries, self._index)

    @cached_property
    def _feature_shards(self) -> OrderedDict[tuple[int, bool], FeatureShard]:
        """The feature files used last, by number of the shard and whether mirrored, the most recent last."""
        return OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Send only the fields: a worker opens its own files, and memory maps cannot be sent.
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _join_sparse(
    rows: list[tuple[NDArray[np.int32], NDArray[np.float16]]], shape: tuple[int, int, int]
) -> dict[str, Any]:
    """The fields of a batch for the places and values of each of its rows."""
    for number, (places, _) in enumerate(rows):
        places += number * math.prod(shape)
    return {
        "features": None,
        "feature_places": torch.from_numpy(np.concatenate([places for places, _ in rows])),
        "feature_values": torch.from_numpy(np.concatenate([values for _, values in rows])),
        "feature_shape": shape,
    }


def _read_map(reader: ShardReader, member: str, row: int) -> NDArray[Any]:
    """(S, S) uint8 part labels, or the (S, S) bool object mask, S the side of the crop in pixels."""
    if member == "object.png":
        return reader.read_object_mask(row)
    return reader.read_part_labels(row, smallest_on_top=member == "parts_small.png")
