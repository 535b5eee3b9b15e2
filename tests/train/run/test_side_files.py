import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PYTHON, TIMEOUT_S, last_step, metrics, started, training
from full_disk import small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slotscops.config import load_config
from slotscops.core.records import Batch
from slotscops.train import loop
from slotscops.train.fit import fit
from slotscops.train.loop import Trainer
from slotscops.train.run.checkpoint import verify_checkpoint
from slotscops.train.run.side_files import SideFiles


def test_a_full_disk_does_not_end_training_and_what_was_missing_is_written_when_there_is_room(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, plain_save, missing = Trainer._loss, Trainer.save, list[dict[str, str]]()
    monkeypatch.setattr(loop.Trainer, "save", lambda self, writer: self.step >= 10 and plain_save(self, writer))
    with small_disk(tmp_path / "disk", megabytes=24) as disk:

        def change_disk(self: Trainer, batch: Batch) -> object:
            if self.step == 3:
                disk.fill()
            if self.step == 7:
                missing.append(self.files.missing)
                disk.make_room()
            return plain(self, batch)

        monkeypatch.setattr(Trainer, "_loss", change_disk)
        run = disk.path / "run"
        settings = [
            f"data.shards={toy_shards}", f"run_dir={run}", "data.size=64", "data.num_workers=0",
            "encoder.name=features", "train.batch_size=8", "train.total_steps=10", "train.log_every_steps=1",
            "train.eval_every_steps=2",
        ]  # fmt: skip
        assert fit(load_config(None, settings)) == 0
        said = capsys.readouterr().err
        kinds = {"metrics.jsonl", "pictures", "tensorboard events", "report.html", "evaluation.json", "status.json"}
        assert missing[0].keys() == kinds
        assert all(said.count(f"WARNING: {kind} could not be written (No space left on device)") == 1 for kind in kinds)
        assert "Traceback" not in said
        assert [row["step"] for row in metrics(run)] == list(range(1, 11))
        assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 10, "reason": ""}
        assert len(list((run / "pictures").iterdir())) == 5
        assert (run / "checkpoints" / "step-10" / "manifest.json").is_file()
        assert "finished" in (run / "report.html").read_text()
        (folder,) = {path.parent for path in run.rglob("events.*")}
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))


def test_a_process_trains_on_while_its_disks_are_full_and_catches_up_when_there_is_room(
    toy_shards: Path, tmp_path: Path
) -> None:
    kinds = {"metrics.jsonl", "pictures", "tensorboard events", "report.html", "evaluation.json", "status.json"}
    with (
        small_disk(tmp_path / "disk", megabytes=40, is_real=True) as disk,
        small_disk(disk.path / "run" / "pictures", megabytes=30, is_real=True) as pictures,
    ):
        run = disk.path / "run"
        settings = ["train.total_steps=100000", "train.eval_every_steps=2", "train.save_every_steps=2"]
        command = training(PYTHON, toy_shards, run, *settings)
        with started(command) as running:

            def wait_until(is_so: Callable[[], object], what: str) -> None:
                ends = time.monotonic() + TIMEOUT_S
                while not is_so():
                    assert running.process.poll() is None, running.said(running.err)
                    assert time.monotonic() < ends, f"{what}: {running.said(running.err)}"
                    time.sleep(0.05)

            def said(*texts: str) -> bool:
                return all(text in running.said(running.err) for text in texts)

            def status() -> dict[str, Any]:
                return json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}

            pictures.fill()
            wait_until(lambda: "missing" in status(), "missing pictures")
            assert status()["missing"] == {"pictures": "No space left on device"}
            assert status()["state"] == "running"
            disk.fill()
            warnings = [f"WARNING: {kind} could not be written (No space left on device)" for kind in kinds]
            wait_until(lambda: said(*warnings, "the checkpoint could not be written"), "warnings")
            last = last_step(run)
            whole = {path.name for path in (run / "checkpoints").glob("step-*")}
            assert whole
            pictures.make_room()
            disk.make_room()
            wait_until(lambda: said(*(f"{kind}: can be written again" for kind in kinds)), "room again")
            wait_until(lambda: last_step(run) > last + 5, "more steps")
            running.process.terminate()
            assert running.wait() == 128 + signal.SIGTERM
            text = running.said(running.err)
        assert all(text.count(warning) == 1 for warning in warnings)
        assert "Traceback" not in text
        end = status()
        assert end == {"state": "interrupted", "step": end["step"], "reason": "SIGTERM"}
        assert [row["step"] for row in metrics(run)] == list(range(1, end["step"] + 1))
        assert verify_checkpoint(run / "checkpoints" / f"step-{end['step']}")
        assert not list((run / "checkpoints").glob(".*"))
        newest = max(int(path.stem.removeprefix("step-")) for path in (run / "pictures").glob("step-*.png"))
        assert last < newest
        assert f"pictures/step-{newest}.png" in (run / "report.html").read_text()
        (folder,) = {path.parent for path in run.rglob("events.*")}
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(1, end["step"] + 1))


def test_what_cannot_be_written_is_named_in_the_status_with_its_reason(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(loop.RunFolder, "log", refuse)
    settings = [
        f"data.shards={toy_shards}", f"run_dir={tmp_path}", "data.size=64", "data.num_workers=0",
        "encoder.name=features", "train.batch_size=8", "train.total_steps=2", "train.eval_every_steps=0",
    ]  # fmt: skip
    assert fit(load_config(None, settings)) == 0
    assert json.loads((tmp_path / "status.json").read_text())["missing"] == {"metrics.jsonl": "Read-only file system"}


def test_only_the_newest_of_a_file_that_is_written_whole_waits() -> None:
    files, room, written = SideFiles(), False, list[int]()

    def write(number: int) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(number)

    for number in range(3):
        files.write("page", lambda number=number: write(number), keep=1)  # type: ignore[misc]
        files.write("rows", lambda number=number: write(10 + number))  # type: ignore[misc]
    room = True
    files.catch_up()
    assert written == [2, 10, 11, 12]
    assert not files.missing
