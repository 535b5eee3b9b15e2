import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import photo

import slotscops
from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.datasets.toy.tree import draw_photo
from slotscops.loader.batches import evaluation_batches
from slotscops.loader.split import Split
from slotscops.segment import __main__ as segment
from slotscops.segment.names import FILE, PartNames, read_names, shown_names
from slotscops.segment.naming import Overlaps, count_overlaps, name_parts
from slotscops.segment.segmenter import Segmenter
from slotscops.shard.index import open_dataset
from slotscops.train.build import build_model

COARSE = ["head", "neck", "torso", "legs", "tail", "horn"]


def coarse_label(part: str) -> int:
    """The label of the coarse part that a part of the toy belongs to."""
    if part[1:] in ("ear", "eye") or part == "muzzle":
        return 1
    if "leg" in part or part.endswith("ho"):
        return 4
    return 6 if part.endswith("horn") else 1 + COARSE.index(part)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three toy photos, with label maps of the parts of their nearest animal."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "parts").mkdir()
    (folder / "parts" / "parts.txt").write_text("\n".join(COARSE))
    drawn = (draw_photo(0, "train", number) for number in itertools.count())
    with_parts = ((picture, animal) for picture, animals in drawn for animal in animals[:1] if animal.parts)
    for number, (picture, animal) in enumerate(itertools.islice(with_parts, 3)):
        labels = np.zeros(animal.mask.shape, np.uint8)
        for part, mask in reversed(animal.parts):
            labels[mask] = coarse_label(part)
        picture.save(folder / f"{number}.jpg", quality=95)
        Image.fromarray(labels).save(folder / "parts" / f"{number}.png")
    return folder


def best_agreement(one: Overlaps) -> int:
    """Most labelled pixels that any assignment of names to slots makes agree, by trying all of them."""
    overlap = one.table[1:, 1:]
    slots, parts = range(len(overlap)), range(max(overlap.shape))
    padded = np.pad(overlap, ((0, 0), (0, len(parts) - overlap.shape[1])))
    return max(int(padded[slots, names].sum()) for names in itertools.permutations(parts, len(slots)))


