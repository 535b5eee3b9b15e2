"""Annotations: read as SciPy reads them, no damage unseen."""

import io
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from annotations import (
    HORSE,
    Described,
    annotation,
    described_objects,
    matlab_bytes,
    message,
    objects_struct,
    rectangle,
    structs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part import matlab
from slotscops.datasets.pascal_part.annotation import read_annotation


@given(objects=described_objects(), compress=st.booleans())
@settings(max_examples=150, deadline=None)
def test_an_annotation_written_by_scipy_reads_back_equal(objects: list[Described], compress: bool) -> None:
    found = read_annotation(io.BytesIO(annotation(objects, compress)))
    assert [item.class_name for item in found] == [name for name, _, _ in objects]
    for item, (_, mask, parts) in zip(found, objects, strict=True):
        assert item.mask.dtype == np.bool_
        assert item.mask.flags.writeable
        np.testing.assert_array_equal(item.mask, mask)
        assert [name for name, _ in item.parts] == [name for name, _ in parts]
        for (_, read), (_, written) in zip(item.parts, parts, strict=True):
            assert read.dtype == np.bool_
            np.testing.assert_array_equal(read, written)


def test_an_annotation_reads_alike_from_a_path_a_string_and_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(annotation([HORSE, ("table", HORSE[1], [])]))
    with path.open("rb") as file:
        for found in (read_annotation(path), read_annotation(str(path)), read_annotation(file)):
            assert [item.class_name for item in found] == ["horse", "diningtable"]
            assert found[1].parts == []


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.uint16, np.int32, np.float32, np.float64])
def test_masks_of_any_type_of_number_are_read(dtype: Any) -> None:
    (item,) = read_annotation(io.BytesIO(annotation([("boat", HORSE[1].astype(dtype), [])])))
    np.testing.assert_array_equal(item.mask, HORSE[1])


def test_other_variables_and_fields_are_passed_over() -> None:
    extra = structs(("a", "b"), [(np.array([["x", 1]], dtype=object), 1j)])
    anno = structs(("more", "imname", "objects"), [(extra, "a", objects_struct([HORSE]))])
    file = io.BytesIO()
    scipy.io.savemat(file, {"before": {"x": 1}, "anno": anno, "after": scipy.sparse.eye(3, format="csc")})
    assert len(read_annotation(io.BytesIO(file.getvalue()))) == 1


def test_a_big_endian_file_is_read() -> None:
    # Written by hand after MathWorks' description of the format: nobody's savemat writes them any more.
    def element(kind: int, content: bytes) -> bytes:
        return kind.to_bytes(4) + len(content).to_bytes(4) + content + bytes(-len(content) % 8)

    def matrix(kind: int, shape: tuple[int, int], body: bytes, name: bytes = b"") -> bytes:
        flags = element(6, kind.to_bytes(4) + bytes(4))
        return element(14, flags + element(5, b"".join(n.to_bytes(4) for n in shape)) + element(1, name) + body)

    def struct(names: list[bytes], values: list[bytes], name: bytes = b"") -> bytes:
        small = bytes([0, 4, 0, 5]) + (8).to_bytes(4)  # a small element: the names' length
        return matrix(
            2, (1, 1), small + element(1, b"".join(n.ljust(8, b"\0") for n in names)) + b"".join(values), name
        )

    mask = matrix(9, (2, 3), element(2, bytes([1, 0, 0, 1, 1, 0])))
    name = matrix(4, (1, 3), element(4, "cow".encode("utf-16-be")))
    nothing = matrix(6, (0, 0), element(9, b""))
    anno = struct([b"objects"], [struct([b"class", b"mask", b"parts"], [name, mask, nothing])], b"anno")
    (item,) = read_annotation(io.BytesIO(b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + anno))
    assert item.class_name == "cow"
    assert item.mask.astype(int).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_a_file_cut_short_anywhere_is_an_error() -> None:
    whole = annotation([HORSE])
    for compress in (True, False):
        whole = annotation([("horse", HORSE[1][:9, :9], [("head", HORSE[1][:9, :9])])], compress)
        for length in range(len(whole)):
            message(whole[:length])


@pytest.mark.parametrize("compress", [True, False])
def test_flipped_bits_give_a_result_or_a_user_error_and_nothing_else(compress: bool) -> None:
    # SciPy's own reader ends the process on such files within a few thousand flips.
    small = rectangle(7, 6, (2, 1, 5, 4))
    whole = annotation([("horse", small, [("head", small), ("tail", small)]), ("cow", small, [])], compress)
    generator = random.Random(0)
    num_errors = 0
    for _ in range(4000):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 1, 2, 4])):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        try:
            read_annotation(io.BytesIO(bytes(content)))
        except UserError:
            num_errors += 1
    assert num_errors > 2000


