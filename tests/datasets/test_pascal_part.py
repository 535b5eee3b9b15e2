"""PASCAL-Part trees as people have them: read as SciPy reads them, every object accounted for, no damage unseen."""

import io
import pickle
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part import annotation as pascal_part
from slotscops.datasets.pascal_part import matlab
from slotscops.datasets.pascal_part.annotation import (
    BOX_SHARE,
    Candidate,
    ImageScan,
    read_annotation,
    read_records,
    scan_image,
    square_crop,
)
from slotscops.datasets.pascal_part.classes import (
    PART_NAMES,
    AnnotatedObject,
    check_class_names,
    paint_parts,
    part_label,
)
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, find_tree, list_images

Part = tuple[str, NDArray[Any]]
Described = tuple[str, NDArray[Any], list[Part]]  # class, mask, parts


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def structs(fields: tuple[str, ...], rows: list[tuple[Any, ...]]) -> NDArray[Any]:
    table = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        table[0, column] = row
    return table


def parts_struct(parts: list[Part]) -> NDArray[Any]:
    return structs(("part_name", "mask"), parts) if parts else np.empty((0, 0))


def objects_struct(objects: list[Described]) -> NDArray[Any]:
    rows = [(name, np.uint8([[1]]), mask, parts_struct(parts)) for name, mask, parts in objects]
    return structs(("class", "class_ind", "mask", "parts"), rows)


def matlab_bytes(anno: Any, name: str = "anno", compress: bool = True) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {name: anno}, do_compression=compress)
    return file.getvalue()


def annotation(objects: list[Described], compress: bool = True) -> bytes:
    return matlab_bytes(structs(("imname", "objects"), [("2008_000001", objects_struct(objects))]), compress=compress)


def jpeg(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "JPEG", quality=95)
    return file.getvalue()


HORSE: Described = ("horse", rectangle(60, 40, (5, 5, 45, 35)), [("head", rectangle(60, 40, (5, 5, 15, 15)))])


def write_tree(
    root: Path,
    annotations: dict[str, bytes],
    voc: str = "VOCdevkit/VOC2010",
    parts: str = "Annotations_Part",
    lists: dict[str, str] | None = None,
    photo: bytes | None = None,
) -> PascalPartTree:
    folder = root / voc
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (root / parts).mkdir(parents=True)
    for image, content in annotations.items():
        (root / parts / f"{image}.mat").write_bytes(content)
        (folder / "JPEGImages" / f"{image}.jpg").write_bytes(photo or jpeg(60, 40))
    if lists is None:
        lists = {"train.txt": "\n".join(annotations), "val.txt": ""}
    for name, text in lists.items():
        (folder / "ImageSets" / "Main" / name).write_text(text)
    return find_tree(root)


def scan(tree: PascalPartTree, image: str = "a", classes: str = "horse") -> ImageScan:
    names = check_class_names(classes.split(","))
    return scan_image(tree, image, find_splits(tree, names).of_image(image), names, BOX_SHARE)


def message(source: bytes) -> str:
    """The error of reading it, which must be one line."""
    with pytest.raises(UserError) as raised:
        read_annotation(io.BytesIO(source))
    assert "\n" not in str(raised.value)
    assert "fetch the file again" in str(raised.value)
    return str(raised.value)


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_has_the_20_classes_of_voc_in_its_order_and_every_part_once() -> None:
    assert len(PART_NAMES) == 20
    assert list(PART_NAMES) == sorted(PART_NAMES)
    assert all(len(set(names)) == len(names) <= 24 for names in PART_NAMES.values())
    assert {name: len(names) for name, names in PART_NAMES.items() if name in ("person", "dog", "horse", "car")} == {
        "person": 24, "dog": 18, "horse": 21, "car": 13,
    }  # fmt: skip
    assert [name for name, names in PART_NAMES.items() if not names] == ["boat", "chair", "diningtable", "sofa"]


