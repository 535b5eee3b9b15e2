"""Starts real processes for the tests, with a time limit, and always ends them."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import forks
import torch
from safetensors.torch import load_file

from slotscops.train.run.folder import read_metrics

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 240
_MARK = "SLOTSCOPS_TEST"
# On CPUs, this is the only way to make Accelerate start the requested number of processes.
_ACCELERATE = ["accelerate", "launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
_ON_ITS_OWN = ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
TWO_PROCESSES = [*_ACCELERATE, "--multi_gpu", "--num_processes", "2", *_ON_ITS_OWN]
PYTHON = [sys.executable]  # no launcher: a run of one process
ONE_PROCESS = [*_ACCELERATE, "--num_processes", "1"]


@dataclass
class Running:
    """A command that was started, what it has said so far, and its process group."""

    process: subprocess.Popen[bytes]
    out: IO[str]
    err: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        return self.process.wait(timeout)

    def said(self, stream: IO[str]) -> str:
        stream.seek(0)
        return stream.read()


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project from its root; its whole process group ends with it."""
    with started(command, **environment) as running:
        code = running.wait()
        return subprocess.CompletedProcess(command, code, running.said(running.out), running.said(running.err))


def run_without_reader(command: list[str], folder: Path) -> int:
    """Exit status of a command whose output and messages are read up to the end of the first line, as by `head -1`.

    Args:
        folder: for the named pipe that the command writes to.
    """
    pipe = folder / "pipe"
    os.mkfifo(pipe)

    def read_one_line() -> None:
        with pipe.open("rb", buffering=0) as file:
            file.readline()

    reader = threading.Thread(target=read_one_line, daemon=True)
    reader.start()
    with pipe.open("wb") as out:
        process = _start(command, _clean_environment(), out, out)
    return process.wait(TIMEOUT_S)


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[Running]:
    """A command of the project while it runs; whatever is left of its process group is killed at the end."""
    clean = _clean_environment()
    path = environment.pop("PATH", os.environ["PATH"])
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    mark = uuid.uuid4().hex
    # Files, because a pipe that nobody reads stops the process once it is full.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = _start(command, clean | {_MARK: mark} | environment, out, err)
        try:
            yield Running(process, out, err)
        finally:
            # A launcher puts its processes into sessions of their own. We find them by a variable that they inherit.
            for number in [process.pid, *process_ids("", f"{_MARK}={mark}")]:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            process.wait()


def popen(command: list[str], stdout: IO[Any], stderr: IO[Any] = sys.__stderr__) -> subprocess.Popen[bytes]:
    """What `subprocess.Popen` does for a command of the project."""
    return _start(command, _clean_environment(), stdout, stderr)


def _start(command: list[str], environment: dict[str, str], out: IO[Any], err: IO[Any]) -> subprocess.Popen[bytes]:
    """Forks the command where that shows the same as starting it."""
    if forks.can_fork(command, environment, _USUAL):
        return forks.start(command, environment, _USUAL, ROOT, out.fileno(), err.fileno())
    if command[0] == forks.RANKS:  # no fork here: the real launcher
        command = [*_ACCELERATE, "--multi_gpu", "--num_processes", command[1], *_ON_ITS_OWN, *command[2:]]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)


def _clean_environment() -> dict[str, str]:
    """The environment of a command: one thread, no GPU, no process group, this interpreter's programs on the PATH."""
    of_others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST")
    clean = {name: value for name, value in os.environ.items() if name not in of_others}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return clean | {"PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


_USUAL = _clean_environment()  # before the first test can change it


def train(launcher: list[str], shards: Path, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Trains the small configuration of the tests."""
    return run(training(launcher, shards, run_dir, *settings))


def training(
    launcher: list[str], shards: Path, run_dir: Path, *settings: str, script: str | Path = "launch/train.py"
) -> list[str]:
    """The command that trains the small configuration of the tests."""
    small = [
        f"data.shards={shards}", f"run_dir={run_dir}", "data.size=64", "data.num_workers=0", "encoder.name=features",
        "train.batch_size=8", "train.total_steps=6", "train.log_every_steps=1", "train.eval_every_steps=0",
    ]  # fmt: skip
    return [*launcher, str(script), *small, *settings]


def sabotaged(folder: Path, body: str) -> Path:
    """A script that trains as launch/train.py does, but for `body`, which runs before the loss of each microbatch."""
    script = folder / "sabotaged.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'launch')!r})\n"
        "import train\n"
        "from slotscops.core import console\n"
        "from slotscops.train.loop import Trainer\n"
        "plain = Trainer._loss\n"
        "def sabotaged(self, batch):\n"
        "    rank, step = self.accelerator.process_index, self.step + 1\n"
        f"    {body}\n"
        "    return plain(self, batch)\n"
        "Trainer._loss = sabotaged\n"
        "if __name__ == '__main__':\n"
        "    console.run_command(train.main)\n"
    )
    return script


def wait_for_step(run_dir: Path, step: int, running: Running) -> None:
    """Waits until the run has logged that step. Fails if the run ends before."""
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        if last_step(run_dir) >= step:
            return
        assert running.process.poll() is None, running.said(running.err)
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def last_step(run_dir: Path) -> int:
    """The last step logged; 0 before the first."""
    rows = metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def process_ids(marker: str, variable: str = "") -> dict[int, dict[str, str]]:
    """Environment of each process that runs with `marker` in its command line and `variable` in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            command, variables = forks.description(folder) or _description(folder)
            if marker in command and (not variable or variables.get(variable.split("=")[0]) == variable.split("=")[1]):
                found[int(folder.name)] = variables
    return found


def _description(folder: Path) -> tuple[str, dict[str, str]]:
    """Command line and environment of a process, given its folder in /proc."""
    words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    command = (folder / "cmdline").read_bytes().decode(errors="replace")
    return command, dict(word.split("=", 1) for word in words if "=" in word)


def rank_id(run_dir: Path, rank: int) -> int:
    """Process id of one rank of a run."""
    processes = process_ids(f"run_dir={run_dir}").items()
    return min(number for number, variables in processes if variables.get("RANK") == str(rank))


def orphans(run_dir: Path) -> list[int]:
    """Processes of a run that are still there a few seconds after its end."""
    for _ in range(50):
        left = list(process_ids(f"run_dir={run_dir}"))
        if not left:
            return []
        time.sleep(0.1)
    return left


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *map(str, arguments)], **environment)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def assert_same_tensors(first: Path, second: Path, of: tuple[str, ...] = ("model", "optimizer", "rng")) -> None:
    for name in of:
        mine, other = load_file(first / f"{name}.safetensors"), load_file(second / f"{name}.safetensors")
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, other[key]), f"{name}: {key}"
