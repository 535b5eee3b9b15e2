import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fuzz
import fuzz_readers
import numpy as np
import pytest
from commands import popen

ROOT = Path(__file__).parent
HELPERS = str(ROOT.parent / "helpers")


@pytest.fixture(autouse=True)
def forked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks the processes that read, because each new interpreter imports all that the readers need."""
    as_always = SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(fuzz, "subprocess", as_always)


def test_a_few_hundred_damaged_files_end_in_a_result_or_a_one_line_error(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fuzz.py", "--inputs", "240", "--seed", "3", "--corpus", str(toy_shards)]
    monkeypatch.setattr(sys, "argv", command)
    code, told = fuzz.main(), capsys.readouterr().out
    assert code == 0, told
    assert "240 inputs, seed 3: 0 failures" in told
    assert {line.split()[0] for line in told.splitlines() if re.search(" read | refused ", line)} == {*fuzz.READERS}
    assert len([line for line in told.splitlines() if " refused " in line]) >= len(fuzz.READERS) - 2


def test_an_input_that_crashes_a_reader_is_seen_and_counted(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The children run this script instead. Its reader of tars dies at once.
    (tmp_path / "bad_fuzz.py").write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {HELPERS!r}]\n"
        "import fuzz, fuzz_readers\n"
        "fuzz_readers.READERS |= {'tar': lambda *_: os.abort()}\n"
        "sys.exit(fuzz.main())\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "bad_fuzz.py"))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--inputs", "2", "--corpus", str(toy_shards)])
    assert fuzz.main() == 1
    told = capsys.readouterr().out
    assert "input 1, tar: crash, exit code -6" in told
    assert "2 inputs, seed 0: 1 failures" in told


def test_a_reader_that_stays_at_one_input_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANGS_AFTER_S", 0.5)
    (tmp_path / "progress").write_text("7")
    with subprocess.Popen(["sleep", "100"]) as process:
        assert not fuzz.wait(process, tmp_path / "progress")
    assert process.returncode == -9
    with subprocess.Popen(["sleep", "0"]) as process:
        assert fuzz.wait(process, tmp_path / "progress")


def test_inputs_depend_on_seed_and_number_only() -> None:
    content = bytes(range(256)) * 20
    made = [fuzz_readers.damage(content, [content], np.random.default_rng([0, number])) for number in (5, 5, 6)]
    assert made[0] == made[1]
    assert made[0] != made[2]