def test_a_part_has_its_position_as_label_whatever_its_number() -> None:
    assert part_label("aeroplane", "body") == 1
    assert part_label("aeroplane", "wheel_12") == part_label("aeroplane", "wheel") == 7
    assert part_label("horse", "lfho") == 18
    assert part_label("horse", "lhorn") is None
    assert part_label("unicorn", "head") is None


def test_classes_are_checked_with_a_suggestion_and_table_is_the_diningtable() -> None:
    assert check_class_names(["table", " horse", "cow", "cow"]) == ["cow", "diningtable", "horse"]
    with pytest.raises(UserError, match="unknown class 'hrose'; did you mean 'horse'"):
        check_class_names(["cow", "hrose"])
    with pytest.raises(UserError, match="unknown class 'xyz'; known are aeroplane, bicycle"):
        check_class_names(["xyz"])


# ---- reading annotations -----------------------------------------------------------------------------------------


@st.composite
def described_objects(draw: st.DrawFn) -> list[Described]:
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def mask() -> NDArray[np.uint8]:
        order = draw(st.sampled_from("CF"))
        return np.asarray(rng.integers(0, 2, (height, width), np.uint8), order=order)

    objects = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from([name for name in PART_NAMES if PART_NAMES[name]]))
        suffix = draw(st.sampled_from(["", "_1", "_2", "_13"]))
        parts = draw(st.lists(st.sampled_from(PART_NAMES[name]), max_size=6))
        objects.append((name, mask(), [(part + suffix, mask()) for part in parts]))
    return objects


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


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.uint16, np.int32])
def test_masks_of_any_integer_type_are_read(dtype: Any) -> None:
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


# ---- damaged annotations -----------------------------------------------------------------------------------------


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


BROKEN = {
    "is no MATLAB 5 file": b"no MATLAB at all" * 20,
    "is a MATLAB 7.3 file, needed version 5": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" * 9,
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


# ---- painting ----------------------------------------------------------------------------------------------------


@given(described_objects())
@settings(max_examples=100, deadline=None)
def test_where_parts_overlap_the_first_listed_stays_on_top(objects: list[Described]) -> None:
    for item in read_annotation(io.BytesIO(annotation(objects))):
        labels = paint_parts(item)
        assert labels.dtype == np.uint8
        for y, x in np.ndindex(labels.shape):
            here = [part_label(item.class_name, name) for name, mask in item.parts if mask[y, x]]
            assert labels[y, x] == (here[0] if here else 0)


@given(described_objects())
@settings(max_examples=100, deadline=None)
def test_painted_the_other_way_the_smallest_part_stays_on_top(objects: list[Described]) -> None:
    for item in read_annotation(io.BytesIO(annotation(objects))):
        labels = paint_parts(item, smallest_on_top=True)
        assert ((labels > 0) == (paint_parts(item) > 0)).all()
        for y, x in np.ndindex(labels.shape):
            here = [(int(mask.sum()), place) for place, (_, mask) in enumerate(item.parts) if mask[y, x]]
            if here:
                name, _ = item.parts[min(here)[1]]
                assert labels[y, x] == part_label(item.class_name, name)


def test_a_label_of_each_class_is_its_place_in_the_table() -> None:
    mask = np.ones((1, 1), np.bool_)
    for name, parts in PART_NAMES.items():
        for place, part in enumerate(parts):
            assert paint_parts(AnnotatedObject(name, mask, [(f"{part}_2", mask)])).item() == place + 1


# ---- folders and split lists -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voc", "parts", "roots"),
    [
        ("VOCdevkit/VOC2010", "Annotations_Part", [".", "VOCdevkit", "VOCdevkit/VOC2010"]),
        ("VOCdevkit/VOC2010", "VOCdevkit/Annotations_Part", [".", "VOCdevkit", "VOCdevkit/VOC2010"]),
        (
            "VOCdevkit_2010/VOC2010",
            "VOCdevkit_2010/Annotations_Part",
            [".", "VOCdevkit_2010", "VOCdevkit_2010/VOC2010"],
        ),
        ("VOC2010", "Annotations_Part", [".", "VOC2010"]),
    ],
)
def test_every_layout_is_found_from_each_of_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voc: str, parts: str, roots: list[str]
) -> None:
    write_tree(tmp_path, {"b": annotation([HORSE]), "a": annotation([HORSE])}, voc, parts)
    (tmp_path / parts / "._a.mat").write_bytes(b"what a Mac leaves")
    for root in roots:
        tree = find_tree(tmp_path / root)
        assert list_images(tree) == ["a", "b"]
        assert len(scan(tree).candidates) == 1
        monkeypatch.chdir(tmp_path / root)
        assert list_images(find_tree(Path())) == ["a", "b"]


