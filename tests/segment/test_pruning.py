import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import photo

import slotscops
from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.core.pictures import voc_palette
from slotscops.evaluate.__main__ import main as evaluate_main
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.network import build_network
from slotscops.segment import __main__ as segment
from slotscops.segment import export
from slotscops.segment.naming import name_parts
from slotscops.segment.pruning import find_dead, without_dead
from slotscops.train.build import Trained, load_model


def test_a_published_model_has_no_dead_part_and_the_same_labels(run_with_dead: Path, published: Path) -> None:
    whole, pruned = slotscops.load(run_with_dead), slotscops.load(published)
    assert (whole.part_numbers, pruned.part_numbers) == ([1, 2, 3, 4, 5], [1, 2, 4, 5])
    before, after = whole.segment(photo((90, 70))), pruned.segment(photo((90, 70)))
    assert set(np.unique(before.labels)) == {0, 1, 2, 4, 5}
    np.testing.assert_array_equal(after.labels, before.labels)
    np.testing.assert_allclose(after.maps, before.maps[[0, 1, 2, 4, 5]], atol=1e-6)
    np.testing.assert_array_equal(after.areas, before.areas[[0, 1, 2, 4, 5]])
    assert after.numbers.tolist() == [0, 1, 2, 4, 5]
    assert pruned.names is not None
    assert pruned.names.by_class == {"": ["head", "leg", "tail", None]}
    assert whole.part_numbers == [1, 2, 3, 4, 5]  # what was published from is as it was


