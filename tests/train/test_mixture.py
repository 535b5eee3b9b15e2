"""A small training with the mixture loss, from the start to pictures of parts."""

from pathlib import Path

import numpy as np
import pytest
from commands import metrics, train
from safetensors.torch import load_file
from small_runs import photo

import slotscops
from slotscops.segment.formats import About
from slotscops.segment.part_features import PartFeatures

MIXTURE = (
    "losses.semantic=0", "losses.mixture=1", "losses.background=1", "losses.target_mask=object", "basis.kind=free",
    "basis.init=kmeans", "decoder.maps=attention", "decoder.places=facing", "train.learning_rate=0.01",
    "train.total_steps=16", "train.batch_size=8", "train.eval_every_steps=16", "train.save_every_steps=16",
)  # fmt: skip
ABOUT = About("model", "command", {}, Path())


def test_a_run_with_the_mixture_learns_and_its_model_loads_segments_and_is_published(
    toy_shards: Path, tmp_path: Path
) -> None:
    done = train(["python"], toy_shards, tmp_path / "run", *MIXTURE)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert -10 <= rows[-1]["loss_mixture"] < rows[0]["loss_mixture"]
    assert rows[-1]["loss_background"] < rows[0]["loss_background"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_mixture"] + rows[-1]["loss_background"])
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-16" / "model.safetensors")
    assert saved["background_parameter"].shape == (5, 512)

    model = slotscops.load(tmp_path / "run")
    found = model.segment(photo((90, 60)))
    maps = found.maps
    assert maps.shape[0] == 6
    assert found.facing in (1, -1)
    assert PartFeatures(ABOUT).describe(Path("a.jpg"), "a", found)[2]["facing"] == found.facing
    model.save_pretrained(tmp_path / "published")
    np.testing.assert_array_equal(slotscops.load(tmp_path / "published").segment(photo((90, 60))).maps, maps)
