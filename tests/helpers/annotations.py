"""PASCAL-Part trees and annotations that the tests write themselves."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.datasets.pascal_part.classes import (
    PART_NAMES,
    check_class_names,
)
from slotscops.datasets.pascal_part.scan import BOX_SHARE, scan_image
from slotscops.datasets.pascal_part.tree import PascalPartTree, find_splits, find_tree
from slotscops.datasets.sources import ImageScan

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
    """The message of the error that reading it raises. It must be one line."""
    with pytest.raises(UserError) as raised:
        read_annotation(io.BytesIO(source))
    assert "\n" not in str(raised.value)
    is_whole = "needed version 5" in str(raised.value)  # a whole file of another version, which only MATLAB can convert
    assert ("save it with: save -v7" if is_whole else "fetch the file again") in str(raised.value)
    return str(raised.value)


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
