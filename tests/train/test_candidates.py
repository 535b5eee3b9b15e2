import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PYTHON, assert_same_tensors, metrics, train
from forks import ranks

from slotscops.config import Config, config_from_mapping
from slotscops.core.errors import RunError, UserError
from slotscops.loader.split import Split
from slotscops.shard.reader import ShardReader
from slotscops.train import candidates
from slotscops.train.candidates import candidate_seeds, check_candidates, find_best, score_run
from slotscops.train.fit import fit
from slotscops.train.loop import Trainer
from slotscops.train.processes import start_accelerator

FEATURES = {"name": "features"}
CHOICES: dict[str, dict[str, Any]] = {
    "semantic, slots": {},
    "mixture without slots, by likelihood": {
        "losses": {"semantic": 0.0, "mixture": 1.0, "target_mask": "object"},
        "decoder": {"maps": "head_only"},
        "basis": {"kind": "free", "choose_by": "likelihood"},
    },
    "photos, slots of each class": {
        "encoder": {"name": "resnet18", "weights": "random:0"},
        "slots": {"per_class": "own"},
        "basis": {"candidates": 2, "candidate_steps": 1},
    },
}


def small_config(shards: Path, run_dir: Path, choice: dict[str, Any], **train_settings: Any) -> Config:
    settings = {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards), "size": 64, "num_workers": 0},
        "encoder": FEATURES,
        "teacher": {"transform": "l2"},
        "decoder": {"maps": "attention"},  # with these slots nothing collapses at once
        "train": {"batch_size": 4, "total_steps": 3, "eval_every_steps": 0, "log_every_steps": 1, **train_settings},
        **{name: value for name, value in choice.items() if name != "basis"},
        "basis": {"init": "kmeans", "candidates": 3, "candidate_steps": 2} | choice.get("basis", {}),
    }
    return config_from_mapping(settings, "test")


def checkpoint(config: Config, step: int = 3) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step-{step}"


