"""Reads members of shards by index, without streaming: memory-mapped tar, offset, size, crc32, decode."""

import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from simplejpeg import decode_jpeg
from torch import Tensor

from slotscops.errors import RunError
from slotscops.index import Dataset, ShardEntry, ShardIndex
from slotscops.records import MEMBERS, decode_image

_MAX_OPEN_SHARDS = 64  # an open shard costs a file descriptor, of which a process may have 1,024


class ShardReader:
    """One shard's samples by row."""

    def __init__(self, dataset: Dataset, entry: ShardEntry, index: ShardIndex | None = None) -> None:
        self.path = dataset.tar_path(entry)
        self.index = dataset.read_index(entry) if index is None else index
        self.size = dataset.size
        with self.path.open("rb") as file:
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read_member(self, row: int, member: str) -> memoryview:
        """The content of one member, its crc32 checked.

        Raises:
            RunError: the bytes are not those the index was made for.
        """
        column = MEMBERS.index(member)
        offset, size = int(self.index.offsets[row, column]), int(self.index.sizes[row, column])
        if offset < 0 or not 0 < size <= len(self._bytes) - offset:
            raise RunError(f"{self.path}: {self.index.key(row)}.{member} lies outside the file; {_MEND}")
        content = self._bytes[offset : offset + size]
        if zlib.crc32(content) != int(self.index.crc32[row, column]):
            raise RunError(
                f"{self.path}: {self.index.key(row)}.{member} is damaged (crc32 differs from the index); {_MEND}"
            )
        return content

    def read_images(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), 3, S, S) uint8 RGB crops, laid out channels last."""
        pixels = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for place, row in enumerate(rows):
            self.read_image_into(pixels[place], row)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def read_image_into(self, pixels: NDArray[np.uint8], row: int) -> None:
        """Decodes a crop into (S, S, 3) uint8 RGB."""
        decode_jpeg(self.read_member(row, "jpg"), buffer=pixels)

    def read_parts(self, row: int, smallest_on_top: bool = False) -> NDArray[np.uint8]:
        """(S, S) uint8 part labels, 0 = none."""
        return decode_image(self.read_member(row, "parts_small.png" if smallest_on_top else "parts.png"))

    def read_object_mask(self, row: int) -> NDArray[np.bool_]:
        """(S, S) bool, True on the object."""
        mask: NDArray[np.bool_] = decode_image(self.read_member(row, "object.png")) > 0
        return mask

    def read_description(self, row: int) -> dict[str, Any]:
        description: dict[str, Any] = json.loads(bytes(self.read_member(row, "json")))
        return description


class ShardReaders:
    """The readers of a data set's shards, opened when first needed; the least recently used is closed beyond 64."""

    def __init__(
        self, dataset: Dataset, entries: Sequence[ShardEntry], read_index: Callable[[int], ShardIndex]
    ) -> None:
        self._dataset = dataset
        self._entries = entries
        self._read_index = read_index
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, shard: int) -> ShardReader:
        if shard not in self._open:
            self._open[shard] = ShardReader(self._dataset, self._entries[shard], self._read_index(shard))
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


_MEND = "copy the shard again, or make the shards again with python -m slotscops.shard"