def test_three_labelled_photos_give_the_best_of_all_assignments_of_names(
    varied_run: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = slotscops.load(varied_run)
    overlaps, num_photos = count_overlaps(model, labelled)
    one = overlaps[""]
    assert set(one.part_names) >= {"head", "neck", "torso", "legs"}
    assert num_photos == 3
    names = name_parts(model, labelled)
    given = [name for name in names.by_class[""] if name]
    assert len(set(given)) == len(given) >= 4
    assert one.agreeing(names.by_class[""]) == best_agreement(one)
    assert names.agreement == pytest.approx(best_agreement(one) / one.table[:, 1:].sum())
    told = capsys.readouterr().out
    assert f"{names.agreement:.1%} of the labelled pixels of 3 photos agree" in told
    for name in set(one.part_names) - set(given):
        assert name in told.partition("true parts without a slot: ")[2]


def test_a_slot_that_meets_no_true_part_gets_no_name() -> None:
    table = np.array([[50, 3, 3, 2], [0, 0, 9, 0], [7, 0, 0, 0], [1, 6, 8, 0]])
    one = Overlaps(["head", "tail", "wing"], table)
    assert one.match() == ["tail", None, "head"]
    assert one.agreeing(one.match()) == 15


def test_shards_count_as_evaluation_sees_them(varied_run: Path, toy_shards: Path) -> None:
    model, dataset = slotscops.load(varied_run), open_dataset(toy_shards)
    overlaps, num_crops = count_overlaps(model, toy_shards)
    one, expected = overlaps[""], np.zeros_like(overlaps[""].table)
    splits = (Split(dataset, name, None, with_labels=True) for name in dataset.splits)
    batches = [batch for split in splits for batch in evaluation_batches(split, 7)]
    assert num_crops == sum(map(len, batches)) > 20
    for batch in batches:
        with torch.inference_mode():
            found = model.network(batch.images).maps((64, 64)).argmax(dim=1).numpy()
        assert batch.part_labels_small is not None
        true = batch.part_labels_small.numpy()
        for slots, labels, class_id in zip(found, true, batch.class_ids.tolist(), strict=True):
            parts = dataset.part_names[dataset.class_names[class_id]]
            for label in np.unique(labels):
                column = 1 + one.part_names.index(parts[label - 1]) if label else 0
                expected[:, column] += np.bincount(slots[labels == label], minlength=len(expected))
    assert np.abs(one.table - expected).sum() <= 1e-3 * expected.sum()  # another batch may change a last bit


def test_names_stand_in_the_page_and_in_coco_and_are_found_again_and_published(
    varied_run: Path, labelled: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(varied_run, tmp_path / "run")
    photo((40, 30)).save(tmp_path / "horse.jpg")
    common = ["--checkpoint", str(run), "--format", "coco", str(tmp_path / "horse.jpg"), "--out"]
    assert segment.main([*common, str(tmp_path / "first"), "--name-from", str(labelled)]) == 0
    assert segment.main([*common, str(tmp_path / "again")]) == 0
    model = slotscops.load(run)
    shown = shown_names(model.names, [], range(1, 6))[""]
    assert len(set(shown) & set(COARSE)) >= 4
    for out in (tmp_path / "first", tmp_path / "again"):
        page = json.loads((out / "gallery" / "index.js").read_text().partition("(")[2].rpartition(")")[0])
        assert [part["name"] for part in page["parts"]] == ["background", *shown]
        coco = json.loads((out / "coco.json").read_text())
        assert [category["name"] for category in coco["categories"]] == shown

    model.save_pretrained(tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"| 1 | {shown[0]} |" in card
    assert "Named from 3 labelled photos" in card
    assert slotscops.load(tmp_path / "published").names == model.names
    model.names = None
    model.save_pretrained(tmp_path / "published")
    assert not (tmp_path / "published" / FILE).exists()
    assert "Named from" not in (tmp_path / "published" / "README.md").read_text()


def multi_class(run: Path, class_names: Sequence[str]) -> Segmenter:
    """An untrained model in which each class has parts of its own."""
    own = ["slots.per_class=own", "encoder.name=resnet18", "encoder.weights=random:0", "decoder.maps=attention"]
    config = load_config(None, ["data.size=64", *own])
    trained = slotscops.load(run).trained
    network = build_model(config, 512, num_classes=len(class_names)).eval()
    state = replace(trained.state, class_names=list(class_names))
    return Segmenter(trained._replace(network=network, config=config, state=state))


def test_a_model_of_several_classes_has_names_for_each(varied_run: Path, labelled: Path, toy_shards: Path) -> None:
    model = multi_class(varied_run, ["cow", "horse", "table"])
    with pytest.raises(UserError, match="say with --class what the photos show"):
        name_parts(model, labelled)
    assert set(name_parts(model, labelled, class_name="cow").by_class) == {"cow", "horse", "table"}
    names = name_parts(model, toy_shards).by_class
    dataset = open_dataset(toy_shards)
    assert names["table"] == [None] * 5
    for class_name in ("cow", "horse"):
        assert {name for name in names[class_name] if name} <= set(dataset.part_names[class_name])
        assert any(names[class_name])
    with pytest.raises(UserError, match="shows cow, but the model has parts for horse; label these"):
        name_parts(multi_class(varied_run, ["horse"]), toy_shards)


@pytest.mark.parametrize("fault", ["no label maps", "two folders", "empty maps", "no folder", "--parts alone"])
def test_labels_that_name_no_parts_are_one_line(varied_run: Path, labelled: Path, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(labelled, tmp_path / "labelled"))
    told = {
        "no label maps": "neither shards nor label maps there; put the label maps and parts.txt into",
        "two folders": "2 of its sub-folders hold parts.txt",
        "empty maps": "holds no photo with a label map in",
        "no folder": "no such folder",
        "--parts alone": "goes with --name-from",
    }[fault]
    if fault == "no label maps":
        shutil.rmtree(folder / "parts")
    if fault == "two folders":
        shutil.copytree(folder / "parts", folder / "more")
    if fault == "empty maps":
        for path in (folder / "parts").glob("*.png"):
            path.unlink()
    if fault == "no folder":
        shutil.rmtree(folder)
    named = ["--parts", str(folder)] if fault == "--parts alone" else ["--name-from", str(folder)]
    photo((40, 30)).save(tmp_path / "horse.jpg")
    common = ["--checkpoint", str(varied_run), "--out", str(tmp_path / "out"), str(tmp_path / "horse.jpg")]
    with pytest.raises(UserError, match=told):
        segment.main([*common, *named])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"by_class": {"": ["a"]}, "agreement": 1, "num_photos": 3}',
     '{"by_class": {"": ["a", "b\\u001b", null, null, null]}, "agreement": 1, "num_photos": 3}',
     '{"by_class": {"cow": [null, null, null, null, null]}, "agreement": 1, "num_photos": 3}',
     '{"by_class": {"": [null, null, null, null, 7]}, "agreement": 1, "num_photos": 3}'],
)  # fmt: skip
def test_names_from_elsewhere_are_checked(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=r"part_names\.json: does not hold names of this model's parts") as caught:
        read_names(tmp_path, [], 5)
    assert str(caught.value).isprintable()


def test_names_that_do_not_fit_a_model_are_refused(varied_run: Path) -> None:
    with pytest.raises(ValueError, match="it has names for 2 parts, the model has 5"):
        slotscops.load(varied_run).names = PartNames({"": ["head", "tail"]}, 0.5, 3)
