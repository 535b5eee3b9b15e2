"""Folders and split lists of a PASCAL-Part tree."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from annotations import HORSE, annotation, scan, write_tree

from slotscops.core.errors import UserError
from slotscops.datasets.pascal_part.tree import find_splits, find_tree, list_images, open_tree
from slotscops.shard import __main__ as shard


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
    assert splits.lists["cow"] == {"d": "train"}  # the general lists are not used if the class has one of its own
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


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "a\n".encode("utf-16-le"), "a\n".encode("utf-32"), b"\xe9\n"])
def test_a_list_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    tree.lists.path("train.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.txt: cannot be read \(UnicodeDecodeError\)"):
        find_splits(tree, ["horse"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, encoding: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE]), "b": annotation([HORSE])})
    tree.lists.path("train.txt").write_bytes("a\nb\n".encode(encoding))
    assert find_splits(tree, ["horse"]).lists == {"horse": {"a": "train", "b": "train"}}


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg"])
def test_a_list_may_name_the_files_of_the_photos(tmp_path: Path, ending: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])}, lists={"train.txt": f"a{ending} 1\n", "val.txt": ""})
    assert find_splits(tree, ["horse"]).of_image("a") == {"horse": "train"}


@pytest.mark.parametrize(("photo", "annotated"), [("a.JPG", "a.mat"), ("a.jpeg", "a.MAT"), ("a.JPEG", "a.MAT")])
def test_endings_in_other_letters_are_as_good(tmp_path: Path, photo: str, annotated: str) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    tree.photos.path("a.jpg").rename(tree.photos.path(photo))
    tree.annotations.path("a.mat").rename(tree.annotations.path(annotated))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "VOCdevkit", "VOCdevkit")
        tar.add(tmp_path / "Annotations_Part", "Annotations_Part")
    (tmp_path / "archives").mkdir()
    (tmp_path / "all.tar").rename(tmp_path / "archives" / "all.tar")
    with open_tree(tmp_path / "archives", tmp_path / "scratch") as archived:
        for found in (find_tree(tmp_path), archived):
            assert list_images(found) == ["a"]
            assert len(scan(found).candidates) == 1


@pytest.mark.parametrize("year", ["VOC2012", "VOC2007"])
def test_the_photos_of_another_year_are_used_and_the_year_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], year: str
) -> None:
    (tmp_path / "whole").mkdir()
    content = {"a": annotation([HORSE])}
    with pytest.raises(UserError, match="no folder JPEGImages"):
        find_tree(tmp_path / "whole")
    write_tree(tmp_path / "whole" / "data", content, f"VOCdevkit/{year}")
    for root in ("", "data", "data/VOCdevkit", f"data/VOCdevkit/{year}"):
        assert len(scan(find_tree(tmp_path / "whole" / root)).candidates) == 1
        assert f"using the photos of {year}" in capsys.readouterr().out


def test_label_maps_instead_of_annotations_are_refused_with_what_to_do(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": annotation([HORSE])})
    (tmp_path / "Annotations_Part" / "a.mat").rename(tmp_path / "Annotations_Part" / "a.png")
    with pytest.raises(UserError, match=r"PNG label maps.*--images PHOTOS --parts LABELS"):
        find_tree(tmp_path)


def test_what_lies_among_the_annotations_and_is_none_counts_for_strict(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": annotation([HORSE]), "b": annotation([HORSE])})
    folder, out = tmp_path / "Annotations_Part", tmp_path / "out"
    common = ["--classes", "horse", "--no-features", "--size", "32", "--workers", "1", "--strict"]
    for name in ("Thumbs.db", ".DS_Store", "._a.mat"):
        (folder / name).write_bytes(b"x")
    assert shard.main(["--root", str(tmp_path), "--out", str(tmp_path / "clean"), *common]) == 0
    (folder / "b.mat").rename(folder / "b.png")
    (folder / "a.MAT").write_bytes((folder / "a.mat").read_bytes())
    assert shard.main(["--root", str(tmp_path), "--out", str(out), *common]) == 1
    left_out = json.loads((out / "index" / "left_out.json").read_text())
    assert [(item["image"], item["kind"]) for item in left_out] == [
        ("a.MAT", "no annotation"),
        ("b.png", "no annotation"),
    ]


def test_a_pipe_in_place_of_a_file_is_no_file(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"a": annotation([HORSE])})
    tree.annotations.path("a.mat").unlink()
    os.mkfifo(tree.annotations.path("a.mat"))
    with pytest.raises(UserError, match=r"a\.mat: no such file"):
        tree.open_annotation("a")
