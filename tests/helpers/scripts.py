"""Runs shell scripts of `launch/` whose Python commands are forked, so that none of them imports torch anew."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from commands import ROOT, TIMEOUT_S, run

# Stands in for python and accelerate: hands its words over and waits for the exit status.
_STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >'{folder}/words'
read -r status <'{folder}/status'
exit "$status"
"""


def run_script(
    script: str, *arguments: str | Path, folder: Path, killed: int = -1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `launch/SCRIPT` in this environment; its output ends with what its Python commands said on both streams.

    Args:
        folder: an empty one, for what the commands are handed over with.
        killed: number of the command that the script is told was killed, counted from 0.
    """
    for name in ("words", "status"):
        os.mkfifo(folder / name)
    for name in ("python", "accelerate"):
        (folder / name).write_text(_STUB.format(folder=folder))
        (folder / name).chmod(0o755)
    said: list[str] = []
    server = threading.Thread(target=_serve, args=(folder, said, killed))
    server.start()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *map(str, arguments)],
            env=os.environ | environment | {"PATH": path, "ENVIRONMENT": "current"},
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    finally:
        (folder / "words").write_text("end")
        server.join()
    done.stdout += "".join(said)
    return done


def _serve(folder: Path, said: list[str], killed: int) -> None:
    """Runs each command that is handed over, until the word `end` comes."""
    while (words := (folder / "words").read_text()) != "end":
        program, *arguments = words.split("\0")[:-1]
        if program == "accelerate":
            arguments = arguments[arguments.index("launch/train.py") :]
        done = run([sys.executable, *arguments])
        said.append(done.stdout + done.stderr)
        (folder / "status").write_text(f"{137 if len(said) - 1 == killed else done.returncode}\n")
