"""Several processes that claim one folder, and files that a killed process leaves in it."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slotscops.core import claims, console
from slotscops.core.claims import claim, leased_units
from slotscops.core.errors import ClaimError
from slotscops.core.files import remove_abandoned, replace_when_complete, write_once, writer_name

# Four processes wait for the same moment and claim the same path, each with settings of its own, or all with the same.
RACE = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from slotscops.core.claims import claim
    from slotscops.core.errors import ClaimError

    folder, differ = Path(sys.argv[1]), sys.argv[2] == "differ"
    for number in range(25):
        (folder / str(number)).mkdir()
        start = time.monotonic() + 0.005
        children = []
        for child in range(4):
            process = os.fork()
            if process == 0:
                while time.monotonic() < start:
                    pass
                try:
                    claim(folder / str(number) / "plan.json", {"size": child if differ else 0}, "choose another --out")
                    os._exit(0)
                except ClaimError:
                    os._exit(2)
                finally:
                    os._exit(1)
            children.append(process)
        print(*sorted(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children))
    """
)


# Four processes share twelve units of 20 ms. Each prints what it did; one is killed while it does its second unit.
SHARED_UNITS = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from slotscops.core import claims, console
    from slotscops.core.claims import leased_units

    folder = Path(sys.argv[1])
    names = [f"unit-{number}" for number in range(12)]
    claims._POLL_S = 0.02
    for child in range(4):
        process = os.fork()
        if process == 0:
            console.rank, console.world_size = lambda: child, lambda: 4
            done = []
            for unit in leased_units(names, folder, lambda unit: (folder / names[unit]).exists()):
                done.append(unit)
                time.sleep(0.02)
                if child == 3 and len(done) == 2:
                    os._exit(9)
                with (folder / names[unit]).open("x") as file:
                    file.write(str(child))
            os._exit(0)
    print(*sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
    """
)


def test_leased_units_are_done_once_and_those_of_a_killed_process_by_another(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED_UNITS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["0", "0", "0", "9"], done.stderr  # a unit done twice would fail to open its file
    assert len(list(tmp_path.glob("unit-*"))) == 12
    assert {path.read_text() for path in tmp_path.glob("unit-*")} == set("0123")
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_looked_before_another_took_over_does_not_get_the_lease_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = tmp_path / ".unit.lease"
    lease.write_text("its owner was killed")
    looks: list[bool] = []

    def has_ended(owner: str, is_silent: bool) -> bool:
        if not looks:  # the first process looks at the old lease, and before it goes on the second takes over
            looks.append(True)
            looks.append(claims._take_over(lease))
        return owner != writer_name()

    monkeypatch.setattr(claims, "has_ended", has_ended)
    assert not claims._take_over(lease) or not looks[1]
    assert looks == [True, True]
    assert lease.read_text() == writer_name()
    assert [path.name for path in tmp_path.iterdir()] == [".unit.lease"]


def test_a_lease_of_another_machine_is_taken_over_once_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = tmp_path / ".unit.lease"
    lease.write_text("0123abcd-17")
    monkeypatch.setattr(claims, "_SILENT_S", 0.3)
    monkeypatch.setattr(claims, "_POLL_S", 0.05)
    begin = time.monotonic()
    for _ in leased_units(["unit"], tmp_path, lambda _: False):
        assert time.monotonic() - begin > 0.2
        assert lease.read_text() == writer_name()
        break
    assert not lease.exists()


@pytest.mark.parametrize(("settings", "codes"), [("differ", "0 2 2 2"), ("equal", "0 0 0 0")])
def test_of_several_claims_at_once_exactly_one_wins_and_equal_ones_share(
    tmp_path: Path, settings: str, codes: str
) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path), settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [codes] * 25, done.stderr
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_claims_are_exclusive_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert write_once(tmp_path / "plan.json", b"first")
    assert not write_once(tmp_path / "plan.json", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_a_claim_made_between_the_look_and_the_writing_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path / "plan.json", {"size": 64}, "choose another --out")
    monkeypatch.setattr(Path, "exists", lambda _: False)
    claim(tmp_path / "plan.json", {"size": 64}, "choose another --out")
    with pytest.raises(ClaimError, match=r"another size \(64, now 96\); choose another --out"):
        claim(tmp_path / "plan.json", {"size": 96}, "choose another --out")
    assert json.loads((tmp_path / "plan.json").read_text()) == {"size": 64}


def test_a_refused_claim_is_said_by_every_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> int:
        raise ClaimError("shards/a: was made with another size")

    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        console.run_command(refused)
    assert ended.value.code == 2
    assert "was made with another size" in capsys.readouterr().err


def test_temporary_files_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    killed = "import sys, os, pathlib; from slotscops.core.files import replace_when_complete as open_new\n"
    killed += (
        "with open_new(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "killed.tar")], timeout=60, check=False)
    machine, process = writer_name().split("-")
    elsewhere = "0" * 8 if machine != "0" * 8 else "1" * 8
    for name in (f".a.{machine}-{process}.x.partial", f".b.{elsewhere}-1.x.partial", ".c.x.partial"):
        (tmp_path / name).write_bytes(b"half")
    old = tmp_path / f".d.{elsewhere}-1.x.partial"
    old.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    (tmp_path / "whole.tar").write_bytes(b"whole")
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".killed.tar.")]) == 1
    with replace_when_complete(tmp_path / "mine") as file:
        remove_abandoned(tmp_path, tmp_path / "nowhere")
        file.write(b"mine")
    left = [f".a.{machine}-{process}.x.partial", f".b.{elsewhere}-1.x.partial", ".c.x.partial", "mine", "whole.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
