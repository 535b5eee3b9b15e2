"""launch/slurm.sh with scripts in place of Slurm's three programs, a real run, and a real signal."""

import json
import os
import re
import signal
import socket
from pathlib import Path

from commands import ROOT, orphans, started, training, wait_for_step

from slotscops.config import load_config

PROGRAMS = {
    "srun": 'shift; cd "$SLURM_STANDIN"; echo $$ > step; echo $SRUN_CPUS_PER_TASK > cpus; cd - >/dev/null; '
    'export SLURM_NODEID=0; exec "$@"',
    # As with Slurm, every process of the step gets the signal, including the loader workers.
    "scancel": 'step=$(cat "$SLURM_STANDIN/step"); kill -TERM $(pgrep -P "$step") "$step"',
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$SLURM_STANDIN/asked"',
}


def test_a_node_has_a_cpu_for_each_process_and_loader_worker_of_the_gpu_recipe() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", (ROOT / "launch" / "slurm.sh").read_text(), re.MULTILINE))
    workers = load_config(ROOT / "configs" / "best-gpu.yaml").data.num_workers
    assert int(asked["cpus-per-task"]) >= int(asked["gpus-per-node"]) * (1 + workers)


def test_a_preempted_job_saves_and_goes_back_into_the_queue(toy_shards: Path, tmp_path: Path) -> None:
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "run"
    settings = training([], toy_shards, run_dir, "train.total_steps=100000")[1:]
    environment = {
        "SLURM_STANDIN": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "72", "MASTER_PORT": str(port),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with started(["bash", str(ROOT / "launch" / "slurm.sh"), *settings], **environment) as running:
        wait_for_step(run_dir, 3, running)
        os.kill(running.pid, signal.SIGUSR1)
        assert running.wait(timeout=60) == 0, running.said(running.err)
    assert (tmp_path / "cpus").read_text() == "72\n"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    assert (run_dir / "checkpoints" / f"step-{status['step']}").is_dir()
    assert orphans(run_dir) == []
