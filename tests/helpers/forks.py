"""Runs commands of the project in processes forked from one that has already imported torch and the package.

A new interpreter imports torch, torchvision, scikit-learn and Accelerate for 3 to 5 seconds, which is most of the time
of a small command. A fork is still a process of its own: it has its own id, session, standard streams, arguments,
environment and exit status. The launchers of Accelerate and torch run in forks too, and so does each rank that they
start.

As a script, this file is the process that forks. It reads one request per command from a socket, with the two streams
of the command, and answers with the id of the process. Whoever asks becomes the parent of that process.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never

# What the commands import. Their `__main__` modules are left out, because runpy runs those anew.
_PRELOADED = (
    "slotscops.train.fit", "slotscops.evaluate.scoreboard", "slotscops.features.writer", "slotscops.shard.writer",
    "slotscops.segment.segmenter", "torch.utils.tensorboard", "torch._dynamo", "torchvision.models.feature_extraction",
    "timm", "sklearn.cluster", "sklearn.metrics", "scipy.optimize", "accelerate.commands.launch",
    "torch.distributed.run", "torch.distributed.elastic.agent.server.local_elastic_agent",
)  # fmt: skip
RANKS = "forked-ranks"
_LAUNCHERS = ("accelerate", "torchrun")
_OTHER_NETWORK = ["ip", "netns", "exec"]
# Variables that some libraries read as they are imported. A command with others starts a new interpreter.
_READ_EARLY = (
    "PYTHON", "HOME", "TMP", "XDG_", "LD_", "LC_", "LANG", "TZ", "TERM", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "OMP_",
    "MKL_", "CUDA_", "TORCH_LOGS", "HF_", "HUGGINGFACE_", "FSSPEC_",
)  # fmt: skip
# pyarrow, which pandas imports for scikit-learn, would start a thread.
_WITHOUT_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER, _CLONE_NEWNET = 15, 36, 0x40000000
_HELPER = "forks for it"  # name of the processes that fork for a command
_MOST_BYTES = 1 << 20  # of a request

_is_linux = Path("/proc/self/task").is_dir()
_forker: socket.socket | None = None
_labels = Path()  # a folder with a file for each forked process, and what libraries make in TMPDIR as they are imported


class Forked(subprocess.Popen[bytes]):
    """A process that was forked for us, as if we had started it."""

    def __init__(self, command: list[str], pid: int) -> None:
        self.args, self.pid, self.returncode = command, pid, None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs, self._waitpid_lock = True, 0.25, threading.Lock()


def ranks(count: int) -> list[str]:
    """Launcher of that many processes on this machine that does not watch them.

    It sets the variables that torch's launcher sets. Tests of failing ranks use the real launcher.
    """
    return [RANKS, str(count)]


def can_fork(command: list[str], environment: dict[str, str], usual: dict[str, str]) -> bool:
    """Whether the command is Python or a launcher with a script or a module of the project, and can be a fork.

    The launcher may run in a network namespace.

    Args:
        usual: the environment of a command for which a test changed nothing.
    """
    command = command[4:] if command[:3] == _OTHER_NETWORK else command
    is_python = command[0] in (sys.executable, "python")
    if not _is_linux or not (_is_of_project(command[1:]) if is_python else command[0] in (RANKS, *_LAUNCHERS)):
        return False
    return _read_early(environment) == _read_early(usual)


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_EARLY)}


def _is_of_project(arguments: list[str]) -> bool:
    """Whether Python with these arguments runs a script or a module of the project."""
    first, second, *_ = *arguments, "", ""
    return first.endswith(".py") or (first == "-m" and second.startswith("slotscops"))


def start(
    command: list[str], environment: dict[str, str], usual: dict[str, str], folder: Path, out: int, err: int
) -> Forked:
    """Starts the command in `folder`, with descriptors of its two streams."""
    global _forker, _labels
    if _forker is None:
        _labels = Path(tempfile.mkdtemp(prefix="slotscops-forks-"))
        _forker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(_labels)], cwd=folder,
                env=usual | _WITHOUT_THREADS | {"TMPDIR": str(_labels)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        atexit.register(_end, process)
    return _ask(_forker, command, environment, {1: out, 2: err}, new_session=True)


def description(process: Path) -> tuple[str, dict[str, str]] | None:
    """Command line and environment of a forked process or one of its own forks, given its folder in /proc.

    /proc itself has those of the process that forked it.
    """
    while Path(__file__).name.encode() in (process / "cmdline").read_bytes():  # a fork, and not dead
        name = (process / "comm").read_text(errors="replace").strip()
        if name == _HELPER:
            return None
        for label in (_labels / name, _labels / process.name):  # torch changes the names of some processes
            if label.is_file():
                command, environment = json.loads(label.read_text())
                return " ".join(command), environment
        parent = (process / "stat").read_text(errors="replace").rpartition(") ")[2].split()[1]
        process = process.with_name(parent)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the forking process, which has nothing to save."""
    with process:
        process.kill()
    assert _forker is not None
    _forker.close()
    shutil.rmtree(_labels)


def _ask(
    forker: socket.socket, command: list[str], environment: dict[str, str], files: dict[int, int], new_session: bool
) -> Forked:
    """Asks for a process and becomes its parent, because its own parent ends at once.

    Args:
        files: our descriptor of each open file that the process gets, by its number there.
    """
    request = json.dumps([command, environment, new_session, list(files)]).encode()
    assert len(request) < _MOST_BYTES
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        socket.send_fds(forker, [request], list(files.values()))
        answer = forker.recv(100)
        if not answer:
            raise RuntimeError("the process that forks has ended")
        return Forked(command, int(answer))
    finally:
        _control(_PR_SET_CHILD_SUBREAPER, 0)


