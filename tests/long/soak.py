"""Kills a run again and again at random moments. It must end with the same parameters as an undisturbed run.

    python tests/long/soak.py [--kills 100] [--steps 300] [--seed 0] [--processes 1]

pytest runs a short one (test_soak.py); the long one is for releases.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from commands import TWO_PROCESSES, last_step, orphans, process_ids, started, train, training
from safetensors.torch import load_file

from slotscops.shard import __main__ as shard

SLOW = ("train.accumulation_steps=8",)  # so that 100 kills fit between the steps
SETTINGS = ("train.save_every_steps=5", "train.keep_checkpoints=2", "train.timeout_minutes=0.3")


def soak(
    shards: Path, folder: Path, kills: int, steps: int, seed: int, num_processes: int, more: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Number of kills during training, and of all starts. Raises AssertionError if the parameters differ."""
    launcher = [sys.executable] if num_processes == 1 else TWO_PROCESSES
    settings = (*SETTINGS, *more, f"train.total_steps={steps}")
    rng = random.Random(seed)
    done, starts, amid = 0, 0, 0
    run_dir = folder / "killed"
    while done < kills and last_step(run_dir) < steps:
        with started(training(launcher, shards, run_dir, *settings), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1") as running:
            starts += 1
            before = last_step(run_dir)
            # Most kills come during steps and some during a start. Few steps lie between them, so that all fit in.
            target = before + rng.randint(0, steps // kills)
            pause = rng.uniform(0, 0.1)
            while running.process.poll() is None and last_step(run_dir) < target:
                time.sleep(0.005)
            time.sleep(pause)
            if running.process.poll() is None:
                ids = list(process_ids(f"run_dir={run_dir}"))
                os.kill(rng.choice(ids), signal.SIGKILL)
                done += 1
                amid += last_step(run_dir) > before
            running.wait()
        assert orphans(run_dir) == []
    for _ in range(3):  # the launcher of a killed rank may have used up its restarts
        if train(launcher, shards, run_dir, *settings).returncode == 0:
            break
    assert train(launcher, shards, folder / "whole", *settings).returncode == 0
    killed, whole = (
        load_file(path / "checkpoints" / f"step-{steps}" / "model.safetensors") for path in (run_dir, folder / "whole")
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), f"{name} differs"
    assert done >= kills, f"only {done} kills before the end"
    return amid, starts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        toy = ["--toy", "--toy-train", "14", "--toy-val", "6", "--size", "64", "--samples-per-shard", "5"]
        assert shard.main([*toy, "--out", str(shards), "--teacher-weights", "random:0"]) == 0
        counts = (options.kills, options.steps, options.seed, options.processes)
        amid, starts = soak(shards, Path(scratch), *counts, SLOW)
    print(
        f"{options.kills} kills ({amid} amid training) in {starts} starts over {options.steps} steps: same parameters"
    )


if __name__ == "__main__":
    main()