@pytest.mark.parametrize(
    ("gone", "wanted"),
    [
        ("Annotations_Part", r"no folder Annotations_Part in .*VOCdevkit.*; unpack PASCAL-Part's trainval.tar.gz"),
        ("VOCdevkit", r"no folder JPEGImages in .*VOC2010.*VOCdevkit_2010.*; unpack VOCtrainval"),
        ("VOCdevkit/VOC2010/JPEGImages", r"no folder JPEGImages in "),
        ("VOCdevkit/VOC2010/ImageSets/Main", r"no folder .*Main; unpack VOCtrainval"),
        ("Annotations_Part/a.mat", r"Annotations_Part: holds no \.mat file"),
        (".", r"no such folder; give --root the folder"),
    ],
)
def test_what_is_missing_of_a_tree_is_named(tmp_path: Path, gone: str, wanted: str) -> None:
    root = tmp_path / "data"
    write_tree(root, {"a": annotation([HORSE])})
    (root / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=wanted):
        find_tree(root)


def test_an_image_belongs_to_the_split_whose_list_of_the_class_names_it_whatever_the_flag(tmp_path: Path) -> None:
    lists = {
        "horse_train.txt": "a  1\nb -1\n\n",
        "horse_val.txt": "c  0\n",
        "train.txt": "c\n",
        "val.txt": "a\r\nb\r\nd\r\n",
        "cow_train.txt": "d 1",
    }
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, lists=lists)
    splits = find_splits(tree, ["horse", "dog", "cow"])
    assert splits.lists["horse"] == {"a": "train", "b": "train", "c": "val"}
    assert splits.lists["dog"] == {"c": "train", "a": "val", "b": "val", "d": "val"}
    assert splits.lists["cow"] == {"d": "train"}  # one list of its own is enough for the general ones not to serve
    assert splits.of_image("c") == {"horse": "val", "dog": "train"}
    assert splits.of_image("e") == {}


@pytest.mark.parametrize(
    ("lists", "wanted"),
    [
        ({}, r"Main: holds none of horse_train.txt, horse_val.txt, train.txt, val.txt; unpack"),
        (
            {"horse_train.txt": "a 1\nb 7\n"},
            r"horse_train.txt, line 2: 'b 7' came, needed an image name and -1, 0 or 1",
        ),
        ({"train.txt": "a\n\na b c\n"}, r"train.txt, line 3: 'a b c' came"),
        ({"train.txt": "a\n", "val.txt": "b\na\n"}, r"val.txt, line 2: a is in the lists of both splits"),
    ],
)
def test_a_list_that_is_none_is_named_with_its_line(tmp_path: Path, lists: dict[str, str], wanted: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, lists=lists)
    with pytest.raises(UserError, match=wanted):
        find_splits(tree, ["horse"])


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    tree.lists.path("train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train\.txt: cannot be read \(UnicodeDecodeError\)"):
        find_splits(tree, ["horse"])


# ---- which objects are kept --------------------------------------------------------------------------------------