def test_no_flipped_bit_of_a_compressed_annotation_goes_unseen() -> None:
    whole = annotation([HORSE])
    unnoticed = []
    for place in range(128, len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            try:
                (item,) = read_annotation(io.BytesIO(bytes(content)))
            except UserError:
                continue
            unnoticed.append(place)
            np.testing.assert_array_equal(item.mask, HORSE[1])
            np.testing.assert_array_equal(item.parts[0][1], HORSE[2][0][1])
    # Padding before the checksum, and copies of zeros from elsewhere among the zeros: the same content all the same.
    assert len(unnoticed) < 20


def test_a_count_that_leaves_objects_unread_is_an_error() -> None:
    whole = annotation([HORSE, HORSE, HORSE], compress=False)
    three, two = ((1).to_bytes(4, "little") + count.to_bytes(4, "little") for count in (3, 2))
    assert whole.count(three) == 1  # the shape of the objects
    assert "a matrix's size does not fit its content" in message(whole.replace(three, two))


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_a_user_error(content: bytes) -> None:
    message(content)
    message(annotation([])[:128] + content) if content else None


def with_objects(objects: Any) -> bytes:
    return matlab_bytes(structs(("imname", "objects"), [("a", objects)]))


def with_mask(mask: Any) -> bytes:
    return annotation([("horse", mask, [])])


def version_4(name: str = "anno") -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {name: np.eye(3)}, format="4")
    return file.getvalue()


BROKEN = {
    "is no MATLAB 5 file": b"no MATLAB at all" * 20,
    "is a MATLAB 7.3 file, needed version 5": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" * 9,
    "is a MATLAB 7.3 file, needed version 5|": b"MATLAB 7.0 MAT-file, HDF5 schema 0.5".ljust(512) + b"\x89HDF" * 9,
    "is a MATLAB 7.3 file, needed version 5||": bytes(124) + b"\x00\x02IM" + bytes(1920) + b"\x89HDF" * 9,
    "is a MATLAB 4 file, needed version 5": version_4(),
    "is a MATLAB 4 file, needed version 5|": version_4("my_anno"),
    "lacks the struct 'anno'": matlab_bytes(1, "other"),
    "lacks the struct 'anno'|": matlab_bytes(np.eye(3)),
    "has 2 structs 'anno', needed one": matlab_bytes(structs(("a",), [(1,), (2,)])),
    "lacks the structs 'objects'": matlab_bytes(structs(("imname",), [("a",)])),
    "lacks the structs 'objects'|": with_objects("text"),
    "object 0 lacks its name, 'class'": with_objects(structs(("mask", "parts"), [(HORSE[1], [])])),
    "object 0 lacks its name, 'class'|": with_objects(structs(("class", "mask"), [(3, HORSE[1])])),
    "object 0 lacks a 'mask' of H x W pixels": with_objects(structs(("class", "parts"), [("cow", [])])),
    "lacks the structs 'parts'": with_objects(structs(("class", "mask"), [("cow", HORSE[1])])),
    "object 0 lacks a 'mask' of H x W pixels|": with_mask(np.zeros((2, 2, 2), np.uint8)),
    "object 0 lacks a 'mask' of H x W pixels||": with_mask(np.zeros((0, 0), np.uint8)),
    "mask of type uint8 with other values than 0 and 1": with_mask(np.uint8([[0, 2]])),
    "mask of type int8 with other values than 0 and 1": with_mask(np.int8([[0, -1]])),
    "mask of type float64 with other values": with_mask(np.float64([[0, 0.5]])),
    "part head of object 0 has a mask of 2 x 3, its object of 60 x 40": annotation(
        [("horse", HORSE[1], [("head", np.ones((3, 2), np.uint8))])]
    ),
    "object 1 has a mask of 2 x 3, object 0 of 60 x 40": annotation([HORSE, ("cow", np.ones((3, 2), np.uint8), [])]),
}


@pytest.mark.parametrize("wanted", BROKEN)
def test_each_way_of_being_broken_has_its_own_line(wanted: str) -> None:
    assert wanted.rstrip("|") in message(BROKEN[wanted])


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "2008_000001.mat"
    with pytest.raises(UserError, match=r"2008_000001\.mat: cannot be read \(No such file"):
        read_annotation(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"2008_000001\.mat: is no MATLAB 5 file"), path.open("rb") as file:
        read_annotation(file)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_annotation(tmp_path)


def test_absurd_sizes_are_refused_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "_MAX_INFLATED_BYTES", 10_000)
    assert "decompresses to more than 10000 bytes" in message(with_mask(np.zeros((200, 200), np.uint8)))
    monkeypatch.setattr(matlab, "MAX_MATLAB_BYTES", 300)
    assert "has more than 300 bytes" in message(bytes(301))


def raw_element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def raw_structs(shape: list[int], names: list[bytes], values: bytes, length: int = 8) -> bytes:
    """A file with the struct array `anno`, written by hand: no library writes absurd ones."""
    content = raw_element(6, struct.pack("<II", 2, 0)) + raw_element(5, struct.pack(f"<{len(shape)}i", *shape))
    content += raw_element(1, b"anno") + struct.pack("<HHi", 5, 4, length)
    content += raw_element(1, b"".join(name.ljust(length, b"\0") for name in names)) + values
    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + raw_element(15, zlib.compress(raw_element(14, content)))


