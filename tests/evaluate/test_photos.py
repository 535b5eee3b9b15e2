"""Scores of whole photos, and of merged parts."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotations import annotation, rectangle, write_tree
from browser import open_tab
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from small_runs import photo, save_feature_run

import slotscops
from slotscops.config import load_config, write_config
from slotscops.core.errors import UserError
from slotscops.core.records import IGNORED
from slotscops.datasets.merging import open_merge
from slotscops.datasets.pascal_part import read_annotation
from slotscops.datasets.pascal_part.classes import paint_parts
from slotscops.datasets.pascal_part.source import open_pascal_part
from slotscops.datasets.pascal_part.whole_photos import read_whole_photo
from slotscops.evaluate import __main__ as evaluate
from slotscops.features.compact import Compact
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.loader.split import Split
from slotscops.metrics.photos import PhotoSet
from slotscops.metrics.protocols import ProtocolScores
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.page import write_page


def scores_of(arguments: list[str], out: Path) -> dict[str, Any]:
    """The scores of each method that the command writes, and what it says about them."""
    assert evaluate.main([*arguments, "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    return {"about": content} | {method["name"]: method for method in content["methods"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_feature_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def scored(toy_shards: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = ["--checkpoint", str(run), "--baseline", "position,kmeans", "--shards", str(toy_shards)]
    arguments += ["--photos", str(toy_shards / "photos"), "--merge", "left-right"]
    return scores_of(arguments, tmp_path_factory.mktemp("scores") / "scores.json")


def true_labels(root: Path, image: str, class_name: str, names: list[str]) -> NDArray[np.int64]:
    """(H, W) merged labels of a toy photo, painted without the code under test; -1 where nothing is scored."""
    merge = open_merge("left-right", {class_name: names})
    objects = read_annotation(root / "Annotations_Part" / f"{image}.mat")
    labels = np.zeros(objects[0].mask.shape, np.int64)
    for item in objects[::-1]:
        if item.class_name == class_name and item.parts:
            painted = merge.apply(paint_parts(item, smallest_on_top=True), class_name)
            labels = np.where(item.mask | (painted > 0), painted, labels)
        elif item.class_name in ("cow", "horse"):
            labels[item.mask] = -1
    return labels


def test_a_run_is_scored_on_what_segment_finds_in_the_photos_of_the_split(
    toy_shards: Path, run: Path, scored: dict[str, Any]
) -> None:
    root, dataset = toy_shards / "photos", open_dataset(toy_shards)
    split = Split(dataset, "val", None, with_labels=True)
    described = [json.loads(split.read_member(sample, "json")) for sample in range(len(split))]
    model = slotscops.load(run)
    for class_name in ("cow", "horse"):
        found, true = [], []
        for image in sorted({one["image"] for one in described if one["class"] == class_name}):
            labels = true_labels(root, image, class_name, dataset.part_names[class_name])
            kept = labels >= 0
            parts = model.segment(root / "VOCdevkit/VOC2010/JPEGImages" / f"{image}.jpg").labels
            found.append(parts[kept])
            true.append(labels[kept])
        row = scored[str(run)]["scores"]["photo"]["small"][class_name]
        pair = (np.concatenate(true), np.concatenate(found))
        assert len(np.unique(pair[1])) > 1
        assert row["nmi"] == pytest.approx(normalized_mutual_info_score(*pair))
        assert row["ari"] == pytest.approx(adjusted_rand_score(*pair))
    assert scored["about"]["num_photos"] == len({one["image"] for one in described})
    assert scored[str(run)]["told"]["photo"] == []
    assert scored[str(run)]["told"]["mask"] == ["box", "mask"]


def test_baselines_have_scores_of_whole_photos_too_and_all_scores_say_which_parts_were_merged(
    scored: dict[str, Any], toy_shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert scored["about"]["merge"]["name"] == "left-right"
    assert scored["about"]["merge"]["groups"]["cow"]["ear"] == ["lear", "rear"]
    for name in ("position", "kmeans relu5_4 64 px"):
        assert 0 < scored[name]["scores"]["photo"]["small"]["all classes"]["nmi"] < 1
        assert scored[name]["merge"] == "left-right"
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scored["about"]))
    for more in ([], ["--full"]):
        assert evaluate.main(["--read", str(path), *more]) == 0
        out = capsys.readouterr().out
        assert "true parts merged by left-right" in out
        assert "whole photo" in out
    assert "told: box, mask" in out
    assert "told: nothing" in out
    plain = scores_of(["--baseline", "position", "--shards", str(toy_shards)], tmp_path / "plain.json")
    capsys.readouterr()
    assert set(plain["position"]["scores"]) == {"own", "mask", "foreground"}
    evaluate.main(["--read", str(path), str(tmp_path / "plain.json")])
    assert "position, parts merged by" in " ".join(capsys.readouterr().out.split())


def test_the_run_page_shows_the_scores_that_were_written_beside_it(
    toy_shards: Path, scored: dict[str, Any], tmp_path: Path, browser: Any
) -> None:
    write_config(load_config(None, []), tmp_path / "config.yaml")
    scores_of(["--baseline", "position", "--shards", str(toy_shards)], tmp_path / "scores.json")
    assert '"told_class":false' in (tmp_path / "report.html").read_text()
    (tmp_path / "scores.json").write_text(json.dumps(scored["about"]))
    write_page(RunFolder(tmp_path))
    tab = open_tab(browser, tmp_path / "report.html")
    heads = tab.locator("#scores thead th").all_inner_texts()
    assert heads[1::2] == [
        "own background, told: box · NMI", "given mask, told: box, mask · NMI", "foreground only, told: box · NMI",
        "whole photo, told: nothing · NMI",
    ]  # fmt: skip
    tab.locator("#scored-class").select_option("cow")
    expected = scored["position"]["scores"]["photo"]["small"]["cow"]["ari"]
    assert tab.locator("#scores tbody tr:nth-child(2) td").all_inner_texts()[-1] == f"{100 * expected:.1f}"
    assert "merged by left-right" in tab.locator("#scored-note").inner_text()


# ---- which pixels count ------------------------------------------------------------------------------------------


def test_small_objects_count_and_objects_without_parts_and_of_other_scored_classes_do_not(tmp_path: Path) -> None:
    masks = [rectangle(60, 40, box) for box in ((0, 0, 30, 40), (50, 0, 54, 4), (50, 10, 54, 14), (50, 20, 54, 24))]
    masks.append(rectangle(60, 40, (40, 30, 44, 34)))
    head = rectangle(60, 40, (0, 0, 30, 10))
    objects = [
        ("horse", masks[0], [("head", head), ("leye", rectangle(60, 40, (2, 2, 4, 4)))]),
        ("horse", masks[1], [("tail", masks[1])]),  # too small for shards
        ("horse", masks[2], []),
        ("cow", masks[3], [("head", masks[3])]),
        ("person", masks[4], [("head", masks[4])]),
    ]
    whole = read_whole_photo(write_tree(tmp_path, {"a": annotation(objects)}), "a", "horse", ["cow"])
    head_label, eye, tail = 1, 2, 17
    expected = np.zeros((40, 60), np.uint8)
    expected[:10, :30] = head_label
    expected[:4, 50:54] = tail
    expected[10:14, 50:54] = expected[20:24, 50:54] = IGNORED
    np.testing.assert_array_equal(whole.part_labels, expected)
    expected[2:4, 2:4] = eye
    np.testing.assert_array_equal(whole.part_labels_small, expected)
    assert whole.photo.size == (60, 40)


def test_the_true_labels_score_1_and_an_object_found_too_large_scores_less(toy_shards: Path, tmp_path: Path) -> None:
    split = Split(open_dataset(toy_shards), "val", None, with_labels=True)
    with open_pascal_part(toy_shards / "photos", tmp_path) as source:
        photos = PhotoSet(split, source)

        def truth(batch: Sequence[Any], width: int) -> list[NDArray[np.uint8]]:
            others = [name for name in split.part_names if name != batch[0].class_name]
            return [widened(source.read_whole(one.image, one.class_name, others).part_labels, width) for one in batch]

        def score(width: int) -> float:
            scores = ProtocolScores(split.part_names, 40)
            for batch in photos.batches():
                photos.score(lambda *_, batch=batch: truth(batch, width), [batch], scores)  # type: ignore[misc]
            return scores.scores("photo", "first")["cow"]["miou"]

        assert score(0) == pytest.approx(1)
        assert 0.3 < score(5) < 0.95


def widened(labels: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    found = np.where(labels == IGNORED, 0, labels).astype(np.uint8)
    if width:
        found[(found == 0) & binary_dilation(found > 0, iterations=width)] = 1
    return found


# ---- sources -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with label maps, and shards of them."""
    root = tmp_path_factory.mktemp("folder")
    for place in ("photos", "labels"):
        (root / place).mkdir()
    for name, width in (("a", 70), ("b", 50)):
        photo((width, 60)).save(root / "photos" / f"{name}.png")
        labels = np.zeros((60, width), np.uint8)
        labels[10:40, 10:30], labels[10:20, 10:30], labels[41] = 1, 2, IGNORED
        Image.fromarray(labels).save(root / "labels" / f"{name}.png")
    arguments = ["--images", str(root / "photos"), "--parts", str(root / "labels"), "--out", str(root / "shards")]
    common = ["--val-share", "0", "--size", "32", "--no-features", "--workers", "1"]
    assert shard.main([*arguments, *common]) == 0
    return root