def _control(option: int, value: Any) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


# ---- in the process that forks, and in its forks -------------------------------------------------------------------


def _serve(channel: socket.socket) -> Never:
    """Forks for each request."""
    while True:
        message, streams, *_ = socket.recv_fds(channel, _MOST_BYTES, 8)
        if not message:
            os._exit(0)
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:
            number = os.fork()
            if number:
                os.write(write_end, str(number).encode())
                os._exit(0)
            channel.close()
            os.close(read_end)
            os.close(write_end)
            _run_and_exit(partial(_become, *json.loads(message), streams))
        os.close(write_end)
        os.waitpid(between, 0)
        channel.send(os.read(read_end, 100))
        for descriptor in (*streams, read_end):
            os.close(descriptor)


def _run_and_exit(run: Callable[[], None]) -> Never:
    """Runs it and ends as the interpreter does, but does not take all imported modules apart: this takes half a second.

    Above all, it would copy the memory that holds them.
    """
    code = 0
    try:
        run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _become(
    command: list[str], environment: dict[str, str], new_session: bool, numbers: list[int], descriptors: list[int]
) -> None:
    """Becomes the command, as the system would run it.

    Args:
        numbers: those that the descriptors get.
    """
    if new_session:
        os.setsid()
    _give_numbers(descriptors, numbers)
    os.environ.clear()
    os.environ.update(environment)
    if command[:3] == _OTHER_NETWORK:
        _enter_network(command[3])
        command = command[4:]
    _label(command)
    if command[0] == RANKS:
        _become_rank(int(command[1]))
        _label(command)
        command = command[1:]
    elif command[1] == "-c":  # the server of processes that `_run` has asked for
        exec(command[2], {})
        return
    forker = _start_helper()
    if command[0] in _LAUNCHERS:
        _launch(command, forker)
    else:
        _run([word for word in command[1:] if word != "-u"], forker)


def _give_numbers(descriptors: list[int], numbers: list[int]) -> None:
    above = max(*numbers, *descriptors) + 1
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _start_helper() -> socket.socket:
    """How to ask a process that forks for this one, which will have threads and then cannot fork safely."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _control(_PR_SET_NAME, _HELPER.encode())
        _serve(theirs)
    theirs.close()
    return ours


def _run(arguments: list[str], forker: socket.socket) -> None:
    """Does what the interpreter does with these arguments."""

    def fork_server(path: str, args: list[str], descriptors: list[int]) -> int:
        if "forkserver" not in args[-1]:
            return start_anew(path, args, descriptors)
        same_numbers = {number: number for number in descriptors}
        server = _ask(forker, [sys.executable, *args[-2:]], dict(os.environ), same_numbers, new_session=False)
        server.returncode = 0  # nobody waits for it
        return server.pid

    start_anew, util.spawnv_passfds = util.spawnv_passfds, fork_server
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent.absolute())
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _label(command: list[str]) -> None:
    """Says for `description` what this process is. The process's name leads to it, and forks inherit that name."""
    name = uuid.uuid4().hex[:15]  # the longest name there is
    for label in (name, str(os.getpid())):
        partial = _labels / f"{label}.partial"
        partial.write_text(json.dumps([command, dict(os.environ)]))
        partial.rename(_labels / label)
    _control(_PR_SET_NAME, name.encode())


def _enter_network(name: str) -> None:
    """Does what `ip netns exec NAME` does."""
    with Path("/run/netns", name).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


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


def _launch(command: list[str], forker: socket.socket) -> None:
    """Runs the real launcher, but its ranks are forks as well. They are its children, and it watches them as always."""
    from accelerate.commands import launch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def fork_rank(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Forked:
        streams = {1: self._stdout.fileno() if self._stdout else 1, 2: self._stderr.fileno() if self._stderr else 2}
        return _ask(forker, list(args), dict(env), streams, new_session=True)

    def fork_only_process(args: list[str], env: dict[str, str]) -> Forked:
        return _ask(forker, list(args), dict(env), {1: 1, 2: 2}, new_session=False)

    SubprocessHandler._popen = fork_rank  # type: ignore[method-assign]
    launch.subprocess = SimpleNamespace(Popen=fork_only_process, CalledProcessError=subprocess.CalledProcessError)
    if command[0] == "accelerate":
        assert command[1] == "launch"  # the same as the program `accelerate-launch`, which imports no other command
        sys.argv = command[1:]
        launch.main()
    else:
        sys.argv = command
        run.main()


def _register_unless_it_removes(
    register: Callable[..., Any], function: Callable[..., Any], *arguments: Any, **named: Any
) -> Any:
    """What wandb makes in TMPDIR as it is imported is for all forks, and the first one that ends must not remove it."""
    removes = isinstance(getattr(function, "__self__", None), tempfile.TemporaryDirectory)
    return function if removes else register(function, *arguments, **named)


def _main() -> None:
    global _labels
    register = atexit.register
    atexit.register = partial(_register_unless_it_removes, register)  # type: ignore[assignment]
    for module in _PRELOADED:
        with suppress(ModuleNotFoundError):  # an optional package
            importlib.import_module(module)
    atexit.register = register
    for made in weakref.finalize._registry:  # type: ignore[attr-defined]
        made.atexit = False
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a process with several threads cannot be forked safely")
    _labels = Path(sys.argv[2])
    tempfile.tempdir = None  # each fork has a TMPDIR of its own
    gc.collect()
    gc.freeze()  # so that no fork looks through, and thereby copies, what was imported
    with suppress(KeyboardInterrupt):
        _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    _main()
