"""One shard's teacher features as a safetensors file: sparse if that is smaller, else dense. Both are lossless.

If 8 bits are asked for, a dense file holds each channel of each sample as its lowest value, a step and a number of
steps from 0 to 255 for each cell. A value is then off by at most half a step, 1/510 of the channel's range in this
sample, and by its rounding to float16. Sparse files, where they are smaller still, stay lossless.

relu5_4 is 92 to 97 % zeros on real photos, so 4 bytes for each non-zero value (a float16 and its position) take less
room than 2 bytes for every value. A map of more than 65,536 values is cut into segments of that many, so that a
position fits in 16 bits.

Each row has a crc32 of all that it is decoded from, and each file names the shard that it belongs to. Flipped bits and
swapped files are therefore found.

Shapes: N samples, C channels on an h x w grid, V = C h w values a map, Z non-zero values of all samples.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from slotscops.core.errors import DamageError, UserError, first_line

if TYPE_CHECKING:  # loader workers read no settings
    from slotscops.config import FeatureStore

_SEGMENT = 1 << 16  # number of different uint16 positions
_SIGN_OFF, _INFINITY = np.uint16(0x7FFF), np.uint16(0x7C00)  # bits of a float16; those of NaN are above infinity's
_MAX_VALUES = 1 << 28  # values of one map; more means a damaged file
_MAX_STEPS = 255


def encode(features: NDArray[np.float16], label: str = "", store: "FeatureStore" = "float16") -> bytes:
    """The file's content for (N, C, h, w) features, in the smaller of the two encodings.

    Args:
        label: what the rows belong to; see `FeatureShard.label`.
        store: how a dense file holds its values. `int8` needs finite features.
    """
    num_samples = len(features)
    maps = features.reshape(num_samples, int(np.prod(features.shape[1:])))
    shape = np.array(features.shape[1:], np.int64)
    samples, positions = np.nonzero(maps.view(np.uint16))  # compares bits, so that -0.0 and nan are kept
    segments_per_map = _num_segments(shape)
    segments = samples * segments_per_map + positions // _SEGMENT
    sparse: dict[str, NDArray[Any]] = {
        "ends": np.cumsum(np.bincount(segments, minlength=num_samples * segments_per_map), dtype=np.int64),
        "positions": (positions % _SEGMENT).astype(np.uint16),
        "shape": shape,
        "values": maps[samples, positions],
    }
    metadata = {"label": label}  # a single entry, because safetensors writes several in any order
    num_dense = features.nbytes
    if store == "int8":
        num_dense = features.size + 6 * num_samples * int(shape[0])  # a lowest value and a step for each channel
    if sum(array.nbytes for array in sparse.values()) < num_dense:
        ends = sparse["ends"].reshape(num_samples, segments_per_map)
        starts = [0, *ends[:-1, -1]]
        crc32 = [
            _row_crc32(sparse["positions"][start : row[-1]], sparse["values"][start : row[-1]], (row - start).tolist())
            for start, row in zip(starts, ends, strict=True)
        ]
        return save(sparse | {"crc32": np.array(crc32, np.uint32)}, metadata)
    if store == "int8":
        return save(_quantise_all(features), metadata)
    dense = np.ascontiguousarray(features)
    return save({"features": dense, "crc32": np.array([zlib.crc32(row) for row in dense], np.uint32)}, metadata)


class FeatureShard:
    """One shard's features, memory-mapped. `shard[i]` is row i, dense.

    Raises:
        UserError: the file is missing, cut short, or not a feature file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode = _inode(path)
        self._finite_rows: set[int] = set()  # rows that were looked at; their crc32 says that they stay as they are
        tensors, self.label = _map_tensors(path)  # label: which shard of which cache these rows belong to
        self._dense: NDArray[np.float16] | None = tensors.get("features")
        self._quantised: NDArray[np.uint8] | None = tensors.get("quantised")
        if self._dense is not None and self._dense.ndim == 4 and self._dense.dtype == np.float16:
            self.shape = tuple(int(side) for side in self._dense.shape[1:])
            self._num_samples = len(self._dense)
            self._crc32 = self._check_crc32(tensors)
            return
        if self._quantised is not None:
            self._open_quantised(tensors)
            self._crc32 = self._check_crc32(tensors)
            return
        names = ("ends", "positions", "values", "shape")
        if not set(names) <= set(tensors) or tensors["shape"].shape != (3,) or tensors["shape"].dtype != np.int64:
            raise UserError(f"{path}: holds no features but {sorted(tensors)}; {_REBUILD}")
        self._ends, self._positions, self._values = (tensors[name] for name in names[:3])
        self.shape = tuple(int(side) for side in tensors["shape"])
        if min(self.shape) < 1 or self.num_values > _MAX_VALUES:
            raise UserError(f"{path}: is damaged (maps of shape {self.shape}); {_REBUILD}")
        self._num_segments = _num_segments(self.shape)
        self._num_samples = len(self._ends) // self._num_segments
        self._check_sparse()
        self._crc32 = self._check_crc32(tensors)

    @property
    def is_evicted(self) -> bool:
        """Whether the opened file was replaced or deleted and takes disk space only because it is still open."""
        return _inode(self.path) != self._inode

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, row: int) -> Tensor:
        """(C, h, w) float16 features of one row; negative rows count from the end."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        return self.read_rows([row % len(self)])[0]

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), C, h, w) float16, dense."""
        features = torch.zeros(len(rows), *self.shape, dtype=torch.float16)
        maps = features.view(len(rows), self.num_values).numpy()
        for place, row in enumerate(rows):
            self.read_row_into(row, maps[place])
        return features

    def read_row_into(self, row: int, values: NDArray[np.float16]) -> None:
        """Writes one row into (V,) zeros. Batches use this, because nearly every row of a batch lies in another shard.

        Raises:
            DamageError: its crc32 differs, or it holds NaN or infinity.
        """
        if self._dense is not None:
            self._check_row(row, zlib.crc32(self._dense[row].data))
            self._check_finite(row, self._dense[row])
            values[:] = self._dense[row].reshape(-1)
        elif self._quantised is not None:
            steps, low, step = self._quantised[row], self._lowest[row], self._step[row]
            self._check_row(row, _quantised_crc32(steps, low, step))
            self._check_finite(row, _highest(low, step))
            _dequantise(steps, low, step, values)
        else:
            self._scatter_row(row, values)

    def num_sparse_values(self, row: int) -> int | None:
        """Z, the number of values that `read_sparse_row` returns, or None if this shard is not sparse.

        Nothing of the row is read or checked. If the row is damaged, the number may be wrong, but never negative.
        """
        if self.encoding != "sparse":
            return None
        first = row * self._num_segments
        start = int(self._ends[first - 1]) if first else 0
        return int(self._ends[first + self._num_segments - 1]) - start

    def read_sparse_row(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float16]] | None:
        """(Z,) places and values of one row, or None if this shard is not sparse.

        Raises:
            DamageError: its crc32 differs.
        """
        if self.encoding != "sparse":
            return None
        positions, values, ends = self._checked_row(row)
        places = positions.astype(np.int32)
        begin = 0
        for segment, end in enumerate(ends):
            places[begin:end] += segment * _SEGMENT
            begin = end
        if len(places) and places.max() >= self.num_values:
            raise self._damage(row, "a position beyond the map")
        return places, values

    @property
    def num_values(self) -> int:
        """V, values of one dense map."""
        return math.prod(self.shape)

    @cached_property
    def encoding(self) -> str:
        if self._quantised is not None:
            return "int8"
        return "sparse" if self._dense is None else "dense"

    @property
    def has_negative(self) -> bool:
        """True if any value is negative, which features after a ReLU never are."""
        if self._quantised is not None:
            return bool((self._lowest < 0).any())
        return bool(((self._values if self._dense is None else self._dense) < 0).any())

    def rows_not_finite(self) -> list[int]:
        """Rows that hold NaN or infinity."""
        if self._dense is not None:
            return [row for row, values in enumerate(self._dense) if _largest_bits(values) >= _INFINITY]
        if self._quantised is not None:
            pairs = enumerate(zip(self._lowest, self._step, strict=True))
            return [row for row, (low, step) in pairs if _largest_bits(_highest(low, step)) >= _INFINITY]
        places = np.flatnonzero((self._values.view(np.uint16) & _SIGN_OFF) >= _INFINITY)
        segments = np.searchsorted(self._ends, places, side="right")
        return sorted({int(segment) // self._num_segments for segment in segments})

    def _checked_row(self, row: int) -> tuple[NDArray[np.uint16], NDArray[np.float16], list[int]]:
        """(Z,) positions in their segments and values of one row, and where each segment ends."""
        first = row * self._num_segments
        start = int(self._ends[first - 1]) if first else 0
        ends = (self._ends[first : first + self._num_segments] - start).tolist()
        positions, row_values = self._positions[start : start + ends[-1]], self._values[start : start + ends[-1]]
        self._check_row(row, _row_crc32(positions, row_values, ends))
        self._check_finite(row, row_values)
        return positions, row_values, ends

    def _scatter_row(self, row: int, values: NDArray[np.float16]) -> None:
        positions, row_values, ends = self._checked_row(row)
        begin = 0
        for segment, end in enumerate(ends):
            window = values[segment * _SEGMENT :]
            try:
                # NumPy scatters with intp three times as fast as with uint16, including the conversion (1,379 values).
                window[positions[begin:end].astype(np.intp)] = row_values[begin:end]
            except IndexError:
                raise self._damage(row, "a position beyond the map") from None
            begin = end

    def _check_row(self, row: int, crc32: int) -> None:
        if crc32 != self._crc32[row]:
            raise self._damage(row, "crc32 differs")

    def _check_finite(self, row: int, values: NDArray[np.float16]) -> None:
        """Looks at a row once: this takes 2 microseconds, each reading of a sparse row takes 5."""
        if row not in self._finite_rows:
            if _largest_bits(values) >= _INFINITY:
                raise self._damage(row, "it holds NaN or infinity")
            self._finite_rows.add(row)

    def _damage(self, row: int, what: str) -> DamageError:
        return DamageError(f"{self.path}: row {row} is damaged ({what}); {_REBUILD}")

    def _check_crc32(self, tensors: dict[str, NDArray[Any]]) -> NDArray[np.uint32]:
        crc32 = tensors.get("crc32")
        if crc32 is None or crc32.dtype != np.uint32 or crc32.shape != (self._num_samples,):
            raise UserError(f"{self.path}: holds no crc32 of each row; {_REBUILD}")
        return crc32

    def _open_quantised(self, tensors: dict[str, NDArray[Any]]) -> None:
        steps = tensors["quantised"]
        self._lowest: NDArray[np.float16] = tensors.get("lowest", np.empty(0))
        self._step: NDArray[np.float32] = tensors.get("step", np.empty(0))
        kinds = [array.dtype.name for array in (steps, self._lowest, self._step)]
        is_aligned = steps.ndim == 4 and steps.shape[:2] == self._lowest.shape == self._step.shape
        fits = is_aligned and kinds == ["uint8", "float16", "float32"] and 0 < math.prod(steps.shape[1:]) <= _MAX_VALUES
        if not fits:
            raise UserError(f"{self.path}: its arrays do not fit each other; {_REBUILD}")
        self.shape = tuple(int(side) for side in steps.shape[1:])
        self._num_samples = len(steps)

    def _check_sparse(self) -> None:
        fits = (
            self._ends.dtype == np.int64
            and self._positions.dtype == np.uint16
            and self._values.dtype == np.float16
            and len(self._ends) == self._num_samples * self._num_segments
            and self._ends.ndim == self._positions.ndim == self._values.ndim == 1
            and len(self._positions) == len(self._values) == (self._ends[-1] if len(self._ends) else 0)
            and bool((np.diff(self._ends, prepend=0) >= 0).all())
        )
        if not fits:
            raise UserError(f"{self.path}: its arrays do not fit each other; {_REBUILD}")


def _largest_bits(values: NDArray[np.float16]) -> np.uint16:
    """The bits of the largest magnitude. Comparing bits is three times as fast as `np.isfinite` (1,379 values)."""
    largest: np.uint16 = (values.view(np.uint16) & _SIGN_OFF).max(initial=0)
    return largest


def _row_crc32(positions: NDArray[np.uint16], values: NDArray[np.float16], ends: list[int]) -> int:
    """crc32 of everything that a row is decoded from: its positions, its values and the ends of its segments."""
    crc32 = zlib.crc32(values.data, zlib.crc32(positions.data))
    return crc32 if len(ends) == 1 else zlib.crc32(struct.pack(f"<{len(ends)}q", *ends), crc32)


# ---- 8 bits a value ----------------------------------------------------------------------------------------------


def _quantise_all(features: NDArray[np.float16]) -> dict[str, NDArray[Any]]:
    """The arrays of a file for (N, C, h, w) features."""
    steps = np.empty(features.shape, np.uint8)
    lowest, step = (np.empty(features.shape[:2], kind) for kind in (np.float16, np.float32))
    crc32 = np.empty(len(features), np.uint32)
    for number, row in enumerate(features):
        steps[number], lowest[number], step[number] = _quantise(row)
        crc32[number] = _quantised_crc32(steps[number], lowest[number], step[number])
    return {"quantised": steps, "lowest": lowest, "step": step, "crc32": crc32}


def _quantise(row: NDArray[np.float16]) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float32]]:
    """(C, h, w) steps, (C,) lowest values and (C,) step of one row."""
    low, high = row.min(axis=(1, 2)), row.max(axis=(1, 2))
    step = (high.astype(np.float32) - low.astype(np.float32)) / np.float32(_MAX_STEPS)
    above = row.astype(np.float32) - low.astype(np.float32)[:, None, None]
    steps = np.rint(above / np.where(step > 0, step, 1)[:, None, None])
    return steps.clip(0, _MAX_STEPS).astype(np.uint8), low, step


