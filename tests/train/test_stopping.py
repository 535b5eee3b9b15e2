"""Real signals to real runs: each run saves a checkpoint, and the next start continues exactly."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import (
    PYTHON,
    TWO_PROCESSES,
    assert_same_tensors,
    last_step,
    metrics,
    orphans,
    rank_id,
    sabotaged,
    started,
    train,
    training,
    wait_for_step,
)

ENDLESS = ("train.total_steps=100000", "train.save_every_steps=100000")


def interrupt(shards: Path, run_dir: Path, launcher: list[str], whom: str, number: signal.Signals) -> int:
    """Sends the signal once the run is under way. Returns the step it stopped at."""
    with started(training(launcher, shards, run_dir, *ENDLESS)) as running:
        wait_for_step(run_dir, 3, running)
        os.kill(running.pid if whom == "launcher" else rank_id(run_dir, 1), number)
        signalled = time.monotonic()
        code = running.wait(timeout=60)
        assert time.monotonic() - signalled < 22
    assert code == (128 + number if launcher == PYTHON else 1)  # torch's launcher answers 1, whatever its workers do
    status = json.loads((run_dir / "status.json").read_text())
    assert status == {"state": "interrupted", "step": metrics(run_dir)[-1]["step"], "reason": number.name}
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{status['step']}"]
    assert orphans(run_dir) == []
    return int(status["step"])


def check_it_goes_on_as_if_nothing_had_happened(shards: Path, run_dir: Path, launcher: list[str], step: int) -> None:
    few = (*ENDLESS, "train.stop_after_steps=2")
    assert train(launcher, shards, run_dir, *few).returncode == 0
    whole = run_dir.with_name("whole")
    assert train(launcher, shards, whole, *ENDLESS, f"train.stop_after_steps={step + 2}").returncode == 0
    assert_same_tensors(*(folder / "checkpoints" / f"step-{step + 2}" for folder in (run_dir, whole)))
    assert [row["batch_digest"] for row in metrics(run_dir)] == [row["batch_digest"] for row in metrics(whole)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_a_run_of_one_process_saves_it(toy_shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    step = interrupt(toy_shards, tmp_path / "run", PYTHON, "launcher", number)
    if number == signal.SIGTERM:
        check_it_goes_on_as_if_nothing_had_happened(toy_shards, tmp_path / "run", PYTHON, step)


@pytest.mark.parametrize("launcher", [PYTHON, TWO_PROCESSES], ids=["one process", "two processes"])
def test_a_signal_amid_a_long_evaluation_does_not_wait_for_its_end(
    toy_shards: Path, tmp_path: Path, launcher: list[str]
) -> None:
    script = sabotaged(tmp_path, "pass")
    slow = (
        "from slotscops.metrics import scoring\n"
        "scoring.BATCH_SIZE = 1\n"
        "predictor = scoring.network_predictor\n"
        "def slow(network, device):\n"
        "    def predict(batch):\n"
        "        time.sleep(8)\n"
        "        return predictor(network, device)(batch)\n"
        "    return predict\n"
        "scoring.network_predictor = slow\n"
    )
    script.write_text(script.read_text().replace("plain = Trainer._loss\n", slow + "plain = Trainer._loss\n"))
    settings = (*ENDLESS, "train.eval_every_steps=2")
    with started(training(launcher, toy_shards, tmp_path / "run", *settings, script=script)) as running:
        wait_for_step(tmp_path / "run", 1, running)
        time.sleep(1.5)  # step 2 is done, its evaluation is under way: three crops a process at the least, 8 s each
        os.kill(running.pid, signal.SIGTERM)
        signalled = time.monotonic()
        running.wait(timeout=60)
        assert time.monotonic() - signalled < 22
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status == {"state": "interrupted", "step": status["step"], "reason": "SIGTERM"}
    assert 2 < status["step"] <= 4
    assert "val_nmi" not in {name for row in metrics(tmp_path / "run") for name in row}


@pytest.mark.parametrize("whom", ["launcher", "one rank"])
def test_ranks_agree_on_the_step_to_stop_at_whoever_is_signalled(toy_shards: Path, tmp_path: Path, whom: str) -> None:
    step = interrupt(toy_shards, tmp_path / "run", TWO_PROCESSES, whom, signal.SIGTERM)
    if whom == "one rank":
        check_it_goes_on_as_if_nothing_had_happened(toy_shards, tmp_path / "run", TWO_PROCESSES, step)


def test_a_signal_amid_accumulation_waits_for_the_end_of_the_step(toy_shards: Path, tmp_path: Path) -> None:
    settings = ("train.accumulation_steps=4", "data.num_workers=2", "train.mixed_precision=bf16", "train.ema_decay=0.9")
    run_dir = tmp_path / "run"
    for _ in range(2):  # interrupted twice
        with started(training(PYTHON, toy_shards, run_dir, *ENDLESS, *settings)) as running:
            wait_for_step(run_dir, last_step(run_dir) + 3, running)
            os.killpg(running.pid, signal.SIGTERM)  # as a scheduler does: loader workers too
            assert running.wait(timeout=60) == 128 + signal.SIGTERM
    step = metrics(run_dir)[-1]["step"]
    whole = tmp_path / "whole"
    assert train(PYTHON, toy_shards, whole, *ENDLESS, *settings, f"train.stop_after_steps={step}").returncode == 0
    assert_same_tensors(*(folder / "checkpoints" / f"step-{step}" for folder in (run_dir, whole)))


def test_a_second_ctrl_c_leaves_at_once(toy_shards: Path, tmp_path: Path) -> None:
    script = sabotaged(tmp_path, "time.sleep(60 if step == 3 else 0)")
    with started(training(PYTHON, toy_shards, tmp_path / "run", *ENDLESS, script=script)) as running:
        wait_for_step(tmp_path / "run", 2, running)
        for _ in range(2):
            assert running.process.poll() is None
            os.kill(running.pid, signal.SIGINT)
            time.sleep(1.5)
        assert running.wait(timeout=2) == 130
