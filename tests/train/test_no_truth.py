"""Photos without true parts can be trained on, and no scores are shown for them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from commands import PYTHON, metrics, train
from PIL import Image

from slotscops.evaluate import __main__ as evaluate
from slotscops.loader.split import Split
from slotscops.metrics.protocols import ORDERS, PROTOCOLS
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.train.processes import check_object_masks
from slotscops.train.run.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    for number in range(12):
        place = folder / "photos" / ("val" if number % 3 == 0 else "train")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"photo{number}.png")
    command = ["--images", str(folder / "photos"), "--out", str(folder / "shards"), "--teacher-weights", "random:0"]
    assert shard.main([*command, "--size", "64", "--workers", "1"]) == 0
    return folder / "shards"


def test_without_true_parts_there_are_no_scores_and_no_best_and_the_page_says_why(
    unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    done = train(PYTHON, unlabelled, run_dir, "train.eval_every_steps=3")
    assert done.returncode == 0, done.stderr
    assert "val_" not in done.stdout + done.stderr
    assert not [name for row in metrics(run_dir) for name in row if name.startswith("val_")]
    assert not (run_dir / "checkpoints" / "best").is_symlink()
    state = load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1]).state
    assert (state.scores, state.best) == ({}, {})
    assert "no true parts" in json.loads((run_dir / "evaluation.json").read_text())["no_scores"]
    assert "have no true parts to compare with" in (run_dir / "report.html").read_text()

    scores = tmp_path / "scores.json"
    command = ["--checkpoint", str(run_dir), "--baseline", "position", "--shards", str(unlabelled), "--landmarks"]
    capsys.readouterr()
    assert evaluate.main([*command, "--json", str(scores)]) == 0
    said = capsys.readouterr()
    assert "no true parts" in said.err
    rows = [line for line in said.out.splitlines() if "position" in line and "│" in line]
    assert rows
    assert not any(letter.isdigit() for row in rows for letter in row)
    for method in json.loads(scores.read_text())["methods"]:
        assert method["landmark_error"] == {}
        for protocol in PROTOCOLS:
            for order in ORDERS:
                assert set(method["scores"][protocol][order]["object"].values()) == {None}


def test_photos_with_true_parts_keep_their_scores_and_their_best(toy_shards: Path, tmp_path: Path) -> None:
    done = train(PYTHON, toy_shards, tmp_path, "train.eval_every_steps=3")
    assert done.returncode == 0, done.stderr
    last = metrics(tmp_path)[-1]
    assert all(math.isfinite(last[name]) for name in ("val_nmi", "val_fg_nmi", "val_mask_ari"))
    assert (tmp_path / "checkpoints" / "best").is_symlink()
    assert "no_scores" not in json.loads((tmp_path / "evaluation.json").read_text())
    state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).state
    assert state.scores["val_nmi"] == last["val_nmi"]
    assert "step" not in state.scores


def test_photos_without_masks_are_no_objects_to_train_on(unlabelled: Path, toy_shards: Path, tmp_path: Path) -> None:
    done = train(PYTHON, unlabelled, tmp_path / "run", "losses.target_mask=object", "basis.init=kmeans")
    assert done.returncode == 2
    assert "losses.target_mask is object, but the photos have no masks" in done.stderr
    assert "Traceback" not in done.stderr
    check_object_masks(Split(open_dataset(toy_shards), "train", None, False, with_object_masks=True))


def test_a_mask_that_is_a_box_with_room_around_it_is_a_mask(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60), np.uint8)
    pixels[10:30, 10:50] = 255
    for name in ("photos", "parts"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    command = ["--images", str(tmp_path / "photos"), "--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "out")]
    assert shard.main([*command, "--size", "64", "--workers", "1", "--no-features", "--val-share", "0"]) == 0
    split = Split(open_dataset(tmp_path / "out"), "train", None, False, with_object_masks=True)
    check_object_masks(split)
