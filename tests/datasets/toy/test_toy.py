"""Any reader of PASCAL-Part must read the toy tree, so its files are compared with the layout of the real ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from slotscops.core.errors import UserError
from slotscops.datasets.toy import tree as toy

NUM_TRAIN, NUM_VAL = 10, 3

# Part names of the official PASCAL-Part list (part2ind.m).
_HEAD = {"head", "lear", "rear", "leye", "reye", "muzzle"}
_LEGS = {f"{leg}{piece}" for leg in ("lf", "rf", "lb", "rb") for piece in ("uleg", "lleg")}
_HOOVES = {"lfho", "rfho", "lbho", "rbho"}
OFFICIAL_PARTS = {
    "horse": _HEAD | {"torso", "neck", "tail"} | _LEGS | _HOOVES,
    "cow": _HEAD | {"lhorn", "rhorn", "torso", "neck", "tail"} | _LEGS,
    "table": set(),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    toy.write_tree(root, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=0)
    return root


@pytest.fixture(scope="module")
def photos() -> list[tuple[Image.Image, list[toy.Annotated]]]:
    return [toy.draw_photo(1, "train", index) for index in range(44)]


@pytest.fixture(scope="module")
def objects(photos: list[tuple[Image.Image, list[toy.Annotated]]]) -> list[toy.Annotated]:
    return [item for _, items in photos for item in items]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def lists(root: Path) -> Path:
    return root / "VOCdevkit/VOC2010/ImageSets/Main"


def box_share(mask: np.ndarray) -> float:
    return float(np.ptp(np.nonzero(mask.any(0))[0]) * np.ptp(np.nonzero(mask.any(1))[0]) / mask.size)


def counts(item: toy.Annotated) -> np.ndarray:
    """(n,) for each pixel of the object, how many parts it lies in."""
    return sum((mask[item.mask].astype(int) for _, mask in item.parts), np.zeros(item.mask.sum(), int))


def test_the_same_seed_writes_the_same_bytes_and_more_images_change_no_earlier_file(tree: Path, tmp_path: Path) -> None:
    toy.write_tree(tmp_path, num_train=3, num_val=2, seed=0)
    first, again = contents(tree), contents(tmp_path)
    files = [name for name in again if name.endswith((".jpg", ".mat"))]
    assert len(files) == 2 * (3 + 2)
    assert all(first[name] == again[name] for name in files)
    for path in lists(tmp_path).iterdir():
        assert (lists(tree) / path.name).read_text().startswith(path.read_text())


def test_writing_over_a_finished_tree_leaves_every_byte_as_it_was(tmp_path: Path) -> None:
    toy.write_tree(tmp_path, num_train=1, num_val=1, seed=4)
    before = contents(tmp_path)
    toy.write_tree(tmp_path, num_train=1, num_val=1, seed=4)
    assert contents(tmp_path) == before


def test_another_seed_and_another_split_give_other_photos() -> None:
    drawn = [toy.draw_photo(*which)[0].tobytes() for which in ((0, "train", 0), (1, "train", 0), (0, "val", 0))]
    assert len(set(drawn)) == 3


def test_annotations_have_the_fields_types_and_shapes_of_the_real_files(tree: Path) -> None:
    # Expected values read off 2008_000008.mat and its neighbours with scipy.io.loadmat.
    for path in sorted((tree / "Annotations_Part").iterdir()):
        loaded = loadmat(path)
        anno = loaded["anno"]
        assert anno.shape == (1, 1)
        assert anno.dtype.names == ("imname", "objects")
        assert anno[0, 0]["imname"].shape == (1,)
        assert anno[0, 0]["imname"][0] == path.stem
        items = anno[0, 0]["objects"]
        assert items.shape[0] == 1
        assert items.dtype.names == ("class", "class_ind", "mask", "parts")
        with Image.open(tree / f"VOCdevkit/VOC2010/JPEGImages/{path.stem}.jpg") as photo:
            size = photo.size[::-1]
        for item in items[0]:
            check_object(item, size)


def check_object(item: np.void, size: tuple[int, int]) -> None:
    assert item["class"].shape == (1,)
    assert item["class_ind"].shape == (1, 1)
    assert item["class_ind"].dtype == np.uint8
    assert item["class_ind"][0, 0] == {"cow": 10, "table": 11, "horse": 13}[str(item["class"][0])]
    check_mask(item["mask"], size)
    parts = item["parts"]
    assert parts.shape == ((1, parts.size) if parts.size else (0, 0))
    for part in parts.ravel():
        assert parts.dtype.names == ("part_name", "mask")
        assert part["part_name"].shape == (1,)
        check_mask(part["mask"], size)


def check_mask(mask: np.ndarray, size: tuple[int, int]) -> None:
    assert mask.dtype == np.uint8
    assert mask.shape == size
    assert set(np.unique(mask)) <= {0, 1}
    assert mask.any()


def test_files_open_with_matlabs_magic_and_without_the_time_of_day(tree: Path) -> None:
    headers = {path.read_bytes()[:128] for path in (tree / "Annotations_Part").iterdir()}
    assert len(headers) == 1
    header = headers.pop()
    assert header.startswith(b"MATLAB 5.0 MAT-file")
    assert b"Created on" not in header


def test_lists_are_complete_disjoint_and_true(tree: Path) -> None:
    names = {split: (lists(tree) / f"{split}.txt").read_text().split() for split in ("train", "val")}
    assert (len(names["train"]), len(names["val"])) == (NUM_TRAIN, NUM_VAL)
    assert not set(names["train"]) & set(names["val"])
    written = {path.stem for path in (tree / "Annotations_Part").iterdir()}
    assert written == {*names["train"], *names["val"]}
    assert written == {path.stem for path in (tree / "VOCdevkit/VOC2010/JPEGImages").iterdir()}
    for split, of_split in names.items():
        for class_name, list_name in (("horse", "horse"), ("cow", "cow"), ("table", "diningtable")):
            expected = [f"{name} {present(tree, name, class_name):2d}" for name in of_split]
            assert (lists(tree) / f"{list_name}_{split}.txt").read_text().splitlines() == expected


def present(tree: Path, name: str, class_name: str) -> int:
    items = loadmat(tree / f"Annotations_Part/{name}.mat")["anno"][0, 0]["objects"][0]
    return 1 if class_name in {str(item["class"][0]) for item in items} else -1


def test_part_names_are_official_in_file_order_and_every_one_occurs(objects: list[toy.Annotated]) -> None:
    seen: dict[str, set[str]] = {"horse": set(), "cow": set(), "table": set()}
    for item in objects:
        names = [name for name, _ in item.parts]
        assert names == [name for name in toy.PART_NAMES[item.class_name] if name in names]
        seen[item.class_name] |= set(names)
    assert seen == OFFICIAL_PARTS


def test_parts_overlap_as_in_the_real_files_and_cover_most_of_the_object(objects: list[toy.Annotated]) -> None:
    large = [item for item in objects if item.parts and box_share(item.mask) > 0.1]
    overlap = np.array([(counts(item) > 1).mean() for item in large])
    covered = np.array([(counts(item) > 0).mean() for item in large])
    assert len(large) > 30
    assert np.mean((overlap > 0.10) & (overlap < 0.45)) > 0.9
    assert np.mean(covered > 0.9) > 0.9


def test_parts_lie_inside_their_object_and_objects_do_not_share_pixels(
    photos: list[tuple[Image.Image, list[toy.Annotated]]],
) -> None:
    for photo, items in photos:
        assert np.sum([item.mask for item in items], axis=0).max() == 1
        for item in items:
            assert item.mask.shape == photo.size[::-1]
            assert all((mask & ~item.mask).sum() == 0 for _, mask in item.parts)


def test_the_head_holds_its_eyes_ears_and_muzzle(objects: list[toy.Annotated]) -> None:
    for item in objects:
        parts = dict(item.parts)
        for name in {"lear", "rear", "leye", "reye", "muzzle"} & parts.keys():
            assert (parts[name] & ~parts["head"]).sum() == 0


def test_the_side_that_faces_the_viewer_gives_the_near_legs_their_names(
    photos: list[tuple[Image.Image, list[toy.Annotated]]],
) -> None:
    facings = set()
    for _, items in photos:
        parts = dict(items[0].parts)
        if len(items) > 1 or not {"head", "tail", "lblleg", "rblleg", "lbuleg", "rbuleg"} <= parts.keys():
            continue
        head, tail = (np.nonzero(parts[name])[1].mean() for name in ("head", "tail"))
        near, far = ("l", "r") if head < tail else ("r", "l")
        facings.add(near)
        # The near thigh lies over the torso, the far one behind it.
        assert (parts[f"{near}buleg"] & parts["torso"]).sum() > (parts[f"{far}buleg"] & parts["torso"]).sum()
    assert facings == {"l", "r"}


def test_photos_vary_in_size_and_hold_large_small_partless_and_several_objects(
    photos: list[tuple[Image.Image, list[toy.Annotated]]], objects: list[toy.Annotated]
) -> None:
    sizes = {photo.size for photo, _ in photos}
    assert len(sizes) > 25
    assert all(240 <= side <= 500 for size in sizes for side in size)
    assert np.mean([max(box_share(item.mask) for item in items) > 0.2 for _, items in photos]) > 0.7
    assert sum(len(items) > 1 for _, items in photos) > 10
    assert sum(box_share(item.mask) < 0.1 for item in objects) > 8
    assert any(not item.parts for item in objects)


def test_backgrounds_and_parts_are_textured_and_colours_tell_parts_apart(
    photos: list[tuple[Image.Image, list[toy.Annotated]]],
) -> None:
    spreads, differences = [], []
    for photo, items in photos:
        pixels = np.asarray(photo, dtype=np.float64)
        spreads.append(pixels[~np.any([item.mask for item in items], axis=0)].std(0).mean())
        parts = dict(items[0].parts)
        if box_share(items[0].mask) > 0.2 and {"torso", "muzzle"} <= parts.keys():
            spreads.append(pixels[parts["torso"]].std(0).mean())
            differences.append(np.abs(pixels[parts["torso"]].mean(0) - pixels[parts["muzzle"]].mean(0)).mean())
    assert min(spreads) > 5
    assert np.median(differences) > 15


def test_an_impossible_number_of_images_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train split was asked for 0 images; give 1 to 500000"):
        toy.write_tree(tmp_path / "new", num_train=0)
    assert not (tmp_path / "new").exists()
