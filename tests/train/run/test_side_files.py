import errno
import json
import os
from pathlib import Path

import pytest
from commands import metrics
from full_disk import small_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slotscops.config import load_config
from slotscops.core.records import Batch
from slotscops.train import loop
from slotscops.train.fit import fit
from slotscops.train.loop import Trainer
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
