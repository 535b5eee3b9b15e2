"""Every command ends in one line with path and remedy where the system refuses to write or to read a file."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from audit import audited
from full_disk import small_disk
from small_runs import photo, save_feature_run

from slotscops.core import console
from slotscops.evaluate import __main__ as evaluate
from slotscops.features import __main__ as features
from slotscops.segment import __main__ as segment
from slotscops.segment import export
from slotscops.shard import __main__ as shard
from slotscops.train.run import page

WRITES = ("open", "os.mkdir", "os.rename", "os.link")
# What is refused: everything, as on a read-only disk; the final names of files.
REFUSED = {errno.EROFS: WRITES, errno.EIO: ("os.rename", "os.link")}
Command = Callable[[Path, Path], int]


@pytest.fixture(scope="module")
def inputs(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run and photos."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(toy_shards, folder / "shards", ignore=shutil.ignore_patterns("photos"))
    run = save_feature_run(folder / "run")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    (folder / "photos").mkdir()
    photo((40, 30)).save(folder / "photos" / "horse.jpg")
    return folder


def shard_photos(inputs: Path, out: Path) -> int:
    whole = ["--images", str(inputs / "photos"), "--val-share", "0", "--workers", "1", "--no-features"]
    return shard.main([*whole, "--size", "32", "--out", str(out)])


def inspect_shards(inputs: Path, out: Path) -> int:
    return shard.main(["--inspect", str(inputs / "shards"), "--out", str(out)])


def add_features(inputs: Path, out: Path) -> int:
    weights = ["--teacher", "resnet18", "--layer", "layer1", "--teacher-weights", "random:0"]
    return features.main(["--shards", str(inputs / "shards"), "--size", "32", *weights])


def evaluate_run(inputs: Path, out: Path) -> int:
    given = ["--checkpoint", str(inputs / "run"), "--shards", str(inputs / "shards")]
    return evaluate.main([*given, "--json", str(out)])


def segment_photos(inputs: Path, out: Path) -> int:
    given = ["--checkpoint", str(inputs / "run"), "--teacher-weights", "random:0"]
    return segment.main([*given, "--soft", "--out", str(out), str(inputs / "photos")])


def export_run(inputs: Path, out: Path) -> int:
    return export.main(["--checkpoint", str(inputs / "run"), "--teacher-weights", "random:0", "--out", f"{out}.pt2"])


def report_run(inputs: Path, out: Path) -> int:
    return page.main([str(inputs / "run")])


COMMANDS: tuple[Command, ...] = (
    shard_photos, inspect_shards, add_features, evaluate_run, segment_photos, export_run, report_run,
)  # fmt: skip


def end_of(command: Command, inputs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code of the command, and the only line that it printed on stderr."""
    with pytest.raises(SystemExit) as ended:
        console.run_command(lambda: command(inputs, out))
    lines = [line for line in capsys.readouterr().err.splitlines() if "UNTRAINED" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("slotscops: ")
    return ended.value.code, lines[0]


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_write_ends_in_one_line(
    command: Command, number: int, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(export, "export", lambda model, out, crops: export.write_bytes(out, b"") or (0.0, 0.0))
    refused: list[str] = []

    def refuse(event: str, arguments: tuple[object, ...]) -> str:
        path = arguments[1] if event in ("os.rename", "os.link") else arguments[0]
        is_read = event == "open" and not int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        if is_read or not isinstance(path, str | os.PathLike):
            return ""
        place = Path(path)
        if tmp_path not in place.parents and inputs not in place.parents:
            return ""
        refused.append(place.name)
        raise OSError(number, os.strerror(number), str(place))

    with audited(*REFUSED[number], describe=refuse):
        code, line = end_of(command, inputs, tmp_path / "out", capsys)
    assert refused
    assert code in (1, 2)
    assert str(tmp_path) in line or str(inputs) in line
    assert os.strerror(number).lower() in line.lower()
    assert ".partial" not in line
    assert "; " in line  # and what to do
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command is not inspect_shards])
def test_a_command_on_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(
    command: Command, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export", lambda model, out, crops: export.write_bytes(out, b"x" * 9000) or (0.0, 0.0))
    with small_disk(tmp_path / "disk", megabytes=32) as disk:
        own = Path(shutil.copytree(inputs, disk.path / "inputs"))
        (disk.path / "out").mkdir()
        disk.fill()
        before = {path for path in disk.path.rglob("*") if path.is_file()}
        code, line = end_of(command, own, disk.path / "out" / "x", capsys)
        assert {path for path in disk.path.rglob("*") if path.is_file()} == before
    assert code == 1
    assert line.startswith(f"slotscops: {disk.path}")
    assert line.endswith(": no space left on device; make room there and start again")
    assert ".partial" not in line


@pytest.mark.parametrize("command", [shard_photos, add_features, evaluate_run, export_run, report_run])
def test_a_disk_that_fails_while_a_file_is_written_is_named(
    command: Command, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(export, "export", lambda model, out, crops: export.write_bytes(out, b"") or (0.0, 0.0))
    own = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", fail)
    code, line = end_of(command, own, tmp_path / "out", capsys)
    assert code == 1
    assert line.startswith(f"slotscops: {tmp_path}")
    assert line.endswith(": input/output error; the disk may be failing: copy what is there to another one")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (inspect_shards, "shards/index/dataset.json"),
        (evaluate_run, "run/checkpoints/step-1/model.safetensors"),
        (report_run, "run/metrics.jsonl"),
    ],
)
def test_a_file_that_opens_but_cannot_be_read_is_named(
    command: Command, name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    (own / name).unlink()
    (own / name).symlink_to("/proc/self/mem")  # Linux opens it, and reading its first bytes is an input/output error
    code, line = end_of(command, own, tmp_path / "out", capsys)
    assert code in (1, 2)
    assert line.startswith(f"slotscops: {own / name}: ")
    assert "input/output error" in line.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_cannot_read_ends_in_one_line(
    command: Command, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(event: str, arguments: tuple[object, ...]) -> str:
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and inputs in Path(path).parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return ""

    with audited("open", describe=refuse):
        code, line = end_of(command, inputs, tmp_path / "out", capsys)
    assert code in (1, 2)
    assert "put/output error" in line
    assert str(inputs) in line


@pytest.mark.parametrize("name", ["n" * 300, "file/below"], ids=["too long", "below a file"])
@pytest.mark.parametrize("command", [shard_photos, inspect_shards, evaluate_run, segment_photos, export_run])
def test_a_place_that_cannot_be_written_is_named(
    command: Command, name: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    code, line = end_of(command, inputs, tmp_path / name, capsys)
    assert code == 2
    assert str(tmp_path) in line


@pytest.mark.parametrize("command", [inspect_shards, evaluate_run, export_run])
def test_a_file_in_a_folder_that_is_missing_is_refused(
    command: Command, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = end_of(command, inputs, tmp_path / "none" / "out", capsys)
    assert code == 2
    assert str(tmp_path / "none") in line


@pytest.mark.parametrize("command", [shard_photos, segment_photos])
def test_a_file_in_the_place_of_a_folder_is_refused(
    command: Command, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("x")
    code, line = end_of(command, inputs, tmp_path / "out", capsys)
    assert code == 2
    assert str(tmp_path / "out") in line
    assert (tmp_path / "out").read_text() == "x"