def sized(width: int, parts: bool = True) -> Described:
    """An object whose box covers `width` of 1000 pixels."""
    mask = rectangle(1000, 1, (0, 0, width, 1))
    return ("horse", mask, [("head", mask)] if parts else [])


@pytest.mark.parametrize(("split", "limit"), [("train", 100), ("val", 200)])
def test_a_box_must_cover_more_than_the_limit_of_its_split(tmp_path: Path, split: str, limit: int) -> None:
    objects = [sized(width) for width in (limit - 1, limit, limit + 1)]
    tree = write_tree(tmp_path, {"a": annotation(objects)}, lists={f"{split}.txt": "a"}, photo=jpeg(1000, 1))
    found = scan(tree)
    assert found.candidates == [Candidate("a", 2, "horse", split, (0, 0, limit + 1, 1))]
    assert [item.object_number for item in found.left_out] == [0, 1]
    assert all(f"box covers no more than {limit // 10} % of the image" in item.kind for item in found.left_out)
    assert f"its box covers {limit / 10 - 0.1:.3g} % of the image" in found.left_out[0].reason
    assert not any(item.damaged for item in found.left_out)
    assert len(scan_image(tree, "a", {"horse": split}, ["horse"], {split: 0.0}).candidates) == 3


def test_every_object_of_a_wanted_class_is_kept_or_left_out_with_a_reason(tmp_path: Path) -> None:
    empty = np.zeros_like(HORSE[1])
    objects: list[Described] = [
        HORSE,
        ("cow", HORSE[1], []),  # asked for by nobody
        ("horse", HORSE[1], []),
        ("horse", empty, [("head", empty)]),
        ("horse", HORSE[1], [("lhorn", HORSE[1])]),
        ("dog", HORSE[1], [("head", HORSE[1])]),  # its class's lists do not name the image
        ("unicorn", HORSE[1], [("head", HORSE[1])]),
    ]
    lists = {"horse_train.txt": "a 1", "dog_train.txt": "b 1"}
    found = scan(write_tree(tmp_path, {"a": annotation(objects)}, lists=lists), classes="horse,dog")
    assert found.candidates == [Candidate("a", 0, "horse", "train", (5, 5, 45, 35))]
    assert [(item.object_number, item.class_name, item.split, item.kind, item.damaged) for item in found.left_out] == [
        (2, "horse", "train", "no parts annotated", False),
        (3, "horse", "train", "empty mask", False),
        (4, "horse", "train", "unknown part", True),
        (5, "dog", None, "in no split list", False),
        (6, "unicorn", None, "unknown class", True),
    ]
    assert "no part 'lhorn' of horse" in found.left_out[2].reason


def test_an_image_in_no_list_is_left_out_without_looking_at_its_photo(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE])}, lists={"train.txt": "b"})
    tree.photo_path("a").unlink()
    found = scan(tree)
    assert [(item.kind, item.object_number) for item in found.left_out] == [("in no split list", n) for n in (0, 1)]


def oversized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    content = jpeg(60, 40)
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + height.to_bytes(2) + width.to_bytes(2) + content[place + 4 :]


@pytest.mark.parametrize(
    ("photo", "wanted"),
    [
        (None, r"a\.jpg: no such file"),
        (b"", r"a\.jpg: is no readable JPEG"),
        (b"GIF89a" + bytes(99), r"a\.jpg: is no readable JPEG"),
        (jpeg(60, 40)[:30], r"a\.jpg: is no readable JPEG"),
        (jpeg(40, 60), r"a\.jpg: photo of 40 x 60, but masks of 60 x 40"),
        (oversized_jpeg(65_000, 60_000), r"a\.jpg: photo of more than 10000 pixels a side"),
        (oversized_jpeg(9_900, 9_900), r"a\.jpg: photo of 9900 x 9900, but masks of 60 x 40"),
        (oversized_jpeg(10_001, 2), r"a\.jpg: photo of more than 10000 pixels a side"),
    ],
)
def test_a_damaged_photo_leaves_out_every_object_and_costs_no_other_image(
    tmp_path: Path, photo: bytes | None, wanted: str
) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE]), "b": annotation([HORSE])})
    if photo is None:
        tree.photo_path("a").unlink()
    else:
        tree.photo_path("a").write_bytes(photo)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        found = scan(tree)
    assert not leaked
    assert found.candidates == []
    assert [(item.object_number, item.split, item.damaged) for item in found.left_out] == [
        (0, "train", True),
        (1, "train", True),
    ]
    assert all(re.search(wanted, item.reason) for item in found.left_out)
    assert len(scan(tree, "b").candidates) == 1


