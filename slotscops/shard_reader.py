"""Reads members of shards by index, without streaming: memory-mapped tar, offset, size, crc32, decode."""

import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from slotscops.errors import RunError
from slotscops.index import Dataset, ShardEntry, ShardIndex
from slotscops.records import MEMBERS

_MAX_OPEN_SHARDS = 64  # an open shard costs a file descriptor, of which a process may have 1,024


class ShardReader:
    """One shard's samples by row."""

    def __init__(self, dataset: Dataset, entry: ShardEntry, index: ShardIndex | None = None) -> None:
        self.path = dataset.tar_path(entry)
        self.index = dataset.read_index(entry) if index is None else index
        self.size = dataset.size
        with self.path.open("rb") as file:
            # Private, because torch.frombuffer wants memory that may be written; nothing is.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read_member(self, row: int, member: str) -> Tensor:
        """(bytes,) uint8 content of one member, its crc32 checked.

        Raises:
            RunError: the bytes are not those the index was made for.
        """
        column = MEMBERS.index(member)
        offset, size = int(self.index.offsets[row, column]), int(self.index.sizes[row, column])
        if not 0 < size <= len(self._bytes) - offset or offset < 0:
            raise RunError(f"{self.path}: member {member} of sample {row} lies outside the file; {_VERIFY}")
        content = torch.frombuffer(self._bytes, dtype=torch.uint8, count=size, offset=offset)
        if zlib.crc32(memoryview(self._bytes)[offset : offset + size]) != int(self.index.crc32[row, column]):
            raise RunError(
                f"{self.path}: {self.index.key(row)}.{member} is damaged (crc32 differs from the index); {_VERIFY}"
            )
        return content

    def read_images(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), 3, S, S) uint8 RGB crops."""
        images = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        for place, row in enumerate(rows):
            images[place] = self.read_image(row)
        return images

    def read_image(self, row: int) -> Tensor:
        """(3, S, S) uint8 RGB crop."""
        image: Tensor = decode_jpeg(self.read_member(row, "jpg"), ImageReadMode.RGB)
        return image

    def read_parts(self, row: int) -> Tensor:
        """(S, S) uint8 part labels, 0 = none."""
        parts: Tensor = decode_png(self.read_member(row, "parts.png"), ImageReadMode.GRAY)[0]
        return parts

    def read_object_mask(self, row: int) -> Tensor:
        """(S, S) bool, True on the object."""
        grey: Tensor = decode_png(self.read_member(row, "object.png"), ImageReadMode.GRAY)[0]
        return grey > 0

    def read_description(self, row: int) -> dict[str, Any]:
        description: dict[str, Any] = json.loads(self.read_member(row, "json").numpy().tobytes())
        return description


class ShardReaders:
    """The readers of a data set's shards, opened when first needed; the least recently used is closed beyond 64."""

    def __init__(self, dataset: Dataset, entries: Sequence[ShardEntry], indices: Sequence[ShardIndex]) -> None:
        self._dataset = dataset
        self._entries = entries
        self._indices = indices
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, shard: int) -> ShardReader:
        if shard not in self._open:
            self._open[shard] = ShardReader(self._dataset, self._entries[shard], self._indices[shard])
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


_VERIFY = "copy the shard again, or make the shards again with python -m slotscops.shard"
