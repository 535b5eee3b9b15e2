"""Two starts of the `shard` command in one folder: they share the work, or one of them is refused."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import Running, started

from slotscops.core.errors import ClaimError, UserError
from slotscops.core.files import writer_name
from slotscops.shard import __main__ as shard
from slotscops.shard.index import open_dataset
from slotscops.shard.writer import claimed_drawing

TOY = ["--toy", "--toy-train", "6", "--toy-val", "2", "--samples-per-shard", "3", "--workers", "1", "--no-features"]


def start_together(out: Path, first: list[str], second: list[str]) -> list[tuple[int, str]]:
    """Exit code and stderr of two shard commands that run at the same time."""
    with ExitStack() as stack:
        commands: list[Running] = []
        for more in (first, second):
            command = [sys.executable, "-m", "slotscops.shard", *TOY, "--out", str(out), *more]
            commands.append(stack.enter_context(started(command)))
        return [(running.wait(60), running.said(running.err)) for running in commands]


def test_the_same_command_twice_at_once_makes_one_data_set(tmp_path: Path) -> None:
    ends = start_together(tmp_path / "out", ["--size", "64"], ["--size", "64"])
    assert [code for code, _ in ends] == [0, 0], ends
    assert shard.main(["--verify", str(tmp_path / "out")]) == 0
    assert shard.main([*TOY, "--size", "64", "--out", str(tmp_path / "alone")]) == 0
    assert open_dataset(tmp_path / "out").digest == open_dataset(tmp_path / "alone").digest
    assert not list(tmp_path.rglob("*.partial"))


def test_of_two_sizes_at_once_one_wins_and_the_other_is_refused_with_the_reason(tmp_path: Path) -> None:
    ends = start_together(tmp_path, ["--size", "64"], ["--size", "96"])
    assert sorted(code for code, _ in ends) == [0, 2], ends
    (reason,) = [said for code, said in ends if code == 2]
    assert "was made with another size (" in reason
    assert shard.main(["--verify", str(tmp_path)]) == 0
    assert open_dataset(tmp_path).size == (64 if ends[0][0] == 0 else 96)


def test_what_a_process_leaves_that_was_killed_before_its_plan_is_no_obstacle(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    machine, _ = writer_name().split("-")
    (tmp_path / "index").mkdir()
    left = tmp_path / "index" / f".plan.json.{machine}-{ended.pid}.x.partial"
    left.write_bytes(b"half")
    assert shard.main([*TOY, "--size", "64", "--out", str(tmp_path)]) == 0
    assert not left.exists()


def test_an_index_of_other_shards_without_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "dataset.json").write_text("{}")
    with pytest.raises(ClaimError, match="holds other shards"):
        shard.main([*TOY, "--size", "64", "--out", str(tmp_path)])
    assert not (tmp_path / "photos").exists()


def test_other_photos_are_not_drawn_over_those_that_are_being_drawn(tmp_path: Path) -> None:
    numbers = {"num_train": 6, "num_val": 2, "seed": 0}
    other = numbers | {"seed": 1}
    with claimed_drawing(tmp_path, numbers) as is_needed, claimed_drawing(tmp_path, numbers) as is_needed_too:
        assert is_needed
        assert is_needed_too
        with pytest.raises(ClaimError, match=r"another seed \(0, now 1\)"), claimed_drawing(tmp_path, other):
            pass
    with pytest.raises(UserError, match="give 1 to"):
        shard.main(["--toy", "--toy-train", "0", "--no-features", "--out", str(tmp_path / "again")])
    # Numbers that were refused claim nothing.
    assert shard.main([*TOY, "--size", "64", "--out", str(tmp_path / "again")]) == 0
    assert not (tmp_path / "again" / "index" / "drawing.json").exists()


def test_the_second_of_two_processes_that_find_nothing_to_write_ends_as_the_first_did(tmp_path: Path) -> None:
    nothing = [*TOY, "--size", "64", "--classes", "dog", "--out", str(tmp_path)]
    for _ in range(2):
        with pytest.raises(UserError, match="no object is left to write"):
            shard.main(nothing)
        assert not (tmp_path / "index").exists()