@pytest.mark.parametrize("name", CHOICES)
def test_the_run_begins_from_the_best_candidate_and_reads_no_part_label(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read = set()
    plain = ShardReader.read_member

    def note(self: ShardReader, row: int, member: str) -> bytes:
        read.add(member)
        return plain(self, row, member)

    monkeypatch.setattr(ShardReader, "read_member", note)
    config = small_config(toy_shards, tmp_path / "run", CHOICES[name])
    assert fit(config) == 0
    assert read == {"jpg"} | ({"object.png"} if config.losses.target_mask == "object" else set())

    found = json.loads((tmp_path / "run" / "candidates.json").read_text())
    rows, chosen = found["candidates"], found["chosen"]
    assert [row["seed"] for row in rows] == candidate_seeds(config.seed, config.basis.candidates)
    assert found["held_out_images"] == 17 // 4
    values = [row[config.basis.choose_by] for row in rows]
    assert len(set(values)) > 1
    assert values[chosen] == max(values)
    assert {f"loss_{term}" for term in ("semantic", "mixture") if getattr(config.losses, term)} < set(rows[0])

    trainer = Trainer(config, start_accelerator(config))
    trainer.begin(rows[chosen]["seed"])
    batches = trainer.open_batches(3)
    losses = [trainer.take_step(batches)[0].item() for _ in range(3)]
    assert [row["loss"] for row in metrics(tmp_path / "run")] == losses


def test_one_candidate_is_what_the_run_was_without(toy_shards: Path, tmp_path: Path) -> None:
    config = small_config(toy_shards, tmp_path / "run", {"basis": {"candidates": 1}})
    assert fit(config) == 0
    assert not (tmp_path / "run" / "candidates.json").exists()
    assert candidate_seeds(7, 1) == [7]
    assert len({*candidate_seeds(7, 50), *candidate_seeds(8, 50)}) == 100


def test_a_run_killed_while_choosing_chooses_the_same_and_one_that_goes_on_chooses_no_more(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_config(toy_shards, tmp_path / "whole", {})
    assert fit(whole) == 0
    plain = Trainer.take_step
    calls = []

    def killed(self: Trainer, batches: Any) -> Any:
        calls.append(self.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, batches)

    config = small_config(toy_shards, tmp_path / "run", {}, stop_after_steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
    assert fit(config) == 0
    chosen = (tmp_path / "run" / "candidates.json").read_text()
    assert chosen == (tmp_path / "whole" / "candidates.json").read_text()
    monkeypatch.setattr(candidates, "score_without_labels", None)  # whoever chooses again, fails
    assert fit(small_config(toy_shards, tmp_path / "run", {})) == 0
    assert_same_tensors(checkpoint(whole), checkpoint(config))
    assert (tmp_path / "run" / "candidates.json").read_text() == chosen


def test_two_processes_choose_what_one_chooses(toy_shards: Path, tmp_path: Path) -> None:
    settings = ["basis.init=kmeans", "basis.candidates=2", "basis.candidate_steps=1", "train.total_steps=1"]
    settings += ["train.reduction=deterministic", "train.microbatches=2"]
    for name, launcher in (("one", PYTHON), ("two", ranks(2))):
        done = train(launcher, toy_shards, tmp_path / name, *settings)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("candidate 2 of 2") + done.stdout.count("candidate 2 of 2") == 1
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (one / "candidates.json").read_text() == (two / "candidates.json").read_text()
    assert_same_tensors(one / "checkpoints" / "step-1", two / "checkpoints" / "step-1", of=("model", "optimizer"))


def test_candidates_are_scored_on_photos_that_they_did_not_train_on(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: set[int] = set()
    scored: set[int] = set()
    plain = Split.read

    def note(self: Split, samples: Any) -> Any:
        (scored if torch.is_inference_mode_enabled() or not torch.is_grad_enabled() else trained).update(
            samples.tolist()
        )
        return plain(self, samples)

    config = small_config(toy_shards, tmp_path / "run", {"basis": {"candidate_steps": 6}}, total_steps=6)
    trainer = Trainer(config, start_accelerator(config))
    monkeypatch.setattr(candidates, "candidate_seeds", lambda seed, number: [seed])  # its clusters were found above
    monkeypatch.setattr(Split, "read", note)
    candidates.choose_start(trainer)
    assert len(scored) == 4
    assert len(trained) == 13
    assert not scored & trained


def test_a_finished_run_is_scored_by_the_same_numbers(toy_shards: Path, tmp_path: Path) -> None:
    config = small_config(toy_shards, tmp_path / "run", {})
    assert fit(config) == 0
    scores = score_run(tmp_path / "run", num_images=4)
    assert set(scores) == {"agreement", "agreement_nmi", "likelihood", "loss_semantic"}
    assert 0 < scores["agreement"] <= 1
    assert scores["likelihood"] == -scores["loss_semantic"] < 0
    assert scores == score_run(tmp_path / "run", num_images=4)
    assert scores != score_run(tmp_path / "run", num_images=5)
    with pytest.raises(UserError, match=r"data\.mirror is on"):
        score_run(tmp_path / "run", mirrored=True)


def test_candidates_that_are_not_finite_are_never_chosen() -> None:
    assert find_best([float("nan"), -3.0, -2.0, -2.0]) == 2
    with pytest.raises(RunError, match=r"no candidate .* lower train\.learning_rate"):
        find_best([float("nan")] * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": {"candidates": 2}}, r"basis\.init is random .* set basis\.init=kmeans or basis\.candidates=1"),
        (
            {
                "basis": {"candidates": 2, "init": "kmeans", "choose_by": "likelihood"},
                "losses": {"semantic": 0.0, "presence": 1.0},
            },
            r"neither losses\.semantic nor losses\.mixture is on",
        ),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_candidates(config_from_mapping(settings, "test"))


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    config = small_config(toy_shards, tmp_path / "file" / "run", {})
    trainer = Trainer(config, start_accelerator(config))
    monkeypatch.setattr(Trainer, "take_step", None)
    with pytest.raises(UserError, match=r"choose another folder with run_dir=DIR"):
        candidates.choose_start(trainer)


def test_a_split_too_small_to_hold_photos_out_is_refused(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(toy_shards, tmp_path / "run", {})
    trainer = Trainer(config, start_accelerator(config))
    monkeypatch.setattr(Split, "__len__", lambda self: 3)
    with pytest.raises(UserError, match=r"has 3 photos to train on, too few .* set basis\.candidates=1"):
        candidates.choose_start(trainer)


def test_seeds_fit_what_scikit_learn_takes() -> None:
    assert all(0 <= seed < 2**32 for seed in candidate_seeds(2**32 - 1, 20))
    assert candidate_seeds(3, 4)[:2] == candidate_seeds(3, 2)
    assert np.unique(candidate_seeds(3, 200)).size == 200