@pytest.mark.parametrize("content", [None, b"", annotation([HORSE])[:-9]])
def test_a_damaged_annotation_leaves_out_its_image_and_costs_no_other(tmp_path: Path, content: bytes | None) -> None:
    tree = write_tree(tmp_path, {"a": content or b"", "b": annotation([HORSE])})
    if content is None:
        tree.annotation_path("a").unlink()
    (left_out,) = scan(tree).left_out
    assert (left_out.object_number, left_out.class_name, left_out.split) == (None, None, "train")
    assert left_out.damaged
    assert "a.mat" in left_out.reason
    assert len(scan(tree, "b").candidates) == 1


# ---- crops -------------------------------------------------------------------------------------------------------

BOXES = st.tuples(st.integers(0, 600), st.integers(0, 600), st.integers(1, 600), st.integers(1, 600)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@given(BOXES)
def test_a_crop_is_square_about_the_box_with_a_margin_on_every_side(box: pascal_part.Box) -> None:
    left, top, right, bottom = square_crop(box)
    side, longer = right - left, max(box[2] - box[0], box[3] - box[1])
    assert side == bottom - top
    margins = (box[0] - left, box[1] - top, right - box[2], bottom - box[3])
    assert min(margins) >= 1
    assert abs(min(margins) - 0.05 * longer) <= 1
    assert abs((left + right) - (box[0] + box[2])) <= 1  # the centre, to half a pixel
    assert abs((top + bottom) - (box[1] + box[3])) <= 1


def lossless_tree(tmp_path: Path, objects: list[Described], photo: NDArray[np.uint8], **options: Any) -> PascalPartTree:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=100, subsampling=0)
    return write_tree(tmp_path, {"a": annotation(objects)}, photo=file.getvalue(), **options)


