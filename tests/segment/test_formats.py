import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.numpy import load_file
from small_runs import parts_of_labels, photo

from slotscops.core.errors import RunError, UserError
from slotscops.segment import __main__ as segment
from slotscops.segment.coco import categories, open_coco
from slotscops.segment.formats import About
from slotscops.segment.labelme import open_labelme

# pycocotools 2.0.11 decodes masks in a way that NumPy 2 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
NAMES = ["head", "leg", "leg", "tail", "wing"]
SIZES = {"wide.png": (130, 71), "deeper/tall.png": (64, 120), "turned.jpg": (90, 60)}


@pytest.fixture(scope="module")
def found(varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `photos` and of all formats of their results, in `out`."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "photos" / "deeper").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name, size in SIZES.items():
        photo(size).save(folder / "photos" / name, exif=exif if name == "turned.jpg" else None)
    formats = ["--format", "coco,labelme", "--format", "coco-polygons", "--soft", "--part-names", ",".join(NAMES)]
    common = ["--checkpoint", str(varied_run), "--out", str(folder / "out")]
    assert segment.main([*common, *formats, str(folder / "photos")]) == 0
    return folder


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def label_map(found: Path, file_name: str) -> NDArray[np.uint8]:
    with Image.open(found / "out" / f"{Path(file_name).stem}.parts.png") as labels:
        return np.array(labels)


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((first & second).sum() / (first | second).sum())


def test_coco_masks_areas_boxes_and_scores_are_those_of_the_label_maps(found: Path) -> None:
    coco = load_coco(found / "out" / "coco.json")
    assert {image["file_name"] for image in coco.imgs.values()} == SIZES.keys()
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for image in coco.imgs.values():
        labels = label_map(found, image["file_name"])
        assert (image["height"], image["width"]) == labels.shape
        maps = load_file(found / "out" / f"{Path(image['file_name']).stem}.maps.safetensors")["maps"]
        annotations = coco.imgToAnns[image["id"]]
        assert [one["category_id"] for one in annotations] == [part for part in np.unique(labels) if part]
        for one in annotations:
            mask = labels == one["category_id"]
            assert (coco.annToMask(one) == mask).all()
            rows, columns = np.nonzero(mask)
            left, top, width, height = one["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert (one["area"], one["iscrowd"]) == (mask.sum(), 0)
            assert one["score"] == pytest.approx(maps[one["category_id"]][mask].mean(), abs=1e-5)


def test_coco_says_what_made_it_and_has_one_category_of_its_own_name_for_each_part(found: Path) -> None:
    content = json.loads((found / "out" / "coco.json").read_text())
    assert content["info"]["model"] == "run"
    assert "segment --checkpoint " in content["info"]["command"]
    named = [(category["id"], category["name"]) for category in content["categories"]]
    assert named == [(1, "head"), (2, "leg"), (3, "leg 2"), (4, "tail"), (5, "wing")]
    for image in content["images"]:
        assert (found / "photos" / image["file_name"]).is_file()


def test_coco_polygons_and_labelme_have_the_same_parts(found: Path) -> None:
    coco = load_coco(found / "out" / "coco_polygons.json")
    num_compared = 0
    for image in coco.imgs.values():
        labels = label_map(found, image["file_name"])
        path = found / "out" / "labelme" / f"{Path(image['file_name']).stem}.json"
        content = json.loads(path.read_text())
        assert (path.parent / content["imagePath"]).samefile(found / "photos" / image["file_name"])
        assert (content["imageHeight"], content["imageWidth"]) == labels.shape
        for one in coco.imgToAnns[image["id"]]:
            part = one["category_id"]
            shapes = [shape for shape in content["shapes"] if shape["group_id"] == part]
            assert {shape["label"] for shape in shapes} == {NAMES[part - 1]}
            assert [np.ravel(shape["points"]).tolist() for shape in shapes] == one["segmentation"]
            if one["area"] > 100:
                assert overlap(coco.annToMask(one) > 0, labels == part) >= 0.95
                num_compared += 1
    assert num_compared > 8


def test_pieces_and_holes_of_a_part_survive_labelme(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:80, :130]
    radius = np.hypot(rows - 40, columns - 45)
    labels = np.zeros((80, 130), np.uint8)
    labels[radius < 38] = 1
    labels[np.hypot(rows - 30, columns - 35) < 9] = 0  # a hole
    labels[np.hypot(rows - 50, columns - 58) < 12] = 2  # a hole with another part, which has a hole itself
    labels[48:52, 56:60] = 0
    labels[5:40, 100:120] = 1  # a second piece
    labels[79, 129] = 3
    about = About("model", "command", {"": ["ring", "hub", "dot"]}, tmp_path)
    with open_labelme(tmp_path / "labelme", about) as files:
        files.describe(tmp_path / "a.png", "a", parts_of_labels(labels, 4))
    shapes = json.loads((tmp_path / "labelme" / "a.json").read_text())["shapes"]
    assert [shape["label"] for shape in shapes] == ["ring", "ring", "hub", "dot"]
    for part in (1, 2):
        polygons = [np.ravel(shape["points"]).tolist() for shape in shapes if shape["group_id"] == part]
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *labels.shape)))
        assert overlap(mask > 0, labels == part) >= 0.98


def test_a_class_with_parts_of_its_own_has_categories_of_its_own(tmp_path: Path) -> None:
    about = About("model", "command", {"cow": ["head", "horn"], "horse": ["head", "mane"]}, tmp_path)
    assert [(one["id"], one["name"], one["supercategory"]) for one in categories(about)] == [
        (1, "cow head", "cow"), (2, "cow horn", "cow"), (3, "horse head", "horse"), (4, "horse mane", "horse"),
    ]  # fmt: skip
    labels = np.full((4, 6), 2, np.uint8)
    with open_coco(tmp_path / "coco.json", about) as coco:
        for class_name in ("horse", "cow"):
            coco.add(coco.describe(tmp_path / "a.png", "a", parts_of_labels(labels, 3, class_name)))
    assert [one["category_id"] for one in load_coco(tmp_path / "coco.json").anns.values()] == [4, 2]


def test_a_run_without_results_leaves_no_file_of_an_earlier_one(varied_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no photo")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("coco.json", "part_features.safetensors"):
        (out / name).write_text("of an earlier run")
    with pytest.raises(RunError, match="no photo could be read"):
        segment.main(["--checkpoint", str(varied_run), "--out", str(out), "--features", "--format", "coco",
                      str(tmp_path / "bad.jpg")])  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["gallery"]


@pytest.mark.parametrize(
    ("formats", "told"),
    [("koko", "'koko' is none of coco, coco-polygons, labelme"), ("labelme", r"pip install 'slotscops\[coco\]'")],
)
def test_a_format_that_is_unknown_or_not_installed_is_one_line(
    formats: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=told):
        segment.main(["--checkpoint", "runs/none", "--out", str(tmp_path), "--format", formats, str(tmp_path)])
