"""Real processes for the tests: started with a bound on their time, ended whatever happens."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 240
# Facts about Accelerate: on CPUs this line, and no other, starts as many processes as it says.
_ACCELERATE = ["accelerate", "launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
_ON_ITS_OWN = ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
TWO_PROCESSES = [*_ACCELERATE, "--multi_gpu", "--num_processes", "2", *_ON_ITS_OWN]
ONE_PROCESS = [*_ACCELERATE, "--num_processes", "1"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project from its root; its whole process group ends with it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def train(launcher: list[str], shards: Path, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Trains the small configuration of the tests."""
    small = [
        f"data.shards={shards}", f"run_dir={run_dir}", "data.size=64", "data.num_workers=0", "encoder.name=features",
        "train.batch_size=8", "train.total_steps=6", "train.log_every_steps=1", "train.eval_every_steps=0",
    ]  # fmt: skip
    return run([*launcher, "launch/train.py", *small, *settings])


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *map(str, arguments)], **environment)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