@given(st.integers(0, 60), st.integers(0, 40), st.integers(16, 60), st.integers(16, 60), st.sampled_from([32, 64, 97]))
@settings(max_examples=40, deadline=None)
def test_the_masks_of_a_crop_lie_where_the_photo_shows_them(
    tmp_path_factory: pytest.TempPathFactory, left: int, top: int, width: int, height: int, size: int
) -> None:
    mask = rectangle(120, 100, (left, top, left + width, top + height))
    part = rectangle(120, 100, (left, top, left + width // 2, top + height))
    photo = np.zeros((100, 120, 3), np.uint8)
    photo[..., 0], photo[..., 1] = mask * 255, part * 255
    tree = lossless_tree(tmp_path_factory.mktemp("tree"), [("horse", mask, [("head", part)])], photo)
    splits = {"horse": "train"}
    (candidate,) = scan_image(tree, "a", splits, ["horse"], {"train": 0.0}).candidates
    (record,), left_out = read_records(tree, "a", [candidate], size)
    assert left_out == []
    assert record.image.shape == (size, size, 3)
    assert record.parts.shape == record.object_mask.shape == (size, size)
    # Red is the object, green its part; only pixels on an edge may differ, and the fill beyond the photo is grey.
    fill = (np.abs(record.image.astype(int) - (124, 116, 104)) < 40).all(axis=2)
    wrong = ((record.image[..., 0] > 127) != record.object_mask) & ~fill
    wrong |= ((record.image[..., 1] > 127) != (record.parts == 1)) & ~fill
    edges = np.zeros_like(wrong)
    for values in (record.object_mask, record.parts, fill):
        for axis in (0, 1):
            for shift in (-1, 1):
                edges |= np.roll(values, shift, axis) != values
    assert not (wrong & ~edges).any()


def test_a_crop_beyond_the_photo_is_filled_with_the_mean_colour_of_imagenet(tmp_path: Path) -> None:
    mask = rectangle(60, 40, (0, 0, 60, 40))
    tree = lossless_tree(tmp_path, [("horse", mask, [("head", mask)])], np.full((40, 60, 3), 255, np.uint8))
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 66)
    assert record.description["crop"] == [-3, -13, 63, 53]  # 66 a side: resizing changes nothing
    np.testing.assert_array_equal(record.image[:13], np.broadcast_to((124, 116, 104), (13, 66, 3)))
    np.testing.assert_array_equal(record.image[13:53, 3:63], 255)
    np.testing.assert_array_equal(record.object_mask, rectangle(66, 66, (3, 13, 63, 53)))
    np.testing.assert_array_equal(record.parts, rectangle(66, 66, (3, 13, 63, 53)))


def test_a_record_says_where_it_comes_from_and_which_parts_it_shows(tmp_path: Path) -> None:
    mask = rectangle(60, 40, (10, 10, 40, 30))
    hidden = rectangle(60, 40, (11, 11, 13, 13))
    parts = [("tail", mask), ("leye", hidden), ("head", rectangle(60, 40, (30, 10, 41, 30)))]
    tree = write_tree(tmp_path, {"a": annotation([("cow", mask, []), ("horse", mask, parts)])})
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 32)
    assert record.key == "a_1"
    assert record.description == {
        "image": "a",
        "object": 1,
        "class": "horse",
        "box": [10, 10, 40, 30],
        "crop": [8, 3, 42, 37],
        "source_size": [60, 40],
        "part_names": ["head", "tail"],  # in the order of the labels; the eye lies below the tail
    }
    assert set(np.unique(record.parts)) == {0, 1, PART_NAMES["horse"].index("tail") + 1}


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_photos_become_rgb(tmp_path: Path, mode: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, photo=jpeg(60, 40, mode))
    (record,), _ = read_records(tree, "a", scan(tree).candidates, 32)
    assert record.image.shape == (32, 32, 3)
    assert record.image.flags.writeable


def test_a_photo_turned_by_exif_stays_as_its_pixels_lie(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "JPEG", exif=exif)
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, photo=file.getvalue())
    assert len(read_records(tree, "a", scan(tree).candidates, 32)[0]) == 1


def test_a_photo_cut_short_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, HORSE])}, photo=jpeg(60, 40)[:1500])
    candidates = scan(tree).candidates
    assert len(candidates) == 2
    records, left_out = read_records(tree, "a", candidates, 32)
    assert records == []
    assert [(item.object_number, item.class_name, item.split) for item in left_out] == [
        (0, "horse", "train"),
        (1, "horse", "train"),
    ]
    assert all(item.damaged and "photo is damaged (image file is truncated" in item.reason for item in left_out)


@pytest.mark.parametrize(
    "objects",
    [[], [("cow", *HORSE[1:])], [("horse", HORSE[1][::-1, ::-1], HORSE[2])], [("horse", HORSE[1], [("x", HORSE[1])])]],
)
def test_an_annotation_that_changed_between_the_phases_is_damage(tmp_path: Path, objects: list[Described]) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    candidates = scan(tree).candidates
    tree.annotation_path("a").write_bytes(annotation(objects))
    records, (left_out,) = read_records(tree, "a", candidates, 32)
    assert records == []
    assert left_out.damaged
    assert "a.mat: has changed since it was scanned" in left_out.reason