def test_it_is_said_in_a_line_and_on_the_card_and_can_be_switched_off(
    run_with_dead: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (published / "README.md").read_text()
    assert "Finds 4 parts" in card
    assert "Part 3 won less than 0.1 % of the pixels of the last evaluation and is left out of maps and labels." in card
    table = "| slot | part | row of maps |\n| --- | --- | --- |\n| 1 | head | 1 |\n| 2 | leg | 2 |\n| 4 | tail | 3 |\n"
    assert table in card
    assert "ghost" not in card
    with safe_open(published / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["slotscops.state"])["slot_numbers"] == [0, 1, 2, 4, 5]
    model = slotscops.load(run_with_dead)
    model.save_pretrained(tmp_path / "pruned")
    assert capsys.readouterr().out.count("part 3 won less than 0.1 %") == 1
    model.keep_dead = True
    model.save_pretrained(tmp_path / "whole")
    assert not capsys.readouterr().out
    assert slotscops.load(tmp_path / "whole").part_numbers == [1, 2, 3, 4, 5]
    slotscops.load(published).save_pretrained(tmp_path / "again")
    assert not capsys.readouterr().out
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_results_of_a_pruned_model_have_the_parts_own_numbers_names_and_colours(
    published: Path, tmp_path: Path
) -> None:
    photo((90, 70)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    options = ["--checkpoint", str(published), "--out", str(out), "--format", "coco,labelme", "--features"]
    assert segment.main([*options, str(tmp_path / "photo.png")]) == 0
    labels = slotscops.load(published).segment(tmp_path / "photo.png").labels
    coco = json.loads((out / "coco.json").read_text())
    categories = {one["id"]: one["name"] for one in coco["categories"]}
    assert categories == {1: "head", 2: "leg", 4: "tail", 5: "part 5"}
    areas = {one["category_id"]: one["area"] for one in coco["annotations"]}
    assert areas == {number: (labels == number).sum() for number in categories}
    shapes = json.loads((out / "labelme" / "photo.json").read_text())["shapes"]
    assert {(shape["group_id"], shape["label"]) for shape in shapes} == set(categories.items())
    index = (out / "gallery" / "index.js").read_text()
    content = json.loads(index.removeprefix("slotscopsGallery(").removesuffix(");\n"))
    colours = voc_palette()[[0, 1, 2, 4, 5]].tolist()
    assert content["parts"] == [
        {"name": name, "colour": colour}
        for name, colour in zip(["background", *categories.values()], colours, strict=True)
    ]
    shares = [(labels == number).mean() * 1000 for number in (0, *categories)]
    np.testing.assert_allclose(content["photos"][0][-1], shares, atol=0.51)


def test_a_pruned_model_is_scored_and_named_as_the_whole_one(
    run_with_dead: Path, published: Path, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for path in (run_with_dead, published):
        file = tmp_path / f"{path.name}.json"
        assert evaluate_main(["--checkpoint", str(path), "--shards", str(toy_shards), "--json", str(file)]) == 0
        scores.append(json.loads(file.read_text())["methods"][0]["scores"])
    assert scores[0] == scores[1]
    whole, pruned = slotscops.load(run_with_dead), slotscops.load(published)
    of_whole, of_pruned = (name_parts(model, toy_shards).by_class[""] for model in (whole, pruned))
    assert of_pruned == [of_whole[place] for place in (0, 1, 3, 4)]


def test_an_exported_model_has_no_dead_part(
    run_with_dead: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.pt2"
    assert export.main(["--checkpoint", str(run_with_dead), "--out", str(out)]) == 0
    assert "part 3 won less than" in capsys.readouterr().out
    notes = {"slotscops.json": ""}
    program = torch.export.load(out, extra_files=notes).module()
    assert json.loads(notes["slotscops.json"])["numbers"] == "0,1,2,4,5"
    model = slotscops.load(run_with_dead)
    crops = model.crop(photo((64, 64)))[None]
    maps, labels = program(crops)
    assert maps.shape == (1, 5, 64, 64)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[0], model.forward(crops).maps((64, 64)).argmax(1)[0].byte())
    kept = []
    monkeypatch.setattr(export, "export", lambda model, *_: kept.append(model.part_numbers) or (0.0, 0.0))
    assert export.main(["--checkpoint", str(run_with_dead), "--out", str(out), "--keep-dead"]) == 0
    assert kept == [[1, 2, 3, 4, 5]]


def with_pixels(trained: Trained, pixels: dict[str, list[int]]) -> Trained:
    return trained._replace(state=replace(trained.state, slot_pixels=pixels))


def test_which_parts_are_dead_is_what_the_last_evaluation_counted(run_with_dead: Path) -> None:
    trained = load_model(run_with_dead)
    assert find_dead(trained) == [3]
    assert without_dead(with_pixels(trained, {})).network.num_slots == 6  # nothing was counted
    assert find_dead(with_pixels(trained, {"cow": [5000, 0, 1, 0, 5000, 4000], "cat": [1, 0, 0, 99, 9, 9]})) == [1, 2]
    none_left = with_pixels(trained, {"horse": [10_000, 0, 0, 0, 1, 2]})
    assert without_dead(none_left) is none_left


def test_a_header_that_names_slots_which_are_not_there_is_refused(published: Path, tmp_path: Path) -> None:
    with safe_open(published / "model.safetensors", "pt") as file:
        header = file.metadata()
    (tmp_path / "config.yaml").write_bytes((published / "config.yaml").read_bytes())
    for wrong in ([0, 1, 9], [0], [1, 2], [0, 2, 1], [0, 1, 1]):
        state = json.loads(header["slotscops.state"]) | {"slot_numbers": wrong}
        tensors = load_file(published / "model.safetensors")
        save_file(tensors, tmp_path / "model.safetensors", header | {"slotscops.state": json.dumps(state)})
        with pytest.raises(UserError, match=r"its header names slots .*: needed 0 and others of \(0, 1, 2, 3, 4, 5\)"):
            slotscops.load(tmp_path)


@pytest.mark.parametrize("num_classes", [None, 2])
def test_only_the_output_changes_and_the_slots_go_on_competing(num_classes: int | None) -> None:
    settings = ["decoder.maps=attention", "losses.mixture=1", "basis.part_directions=2"]
    settings += ["slots.per_class=own"] if num_classes else []
    network = build_network(FeatureEncoder(8), load_config(None, settings), 8, num_classes).eval()
    features, class_ids = torch.randn(2, 8, 4, 4), torch.tensor([0, 1])
    before = network(features, class_ids=class_ids)
    network.keep_slots([0, 2, 5])
    after = network(features, class_ids=class_ids)
    assert torch.equal(after.logits, before.logits[:, [0, 2, 5]])
    assert torch.equal(after.basis, before.basis[..., [1, 4], :])
    assert torch.equal(after.directions.parts, before.directions.parts[..., [1, 4], :, :])
    assert torch.equal(after.directions.background, before.directions.background)
    assert torch.equal(after.slot_output.attention, before.slot_output.attention)
    network.keep_slots([0, 5])
    assert network(features, class_ids=class_ids).logits.shape[1] == network.num_slots == 2


def test_maps_are_refined_before_slots_are_left_out() -> None:
    settings = ["decoder.maps=attention", "decoder.refinement=pamr"]
    network = build_network(FeatureEncoder(8), load_config(None, settings), 8).eval()
    photos = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    features = torch.randn(2, 8, 4, 4)
    before = network.segment_maps(network(features), photos)
    network.keep_slots([0, 2, 5])
    after = network.segment_maps(network(features), photos)
    kept = before[:, [0, 2, 5]]
    torch.testing.assert_close(after, kept / kept.sum(dim=1, keepdim=True))
    assert torch.equal(after.argmax(1), kept.argmax(1))
