"""The structs of a MATLAB 5 file, read so that no damage to the file can harm more than the file.

SciPy's reader ends the whole process on some damaged files: in 6 of 6 runs of at most 20,000 random byte changes with
SciPy 1.17.1. So the few kinds of matrix that an annotation has are read here, with every length checked against the
bytes that are there. The tests compare it with SciPy's on real and generated files.

Source: MATLAB, MAT-File Format, chapter "Level 5 MAT-File Format".
"""

import math
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bounds on what a file may hold, so that a small file costs little time and memory whatever it says.
MAX_MATLAB_BYTES = 64_000_000  # of a file; real annotations have up to 0.1 MB
_MAX_INFLATED_BYTES = 256_000_000  # of all its compressed elements; real annotations have up to some 40 MB
_MAX_MATRICES = 100_000  # nested ones included; 20 objects with 30 parts each have 1,300
_MAX_NAME_BYTES = 4096  # of a text, and of a name of a variable or field
_MAX_FIELDS = 100  # of a struct; real annotations have 4
_MAX_DIMENSIONS = 32  # of a matrix, as in NumPy
_INFLATE_STEP = 2048  # bytes; masks shrink 200-fold, so this gives pieces that stay in the processor's cache
_MAX_DEPTH = 8  # of structs within structs; real annotations have 3
_MATRIX, _COMPRESSED = 14, 15  # element types; the next two tables have the others
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}  # others are ASCII
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)  # matrix classes
_COMPLEX = 0x800


class MatlabError(Exception):
    """What is wrong with a file; its name is the caller's to add."""

    remedy = "fetch the file again"


class MatlabVersionError(MatlabError):
    """The file is whole, but of a version that is not read."""

    remedy = "open it in MATLAB and save it with: save -v7"


def read_matlab_structs(content: bytes, variable: str) -> list[dict[str, Any]]:
    """A struct array of a MATLAB 5 file.

    Returns:
        One dict a struct, by field: an array as stored, a str, again a list of dicts, or None for other kinds.

    Raises:
        MatlabError: the file is none, is damaged, holds more than an annotation can, or has no such structs.
    """
    if len(content) > MAX_MATLAB_BYTES:
        raise MatlabError(f"has more than {MAX_MATLAB_BYTES} bytes, as no annotation of PASCAL-Part has")
    # MATLAB puts 512 bytes of text before the HDF5 file, and some versions call themselves 7.0 there.
    is_hdf5 = any(content[at : at + 4] == b"\x89HDF" for at in (0, 512, 1024, 2048))
    if is_hdf5 or content[:10] == b"MATLAB 7.3" or content[124:128] in (b"\x00\x02IM", b"\x02\x00MI"):
        raise MatlabVersionError("is a MATLAB 7.3 file, needed version 5")
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(content[124:128])
    if order is None and _is_version_4(content):
        raise MatlabVersionError("is a MATLAB 4 file, needed version 5")
    if order is None:
        raise MatlabError("is no MATLAB 5 file")
    file = _File(order)
    elements = _Elements(memoryview(bytearray(content))[128:], file)  # masks are views of it: writable ones
    found = None
    while elements.data:  # to the end, so that a file cut short is noticed
        kind, payload = elements.take()
        if kind == _COMPRESSED:
            kind, payload = _Elements(memoryview(file.inflate(payload)), file).take()
        if kind != _MATRIX:
            raise MatlabError("is damaged, needed a matrix")
        name, value = _read_matrix(payload, file, depth=0, wanted=variable)
        found = value if name == variable else found
    if not isinstance(found, list):
        raise MatlabError(f"lacks the struct '{variable}'")
    return found


def _is_version_4(content: bytes) -> bool:
    """Whether a file begins as version 4 does: type, rows, columns, imaginary flag, and length of the first name.

    Source: MATLAB, MAT-File Format, chapter "Level 4 MAT-File Format".
    """
    for order in "<>" if len(content) > 20 else "":
        kind, rows, columns, imaginary, length = struct.unpack(f"{order}5i", content[:20])
        name = content[20 : 20 + length] if 0 < length < 64 else b""
        is_name = name[-1:] == b"\0" and name[:-1].replace(b"_", b"").isalnum()
        is_type = kind // 1000 in range(5) and kind // 10 % 10 in range(6) and kind % 10 in range(3)
        if is_type and is_name and min(rows, columns) >= 0 and imaginary in (0, 1):
            return True
    return False


class _File:
    """The byte order of a file, and how much of what a file may hold was read so far."""

    def __init__(self, order: str) -> None:
        self.order = order  # "<" or ">"
        self._num_matrices = self._num_inflated = 0

    def count_matrices(self, number: int) -> None:
        """Call it before reading so many matrices. Raises MatlabError if the file has too many of them."""
        self._num_matrices += number
        if self._num_matrices > _MAX_MATRICES:
            raise MatlabError(f"has more than {_MAX_MATRICES:,} matrices, as no annotation has")

    def inflate(self, payload: memoryview) -> bytearray:
        """Checks the checksum too: no flipped bit of compressed data goes unseen."""
        stream, content = zlib.decompressobj(), bytearray()
        allowed = _MAX_INFLATED_BYTES - self._num_inflated
        try:
            for start in range(0, len(payload), _INFLATE_STEP):
                content += stream.decompress(payload[start : start + _INFLATE_STEP], allowed + 1 - len(content))
                if len(content) > allowed:
                    raise MatlabError(f"decompresses to more than {_MAX_INFLATED_BYTES} bytes, as no annotation does")
        except (zlib.error, MemoryError):
            raise MatlabError("is damaged, its content does not decompress") from None
        if not stream.eof:
            raise MatlabError("is cut short or damaged")
        self._num_inflated += len(content)
        return content