def _dequantise(
    steps: NDArray[np.uint8], low: NDArray[np.float16], step: NDArray[np.float32], values: NDArray[np.float16]
) -> None:
    """Writes the values of one row into (V,). torch rounds to float16 six times as fast as NumPy, to the same bits."""
    channels = torch.from_numpy(steps).flatten(1).float().mul_(torch.from_numpy(step)[:, None])
    channels += torch.from_numpy(low).float()[:, None]
    torch.from_numpy(values).view(channels.shape).copy_(channels)


def _highest(low: NDArray[np.float16], step: NDArray[np.float32]) -> NDArray[np.float16]:
    """(2 C,) the lowest and highest value that each channel can take."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged row
        return np.concatenate([low, (low.astype(np.float32) + _MAX_STEPS * step).astype(np.float16)])


def _quantised_crc32(steps: NDArray[np.uint8], low: NDArray[np.float16], step: NDArray[np.float32]) -> int:
    """crc32 of everything that a row is decoded from."""
    return zlib.crc32(steps.data, zlib.crc32(step.data, zlib.crc32(low.data)))


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _num_segments(shape: Any) -> int:
    return int(-(-int(np.prod(shape)) // _SEGMENT))


def _map_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """The arrays by name, and the label."""
    try:
        # Read through torch, whose tensors are views of the mapped file; safetensors' NumPy arrays are copies.
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, (file.metadata() or {}).get("label", "")
    except (OSError, SafetensorError, TypeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {_REBUILD}") from None


_REBUILD = "rebuild it with python -m slotscops.features"