def of_folder(folder: Path, *more: str) -> list[str]:
    return ["--baseline", "position", "--shards", str(folder / "shards"), "--split", "train", *more]


def test_a_folder_of_photos_with_label_maps_is_scored(folder: Path, tmp_path: Path) -> None:
    photos = ["--photos", str(folder / "photos"), "--parts", str(folder / "labels")]
    found = scores_of(of_folder(folder, *photos), tmp_path / "scores.json")
    assert found["about"]["num_photos"] == 2
    assert 0 < found["position"]["scores"]["photo"]["first"]["object"]["nmi"] < 1


def other_photo(folder: Path) -> None:
    photo((71, 60)).save(folder / "photos" / "a.png")
    Image.new("L", (71, 60), 1).save(folder / "labels" / "a.png")


def third_part(folder: Path) -> None:
    labels = np.array(Image.open(folder / "labels" / "a.png"))
    labels[0] = 3
    Image.fromarray(labels).save(folder / "labels" / "a.png")


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        (lambda folder: (folder / "photos" / "a.png").unlink(), "lacks a.png, needed all photos of 'train'"),
        (other_photo, "a.png has 71 x 60 pixels, the shards were made of one of 70 x 60 pixels"),
        (third_part, "a.png has part label 3, but the shards know 2 parts of object"),
        (lambda folder: (folder / "labels" / "a.png").unlink(), "a.png: no a.png in"),
    ],
)
def test_photos_that_the_shards_were_not_made_of_are_one_line(
    folder: Path, tmp_path: Path, change: Callable[[Path], Any], needed: str
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    change(own)
    with pytest.raises(UserError, match=needed) as raised:
        evaluate.main(of_folder(own, "--photos", str(own / "photos"), "--parts", str(own / "labels")))
    assert "\n" not in str(raised.value)


def test_a_baseline_on_a_compact_cache_is_scored_on_whole_photos(toy_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    build_cache(open_dataset(shards), Teacher("relu5_4", "random:0"), 64, compact=Compact(components=8))
    shutil.rmtree(shards / "features" / "vgg19-relu5_4-64")  # the plain cache is not needed
    command = ["--baseline", "kmeans", "--layer", "relu5_4", "--size", "64", "--components", "8"]
    found = scores_of([*command, "--shards", str(shards), "--photos", str(shards / "photos")], tmp_path / "x.json")
    (name,) = (name for name in found if name.startswith("kmeans"))
    assert 0 < found[name]["scores"]["photo"]["small"]["all classes"]["nmi"] < 1


def test_the_teacher_of_whole_photos_must_be_that_of_the_features(toy_shards: Path) -> None:
    command = ["--baseline", "kmeans", "--shards", str(toy_shards), "--photos", str(toy_shards / "photos")]
    with pytest.raises(UserError, match=r"made with the weights random:0 .*, came random:1"):
        evaluate.main([*command, "--teacher-weights", "random:1"])
    with pytest.raises(UserError, match="--parts goes with --photos"):
        evaluate.main(["--baseline", "kmeans", "--shards", str(toy_shards), "--parts", "x"])


def test_shards_name_no_photo_outside_the_source(toy_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(open_dataset(toy_shards), "val", None, with_labels=True)
    described = {"image": "../../../etc/passwd", "class": "cow", "source_size": [1, 1]}
    monkeypatch.setattr(split, "read_member", lambda sample, member: json.dumps(described))
    with (
        open_pascal_part(toy_shards / "photos", Path()) as source,
        pytest.raises(UserError, match=r"lacks \.\./\.\./\.\./etc/passwd"),
    ):
        PhotoSet(split, source)