def inflating_element(num_bytes: int) -> bytes:
    """Compressed zeros. Each piece ends with a full flush, so that it can be repeated as it is."""
    stream = zlib.compressobj()
    head = stream.compress(b"") + stream.flush(zlib.Z_FULL_FLUSH)
    piece = stream.compress(bytes(1 << 24)) + stream.flush(zlib.Z_FULL_FLUSH)
    return raw_element(15, head + piece * (num_bytes >> 24))


EMPTY = struct.pack("<II", 14, 0)
BOMBS = {
    "has more than 100,000 matrices": raw_structs([1, 3_000_000], [b"a"], EMPTY * 3_000_000),
    "has more than 100,000 matrices|": annotation([])[:128] + EMPTY * 3_000_000,
    "decompresses to more than 256000000 bytes": annotation([])[:128] + inflating_element(4 << 30),
    "has structs of 101 fields": raw_structs([1, 1], [b"a"] * 101, EMPTY * 101),
    "has structs of 1 fields with names of 5,000 bytes": raw_structs([1, 1], [b"a" * 5000], EMPTY, length=5000),
    "needed a matrix's size": raw_structs([2**31 - 1] * 100_000, [b"a"], EMPTY),
    "is cut short or damaged": raw_structs([2**31 - 1] * 32, [b"a"], EMPTY),
    "has a text of 1,000,000 bytes": matlab_bytes(structs(("imname", "objects"), [("a" * 1_000_000, [])])),
}


@pytest.mark.parametrize("wanted", BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(wanted: str) -> None:
    content = BOMBS[wanted]
    assert len(content) < 30_000_000
    started = time.monotonic()
    tracemalloc.start()
    try:
        assert wanted.rstrip("|") in message(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 350_000_000  # the bound on what is decompressed, and the file
    assert time.monotonic() - started < 20


def test_compressed_elements_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((90, 90), np.uint8)
    file = io.BytesIO()
    scipy.io.savemat(file, {"one": mask, "two": mask}, do_compression=True)
    monkeypatch.setattr(matlab, "_MAX_INFLATED_BYTES", 10_000)
    assert "decompresses to more than 10000 bytes" in message(file.getvalue())


def nested(depth: int) -> dict[str, Any]:
    return {"inner": nested(depth - 1)} if depth else {"inner": 1}


@pytest.mark.parametrize("other", [{}, nested(12), "text", 1 + 2j, scipy.sparse.eye(4), np.array([1, "x"], object)])
def test_other_variables_beside_the_annotation_do_no_harm(other: Any) -> None:
    file = io.BytesIO()
    anno = structs(("imname", "objects"), [("a", objects_struct([HORSE]))])
    scipy.io.savemat(file, {"before": other, "anno": anno, "behind": other})
    file.seek(0)
    assert [item.class_name for item in read_annotation(file)] == ["horse"]


@pytest.mark.parametrize("nothing", [np.empty((0, 0)), np.empty((0, 0), object), {}], ids=["matrix", "cell", "struct"])
def test_an_object_without_parts_may_say_so_with_anything_empty(nothing: Any) -> None:
    fields = ("class", "class_ind", "mask", "parts")
    rows = structs(fields, [("horse", np.uint8([[1]]), HORSE[1], nothing)])
    (item,) = read_annotation(io.BytesIO(matlab_bytes(structs(("imname", "objects"), [("a", rows)]))))
    assert (item.class_name, item.parts) == ("horse", [])


def test_blanks_around_a_name_and_what_cannot_be_shown_cost_no_object() -> None:
    part = HORSE[2][0][1]
    described = ("horse\u00a0", HORSE[1], [(" head ", part), ("ta\x1bil", part)])
    (item,) = read_annotation(io.BytesIO(annotation([described])))
    assert (item.class_name, [name for name, _ in item.parts]) == ("horse", ["head", "ta\ufffdil"])


def test_sizes_in_unsigned_numbers_are_read() -> None:
    content = annotation([HORSE], compress=False)
    signed, unsigned = struct.pack("<II2i", 5, 8, 40, 60), struct.pack("<II2i", 6, 8, 40, 60)
    assert content.count(signed) == 2  # of the mask of the object and of its part
    (item,) = read_annotation(io.BytesIO(content.replace(signed, unsigned)))
    assert item.mask.shape == (40, 60)
    lengths = content.replace(struct.pack("<HH", 5, 4), struct.pack("<HH", 6, 4))  # of the names of fields
    assert lengths != content
    assert len(read_annotation(io.BytesIO(lengths))) == 1


@pytest.mark.parametrize("name", ["2008_000001", "head"])
def test_a_name_of_broken_utf_8_is_read_as_scipy_reads_it_and_costs_no_other(name: str) -> None:
    broken = b"\xff" + name.encode()[1:]
    content = annotation([HORSE], compress=False).replace(name.encode(), broken)
    assert broken in content
    scipy_part = scipy.io.loadmat(io.BytesIO(content), squeeze_me=True)["anno"]["objects"].item()["parts"].item()
    (item,) = read_annotation(io.BytesIO(content))
    assert item.class_name == "horse"
    assert item.parts[0][0] == scipy_part["part_name"].item() == ("\ufffdead" if name == "head" else "head")
