"""Commands print one line that no outside text can forge, and end with an exit code."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from commands import run as run_process

from slotscops.core import console
from slotscops.core.errors import RunError, UserError

HOSTILE = "a\nslotscops: all is well \x1b[2J\r\u202e[bold]x[/bold]\udce9"


def run(command: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        console.run_command(command)  # type: ignore[arg-type]
    return int(ended.value.code or 0), capsys.readouterr().err


def raises(error: BaseException) -> object:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_full_memory_is_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(raises(kind("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")), capsys)
    assert code == 1
    (line,) = told.splitlines()
    assert line.startswith("slotscops: too little memory is free (CUDA out of memory. Tried to allocate 2 GiB.); end")


def test_another_error_of_pytorch_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        console.run_command(raises(RuntimeError("a fault of ours")))  # type: ignore[arg-type]


@pytest.mark.parametrize("show", [console.say, console.warn, console.say_plainly])
def test_what_comes_from_outside_stays_in_its_line_and_commands_no_terminal(
    show: object, capsys: pytest.CaptureFixture[str]
) -> None:
    show(HOSTILE)  # type: ignore[operator]
    captured = capsys.readouterr()
    (line,) = (captured.out + captured.err).splitlines()
    assert line.isprintable()
    assert line.endswith(r"a\nslotscops: all is well \x1b[2J\r\u202e[bold]x[/bold]\udce9")


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_the_text_of_an_error_is_one_line_also_where_no_command_prints_it(kind: type[Exception]) -> None:
    assert str(kind(HOSTILE)) == r"a\nslotscops: all is well \x1b[2J\r\u202e[bold]x[/bold]\udce9"


def test_a_cell_of_a_table_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("[red]title", ("name", "n"), [("[bold]x\x1b[2J", 1)])
    shown = capsys.readouterr().out
    assert r"[bold]x\x1b[2J" in shown
    assert "[red]title" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [160, 80, 60, 40])
def test_a_table_loses_no_name_and_no_number_on_a_narrow_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_table_width", lambda: width)
    headings = [f"score {number}" for number in range(8)]
    name = "runs/" + "x" * 60
    rows = [(name, kind, *(f"{place}{number}.5" for number in range(8))) for place, kind in enumerate(("cow", "horse"))]
    console.show_table("title", ("method", "class", *headings), rows, num_names=2)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    numbers = [cell for line in cells for cell in line[2:] if cell]
    assert sorted(numbers) == sorted(number for row in rows for number in row[2:])
    assert name in "".join(line[0] for line in cells)
    assert all(heading.split()[1] in shown for heading in headings)


def test_a_file_that_cannot_be_opened_because_too_many_are_open_is_not_blamed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> int:
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "index")
        except OSError:
            raise UserError("index: cannot be read; make the shards again") from None

    code, line = run(command, capsys)
    assert code == 2
    assert "index: too many open files; raise the limit of open files, as with ulimit -n 1024" in line
    assert "make the shards" not in line


def test_a_command_may_open_as_many_files_as_the_system_allows() -> None:
    script = (
        "import resource; from slotscops.core import console\n"
        "console.run_command(lambda: print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) or 0)"
    )
    limited = ["bash", "-c", 'ulimit -S -n 64; ulimit -H -n 200; exec "$@"', "limited", sys.executable, "-c", script]
    assert run_process(limited).stdout == "200\n"


@pytest.mark.parametrize(("error", "code"), [(UserError("a\nb"), 2), (RunError("a\nb"), 1)])
def test_an_error_is_one_line_whatever_newlines_a_path_in_it_has(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raises(error), capsys) == (code, "slotscops: a\\nb\n")


def test_an_error_from_a_loader_worker_is_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        "Caught RunError in DataLoader worker process 0.\nTraceback ...\nslotscops.core.errors.RunError: bad shard"
    )
    assert run(raises(RunError(message)), capsys) == (1, "slotscops: bad shard\n")


def test_an_error_from_a_loader_worker_keeps_all_lines_of_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        "Caught RunError in DataLoader worker process 0.\nTraceback ...\n"
        "slotscops.core.errors.RunError: shards/a\nb.tar: cannot be opened (no\nsuch)"
    )
    assert run(raises(RunError(message)), capsys) == (1, "slotscops: shards/a\\nb.tar: cannot be opened (no\\nsuch)\n")


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.ENOSPC, 1, "make room"),
        (errno.EIO, 1, "the disk may be failing"),
        (errno.EROFS, 2, "file system that can be written"),
        (errno.EACCES, 2, "permissions"),
        (errno.ENOENT, 2, "check the path"),
        (errno.ENAMETOOLONG, 2, "shorter name"),
        (errno.ELOOP, 2, "check the path"),
    ],
)
def test_a_file_that_the_system_refuses_is_named_with_what_to_do(
    number: int, code: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    came, line = run(raises(OSError(number, os.strerror(number), "some/file\n")), capsys)
    assert came == code
    assert line.startswith("slotscops: some/file\\n: ")
    assert remedy in line
    assert line.count("\n") == 1


def test_commands_end_in_one_line_where_they_cannot_write_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    script = (
        "import sys; from pathlib import Path; from slotscops.core import console\n"
        "console.run_command(lambda: Path(sys.argv[1]).mkdir() or 0)"
    )
    for place in (tmp_path / "file" / "below", tmp_path / ("n" * 300), tmp_path / "none" / "below", tmp_path / "file"):
        done = python("-c", script, place)
        assert done.returncode == 2
        assert done.stderr.startswith(f"slotscops: {place}: ")
        assert done.stderr.count("\n") == 1


def test_lost_readers_of_output_and_of_messages_end_nothing_with_a_traceback(tmp_path: Path) -> None:
    script = (
        "from slotscops.core import console\n"
        "def work():\n"
        "    for number in range(20000):\n"
        "        console.warn('line')\n"
        "    open('done', 'w').close()\n"
        "    for number in range(20000):\n"
        "        console.print_text('line')\n"
        "    return 0\n"
        "console.run_command(work)\n"
    )
    command = f'cd {tmp_path} && ({{ {sys.executable} -c "$SCRIPT" 2>&3 | head -1; }} 3>&1 >/dev/null) | head -1'
    done = python("-c", f"import subprocess; subprocess.run(['bash', '-c', {command!r}])", SCRIPT=script)
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stdout + done.stderr