def test_everything_that_travels_between_processes_can_be_pickled(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE, ("horse", HORSE[1], [])])})
    found = scan(tree)
    assert pickle.loads(pickle.dumps((tree, found))) == (tree, found)
    (record,), _ = pickle.loads(pickle.dumps(read_records(tree, "a", found.candidates, 32)))
    assert record.key == "a_0"


# ---- real files --------------------------------------------------------------------------------------------------


def scan_all(tree: PascalPartTree) -> list[tuple[str, ImageScan]]:
    names = list(PART_NAMES)
    splits = find_splits(tree, names)
    return [(image, scan_image(tree, image, splits.of_image(image), names, BOX_SHARE)) for image in list_images(tree)]


def test_each_of_the_22_objects_of_the_real_photos_is_accounted_for(real_data: Path) -> None:
    tree = find_tree(real_data / "pascal_part")
    found = scan_all(tree)
    assert len(found) == 11
    kept = {f"{item.image}_{item.object_number}": item for _, result in found for item in result.candidates}
    left_out = {f"{item.image}_{item.object_number}": item for _, result in found for item in result.left_out}
    # Counted by hand from what scipy.io.loadmat shows: class and split of the 12 kept, 10 boxes too small.
    assert {key: (item.class_name, item.split) for key, item in kept.items()} == {
        "2008_000008_1": ("horse", "train"), "2008_000019_0": ("dog", "train"), "2008_000019_1": ("dog", "train"),
        "2008_000019_2": ("dog", "train"), "2008_000026_0": ("person", "val"), "2008_000652_0": ("person", "train"),
        "2008_000700_0": ("person", "train"), "2008_000726_0": ("person", "train"),
        "2008_000726_1": ("person", "train"), "2008_000939_1": ("car", "val"), "2008_003228_1": ("person", "train"),
        "2008_003228_2": ("person", "train"),
    }  # fmt: skip
    assert sorted(left_out) == [
        "2008_000008_0", "2008_000009_0", "2008_000009_1", "2008_000026_1", "2008_000939_0", "2008_001978_0",
        "2008_003228_0", "2008_003228_3", "2008_003497_0", "2008_003497_1",
    ]  # fmt: skip
    assert {item.kind for item in left_out.values()} == {
        "box covers no more than 10 % of the image",
        "box covers no more than 20 % of the image",
    }


def test_real_annotations_read_as_scipy_reads_them(real_data: Path) -> None:
    for path in sorted((real_data / "pascal_part" / "Annotations_Part").glob("*.mat")):
        rows = scipy.io.loadmat(path)["anno"][0, 0]["objects"].flat
        for item, row in zip(read_annotation(path), rows, strict=True):
            assert item.class_name == row["class"].item()
            np.testing.assert_array_equal(item.mask, row["mask"])
            assert [name for name, _ in item.parts] == [part["part_name"].item() for part in row["parts"].flat]
            for (_, mask), part in zip(item.parts, row["parts"].flat, strict=True):
                np.testing.assert_array_equal(mask, part["mask"])


def test_the_real_horse_becomes_a_record(real_data: Path) -> None:
    tree = find_tree(real_data / "pascal_part")
    (record,), left_out = read_records(tree, "2008_000008", scan(tree, "2008_000008").candidates, 128)
    assert left_out == []
    assert record.description["source_size"] == [500, 442]
    assert record.description["part_names"] == [
        "head", "torso", "neck", "lfuleg", "lflleg", "lbuleg", "lblleg", "tail", "lfho", "lbho",
    ]  # fmt: skip
    assert 0.1 < record.object_mask.mean() < 0.5
    assert ((record.parts > 0) <= record.object_mask).all()


def test_all_800_real_faces_are_kept_in_their_splits(real_data: Path) -> None:
    found = [item for _, result in scan_all(find_tree(real_data / "faces")) for item in result.candidates]
    assert {split: sum(item.split == split for item in found) for split in BOX_SHARE} == {"train": 650, "val": 150}
    assert {item.class_name for item in found} == {"person"}
