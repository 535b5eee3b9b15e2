"""Reads members of shards by index, without streaming: offset, size, crc32, decode.

Files are read with `os.pread` and not memory-mapped. A bad sector, or a file that is cut short meanwhile, is then an
error and does not kill the process. Copying a few KB costs little compared to decoding them.
"""

import json
import os
import resource
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from simplejpeg import decode_jpeg
from torch import Tensor

from slotscops.core.errors import DamageError, RunError, first_line
from slotscops.core.records import MEMBERS, decode_image
from slotscops.shard.index import ShardDataset, ShardEntry, ShardIndex

_MAX_OPEN_SHARDS = 64  # an open shard costs a file descriptor, of which a process usually may have 1,024
_SHARE_OF_FILES = 8  # where a process may open fewer files, shards take at most this part of them


class ShardReader:
    """One shard's samples by row."""

    def __init__(self, dataset: ShardDataset, entry: ShardEntry, index: ShardIndex | None = None) -> None:
        self.path = dataset.tar_path(entry)
        self.index = dataset.read_index(entry) if index is None else index
        self.size = dataset.size
        try:
            with dataset.opened(self.path.name, entry.sha256, entry.num_bytes) as path:
                self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._num_bytes = os.fstat(self._file).st_size
        except OSError as error:
            raise RunError(f"{self.path}: cannot be opened ({error.strerror}); {MEND}") from None

    @property
    def is_evicted(self) -> bool:
        """Whether the file was deleted and takes disk space only because it is still open."""
        return os.fstat(self._file).st_nlink == 0

    def read_member(self, row: int, member: str) -> bytes:
        """The content of one member; its crc32 is checked.

        Raises:
            DamageError: the bytes cannot be read or do not have the crc32 of the index.
        """
        column = MEMBERS.index(member)
        offset, size = int(self.index.offsets[row, column]), int(self.index.sizes[row, column])
        if offset < 0 or not 0 < size <= self._num_bytes - offset:
            raise self._damage(row, member, "lies outside the file")
        try:
            content = os.pread(self._file, size, offset)
        except OSError as error:
            raise self._damage(row, member, f"cannot be read ({error.strerror})") from None
        if zlib.crc32(content) != int(self.index.crc32[row, column]):
            raise self._damage(row, member, "is damaged (crc32 differs from the index)")
        return content

    def read_images(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), 3, S, S) uint8 RGB crops, laid out channels last."""
        pixels = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for place, row in enumerate(rows):
            self.read_image_into(pixels[place], row)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def read_image_into(self, pixels: NDArray[np.uint8], row: int) -> None:
        """Decodes a crop into (S, S, 3) uint8 RGB."""
        content = self.read_member(row, "jpg")
        try:
            came = decode_jpeg(content, buffer=pixels).shape
        except ValueError as error:  # includes crops larger than the buffer
            raise self._damage(row, "jpg", f"is no crop ({first_line(error)})") from None
        if came != pixels.shape:
            raise self._damage(row, "jpg", f"has {came[1]} x {came[0]} pixels, needed {self.size}")

    def read_part_labels(self, row: int, smallest_on_top: bool = False) -> NDArray[np.uint8]:
        """(S, S) uint8 part labels, 0 = none, `IGNORED` (255) = to be left out of every score."""
        return self._read_map(row, "parts_small.png" if smallest_on_top else "parts.png")

    def read_object_mask(self, row: int) -> NDArray[np.bool_]:
        """(S, S) bool, True on the object."""
        mask: NDArray[np.bool_] = self._read_map(row, "object.png") > 0
        return mask

    def read_description(self, row: int) -> dict[str, Any]:
        """The sample's `.json` member; see `Record.description`. Raises DamageError."""
        try:
            description = json.loads(self.read_member(row, "json"))
        except (ValueError, RecursionError):
            description = None
        if not isinstance(description, dict):
            raise self._damage(row, "json", "is no JSON object")
        return description

    def _read_map(self, row: int, member: str) -> NDArray[np.uint8]:
        """(S, S) uint8. The size is checked before decoding, so that no small file expands to gigabytes."""
        content = self.read_member(row, member)
        try:
            return decode_image(content, (self.size, self.size), "L")
        except Exception as error:  # Pillow raises anything on damaged files
            raise self._damage(row, member, f"is no label map ({first_line(error)})") from None

    def _damage(self, row: int, member: str, what: str) -> DamageError:
        return DamageError(f"{self.path}: {self.index.key(row)}.{member} {what}; {MEND}")


class ShardReaders:
    """The readers of a data set's shards, opened when first needed; the least recently used are closed beyond 64.

    Where a process may open few files (`ulimit -n`), fewer shards stay open.
    """

    def __init__(
        self, dataset: ShardDataset, entries: Sequence[ShardEntry], read_index: Callable[[int], ShardIndex]
    ) -> None:
        self._dataset = dataset
        self._entries = entries
        self._read_index = read_index
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = _MAX_OPEN_SHARDS if limit < 0 else max(1, min(_MAX_OPEN_SHARDS, limit // _SHARE_OF_FILES))

    def __getitem__(self, shard: int) -> ShardReader:
        if shard not in self._open:
            if self._dataset.remote is not None:
                for other in [other for other, reader in self._open.items() if reader.is_evicted]:
                    del self._open[other]
            self._open[shard] = ShardReader(self._dataset, self._entries[shard], self._read_index(shard))
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


MEND = "copy the shard again, or make the shards again with python -m slotscops.shard"
