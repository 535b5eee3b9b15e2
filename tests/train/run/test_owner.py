"""A run's folder has one owner at a time, and one whole checkpoint is enough to continue."""

import errno
import fcntl
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from commands import PYTHON, metrics, started, train, training, wait_for_step

from slotscops.core.errors import UserError
from slotscops.train.run import owner
from slotscops.train.run.folder import RunFolder, read_metrics, resolve_checkpoint


def test_a_second_start_is_refused_with_the_owner_and_a_killed_owner_leaves_the_folder_free(
    toy_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = ("train.total_steps=100000", "train.save_every_steps=1", "train.log_every_steps=1")
    with started(training(PYTHON, toy_shards, run, *endless)) as first:
        wait_for_step(run, 2, first)
        second = train(PYTHON, toy_shards, run, "train.learning_rate=0.5")
        assert second.returncode == 2
        (line,) = [line for line in second.stderr.splitlines() if line.startswith("slotscops: ")]
        assert line.startswith(f"slotscops: {run}: process {first.pid} on {socket.gethostname()}, started 20")
        assert "choose another folder with run_dir=DIR" in line
        wait_for_step(run, metrics(run)[-1]["step"] + 1, first)  # the first one goes on undisturbed
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait()
    again = train(PYTHON, toy_shards, run, "train.total_steps=100000", "train.stop_after_steps=1")
    assert again.returncode == 0, again.stderr
    assert not (run / "owner.json").exists()


def test_another_folder_of_the_same_process_is_free_and_the_same_one_is_its_own(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        owner.take_ownership(folder)
    owner.release_ownership(tmp_path / "a")
    owner.release_ownership(tmp_path / "a")
    with (tmp_path / "a" / ".owner.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free
        with pytest.raises(UserError, match="another process trains there"):
            owner.take_ownership(tmp_path / "a")
        with (tmp_path / "b" / ".owner.lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    owner.release_ownership(tmp_path / "b")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    owner.take_ownership(tmp_path / "run")
    assert "its file system has no locks" in capsys.readouterr().err


def test_one_that_trained_between_the_look_and_the_lock_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step-7").mkdir(parents=True)
    with pytest.raises(UserError, match="another process has trained there meanwhile, to step 7; start again"):
        folder.take(step=0)
    folder.take(step=7)
    folder.release()


def test_lines_that_are_no_logged_steps_are_set_aside_and_stop_neither_resume_nor_the_page(
    toy_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(PYTHON, toy_shards, run, "train.stop_after_steps=3").returncode == 0
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    bad = [b"17", b"{}", b"\xff" + lines[0], b'{"step": "2"}', b"[" * 100_000]
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:], b'{"step": 3, "lo']))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    done = train(PYTHON, toy_shards, run)
    assert done.returncode == 0, done.stderr
    assert "5 damaged line(s) were moved to metrics.jsonl.damaged" in done.stderr
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "metrics.jsonl.damaged").read_bytes().splitlines() == bad


def test_fewer_total_steps_than_done_is_a_finished_run(toy_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(PYTHON, toy_shards, run).returncode == 0
    assert train(PYTHON, toy_shards, run, "train.total_steps=4").returncode == 0
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_the_best_checkpoint_is_found_where_no_link_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "best.txt").write_text("step-3\n")
    with pytest.raises(UserError, match="step-3"):  # it is looked at, and is no whole checkpoint
        resolve_checkpoint(tmp_path / "best")
    (tmp_path / "best.txt").write_text("../elsewhere\n")
    with pytest.raises(UserError, match="best: no such run or checkpoint"):
        resolve_checkpoint(tmp_path / "best")


def test_a_long_reason_of_several_lines_is_one_short_line_in_the_status(tmp_path: Path) -> None:
    RunFolder(tmp_path).note("failed", 3, "first\nsecond " + "x" * 10_000 + " last")
    status = json.loads((tmp_path / "status.json").read_text())
    assert len(status["reason"]) <= 300
    assert status["reason"].startswith("first second x")
    assert status["reason"].endswith("x last")