class _Elements:
    """The elements of a file or matrix, one after the other."""

    def __init__(self, data: memoryview, file: _File) -> None:
        self.data, self.file, self._order = data, file, file.order  # data: what is not taken yet

    def take(self) -> tuple[int, memoryview]:
        """Type and payload of the next element."""
        kind, size = struct.unpack(f"{self._order}II", head := self._cut(8))
        if kind >> 16:  # a small element: size and type share the first four bytes, the payload has the others
            kind, size = kind & 0xFFFF, min(4, kind >> 16)
            return kind, head[4 : 4 + size]
        payload = self._cut(size)
        if kind != _COMPRESSED:
            self.data = self.data[-size % 8 :]
        return kind, payload

    def take_numbers(self) -> NDArray[Any]:
        kind, payload = self.take()
        dtype = np.dtype(self._order + _NUMBERS.get(kind, "V0"))
        if not dtype.itemsize or len(payload) % dtype.itemsize:
            raise MatlabError("is damaged, needed numbers")
        return np.frombuffer(payload, dtype)

    def take_text(self) -> str:
        """A name; as in SciPy, U+FFFD stands for bytes that are no text, so that one of them costs no other name."""
        kind, payload = self.take()
        if len(payload) > _MAX_NAME_BYTES:
            raise MatlabError(f"has a text of {len(payload):,} bytes, as no annotation has")
        encoding = _TEXTS.get(kind, "ascii")
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if self._order == "<" else "-be"
        return str(payload, encoding, errors="replace")

    def _cut(self, size: int) -> memoryview:
        if size > len(self.data):
            raise MatlabError("is cut short or damaged")
        head, self.data = self.data[:size], self.data[size:]
        return head


def _read_matrix(data: memoryview, file: _File, depth: int, wanted: str | None = None) -> tuple[str, Any]:
    """A matrix's name and value; the value is not read, and is None, where another name is wanted."""
    if depth == 0:  # those in structs are counted there, before any of them is read
        file.count_matrices(1)
    if not data:
        return "", np.empty((0, 0))
    elements = _Elements(data, file)
    flags = elements.take_numbers()
    if flags.dtype.kind not in "iu" or len(flags) != 2:
        raise MatlabError("is damaged, needed a matrix's class")
    kind = int(flags[0]) & 0xFF
    if kind not in (_CELL, _STRUCT, _CHAR, *_NUMERIC) or int(flags[0]) & _COMPLEX:
        return "", None
    shape, name = elements.take_numbers(), elements.take_text()
    if wanted not in (None, name):
        return name, None
    # The format wants signed numbers here; some writers use unsigned ones, which SciPy reads as well.
    if shape.dtype.kind not in "iu" or not 2 <= len(shape) <= _MAX_DIMENSIONS or shape.min() < 0:
        raise MatlabError("is damaged, needed a matrix's size")
    value: Any
    if kind == _CELL:  # only an empty one has a meaning here, as an empty matrix has
        return name, None if shape.all() else np.empty((0, 0))
    if kind == _STRUCT:
        value = _read_structs(elements, math.prod(shape.tolist()), depth + 1)
    elif kind == _CHAR:
        value = elements.take_text()
    else:
        value = elements.take_numbers()
        if value.size != math.prod(shape.tolist()) or len(shape) > 4:
            raise MatlabError("is damaged, a matrix's size does not fit its content")
        value = value.reshape(shape, order="F")
    if elements.data:
        raise MatlabError("is damaged, a matrix's size does not fit its content")
    return name, value


def _read_structs(elements: _Elements, count: int, depth: int) -> list[dict[str, Any]]:
    lengths, (_, joined) = elements.take_numbers(), elements.take()
    length = int(lengths[0]) if len(lengths) and lengths.dtype.kind in "iu" else 0
    if length < 1 or len(joined) % length or depth > _MAX_DEPTH:
        raise MatlabError("is damaged, needed names of fields")
    if len(joined) // length > _MAX_FIELDS or length > _MAX_NAME_BYTES:
        raise MatlabError(
            f"has structs of {len(joined) // length:,} fields with names of {length:,} bytes, as no annotation has"
        )
    names = [bytes(joined[at : at + length]).split(b"\0")[0].decode("latin-1") for at in range(0, len(joined), length)]
    if not names:  # `struct()`: whatever their number, there is nothing in them
        return []
    if count * len(names) * 8 > len(elements.data):
        raise MatlabError("is cut short or damaged")
    elements.file.count_matrices(count * len(names))
    return [{name: _read_field(elements, depth) for name in names} for _ in range(count)]


def _read_field(elements: _Elements, depth: int) -> Any:
    kind, payload = elements.take()
    if kind != _MATRIX:
        raise MatlabError("is damaged, needed a matrix")
    return _read_matrix(payload, elements.file, depth)[1]
