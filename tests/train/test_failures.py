"""Failures during a run: it ends in time, says which rank failed and why, and leaves a whole checkpoint."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import (
    PYTHON,
    TWO_PROCESSES,
    Running,
    orphans,
    process_ids,
    rank_id,
    run_without_reader,
    sabotaged,
    started,
    training,
    wait_for_step,
)

from slotscops.train.run.folder import resolve_checkpoint

RUN = ("train.total_steps=100000", "train.save_every_steps=2", "train.timeout_minutes=0.15")
FAST_LAUNCHER = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}


def end_of(running: Running, run_dir: Path, within_s: float) -> str:
    """Output of a run. Checks that it ended in time with all its processes, and that its last checkpoint is whole."""
    assert running.wait(timeout=within_s) == 1
    assert orphans(run_dir) == []
    resolve_checkpoint(run_dir)  # verifies every hash
    return running.said(running.err)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(toy_shards: Path, tmp_path: Path, rank: int) -> None:
    run_dir = tmp_path / "run"
    with started(training(TWO_PROCESSES, toy_shards, run_dir, *RUN), **FAST_LAUNCHER) as running:
        wait_for_step(run_dir, 6, running)
        os.kill(rank_id(run_dir, rank), signal.SIGKILL)
        said = end_of(running, run_dir, within_s=40)
    # If the launcher is quicker than the surviving rank, the launcher names the failed rank.
    assert f"lost rank {rank}: killed" in said or f"rank      : {rank}" in said
    assert "step " in said


def test_a_hung_rank_ends_the_run_after_the_timeout_and_is_named(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(training(TWO_PROCESSES, toy_shards, run_dir, *RUN), **FAST_LAUNCHER) as running:
        wait_for_step(run_dir, 4, running)
        os.kill(rank_id(run_dir, 1), signal.SIGSTOP)
        said = end_of(running, run_dir, within_s=60)
    assert "slotscops: rank 0: after step " in said
    assert "lost rank 1: killed, or it gave no answer within train.timeout_minutes" in said


def test_an_error_on_one_rank_is_told_by_the_other(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = sabotaged(tmp_path, "if (rank, step) == (1, 4): raise ZeroDivisionError('of rank 1')")
    with started(training(TWO_PROCESSES, toy_shards, run_dir, *RUN, script=script), **FAST_LAUNCHER) as running:
        said = end_of(running, run_dir, within_s=90)
    assert "slotscops: rank 1, after step 3: ZeroDivisionError: of rank 1" in said


def test_a_loss_that_is_not_finite_on_one_rank_only_ends_all_with_its_name(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = sabotaged(tmp_path, "if (rank, step) == (1, 4): return plain(self, batch) * float('nan')")
    with started(training(TWO_PROCESSES, toy_shards, run_dir, *RUN, script=script), **FAST_LAUNCHER) as running:
        said = end_of(running, run_dir, within_s=90)
    assert "the loss of rank 1 has not been finite since step 4" in said


def test_a_killed_loader_worker_is_named(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = training(PYTHON, toy_shards, run_dir, *RUN, "data.num_workers=1")
    with started(command) as running:
        wait_for_step(run_dir, 4, running)
        helpers = [number for number in process_ids("forkserver") if os.getpgid(number) == running.pid]
        os.kill(max(helpers), signal.SIGKILL)  # the youngest: the server came before its workers
        said = end_of(running, run_dir, within_s=40)
    assert "slotscops: after step " in said
    assert ": a loader worker died" in said


def test_a_relaunch_after_a_failure_goes_on(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(training(PYTHON, toy_shards, run_dir, *RUN)) as running:
        wait_for_step(run_dir, 5, running)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait(timeout=10) == -signal.SIGKILL
    with started(training(PYTHON, toy_shards, run_dir, *RUN, "train.stop_after_steps=2")) as running:
        assert running.wait() == 0
        assert "going on from step" in running.said(running.out)


def test_processes_that_were_given_different_settings_are_refused(toy_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(
        "import os, sys\n"
        "sys.argv += ['slots.num_parts=' + str(3 + int(os.environ['RANK']))]\n"
        f"sys.path.insert(0, {str(Path('launch').resolve())!r})\n"
        "import train\n"
        "from slotscops.core import console\n"
        "console.run_command(train.main)\n"
    )
    began = time.monotonic()
    with started(training(TWO_PROCESSES, toy_shards, tmp_path / "run", *RUN, script=script)) as running:
        assert running.wait() == 1  # the launcher's own
        said = running.said(running.err)
    assert time.monotonic() - began < 60
    assert said.count("slotscops: rank 1 came with settings other than rank 0's") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loader_that_falls_silent_ends_the_run_with_its_last_step_saved(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # Loader workers import the script again: its split falls silent at the sixth batch.
    script = sabotaged(tmp_path, "")
    script.write_text(
        "import time\n"
        "from slotscops.loader.split import Split\n"
        "count, read = 0, Split.__getitems__\n"
        "def silent(self, samples):\n"
        "    global count\n"
        "    count += 1\n"
        "    time.sleep(3600 if count == 6 else 0)\n"
        "    return read(self, samples)\n"
        "Split.__getitems__ = silent\n" + script.read_text()
    )
    settings = (*RUN, "train.save_every_steps=1000", "data.num_workers=1")
    with started(training(PYTHON, toy_shards, run_dir, *settings, script=script)) as running:
        said = end_of(running, run_dir, within_s=60)
    assert "slotscops: after step 5: no loader worker has answered for 0.15 minutes" in said.splitlines()[-1]
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-5"]


def test_training_comes_to_its_end_when_nobody_reads_its_output_any_more(toy_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_without_reader(training(PYTHON, toy_shards, run_dir), tmp_path) == 0
    assert resolve_checkpoint(run_dir).name == "step-6"
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
