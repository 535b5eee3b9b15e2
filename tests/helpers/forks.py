"""Runs commands of the project in processes forked from one that has already imported torch and the package.

A new interpreter imports torch, torchvision and Accelerate for 3 to 5 seconds, which is most of the time of a small
command. A fork is still a process of its own: it has its own id, session, standard streams, arguments and exit status.

As a script, this file is the process that forks. It reads one JSON line per command from its standard input and writes
two lines back: the id of the process that runs the command, then its exit status.
"""

import atexit
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# What the commands import. Their `__main__` modules are left out, because runpy runs those anew.
_PRELOADED = ("slotscops.train.fit", "slotscops.evaluate.scoreboard", "slotscops.features.writer",
              "slotscops.shard.writer", "slotscops.segment.segmenter", "torch.utils.tensorboard")  # fmt: skip
RANKS = "forked-ranks"
_forker: subprocess.Popen[str] | None = None
_environment: dict[str, str] = {}


def ranks(count: int) -> list[str]:
    """Launcher of that many processes on this machine, without Accelerate's launcher, whose imports take seconds too.

    It sets the variables that torch's launcher sets. Tests of failing ranks use the real launcher.
    """
    return [RANKS, str(count)]


def can_fork(command: list[str], environment: dict[str, str]) -> bool:
    """Whether the command is Python with a script or a module of the project, in an environment like the first one.

    Some libraries read the environment as they are imported, so a command with other variables starts anew.
    """
    global _environment
    if command[0] == RANKS:
        command = command[1:]
    if (
        (command[0] != sys.executable and not command[0].isdigit())
        or len(command) < 2
        or not Path("/proc/self/task").is_dir()
    ):
        return False
    if not (command[1] == "launch/train.py" or (command[1] == "-m" and command[2].startswith("slotscops."))):
        return False
    _environment = _environment or environment
    return environment == _environment


def run_forked(command: list[str], folder: Path, out: Path, err: Path, timeout_s: float) -> int:
    """Exit status of the command, run from `folder`; after `timeout_s` it is killed, and TimeoutExpired is raised."""
    global _forker
    if _forker is None:
        _forker = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=_environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        atexit.register(_end)
    assert _forker.stdin is not None
    assert _forker.stdout is not None
    _forker.stdin.write(json.dumps([command[1:], str(out), str(err)]) + "\n")
    number = int(_forker.stdout.readline())
    with selectors.DefaultSelector() as selector:
        selector.register(_forker.stdout, selectors.EVENT_READ)
        in_time = bool(selector.select(timeout_s))
    if not in_time:
        os.killpg(number, signal.SIGKILL)
    status = int(_forker.stdout.readline())
    if not in_time:
        raise subprocess.TimeoutExpired(command, timeout_s)
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)  # whatever is left of its process group
    return status


def _end() -> None:
    """Ends the forking process, which has nothing to save."""
    if _forker is not None:
        with _forker:
            _forker.kill()


def _run(arguments: list[str], out: str, err: str) -> None:
    """Becomes the command, as the interpreter would run it."""
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_APPEND),
        (2, err, os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if arguments[0].isdigit():
        _become_rank(int(arguments.pop(0)))
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent.absolute())
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _become_rank(count: int) -> None:
    """Forks that many ranks and returns in each; the process itself waits for them and ends with the worst status."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    numbers = []
    for rank in range(count):
        number = os.fork()
        if number == 0:
            of_all = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ACCELERATE_MIXED_PRECISION": "no"}
            os.environ.update({name: str(value) for name, value in (of_all | of_rank).items()})
            return
        numbers.append(number)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    sys.exit(int(any(statuses)))


def _fork_for_each_line() -> None:
    for module in _PRELOADED:
        importlib.import_module(module)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a process with several threads cannot be forked safely")
    while line := sys.stdin.readline():
        number = os.fork()
        if number == 0:
            _run(*json.loads(line))
            return
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


if __name__ == "__main__":
    _fork_for_each_line()
