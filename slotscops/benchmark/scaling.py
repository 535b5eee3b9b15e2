"""Measures images a second with 1, 2, ... processes, and what it costs to sum gradients in a fixed order.

Either the global batch is fixed or the batch of each process. Each measurement is a real run of `slotscops.train` under
torchrun, whose `metrics.jsonl` is read.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from slotscops.core import console
from slotscops.core.errors import RunError

_STEPS = 8
_WARMUP_STEPS = 3
_FIXED, _FIXED_EACH = "global batch fixed", "batch of each process fixed"
_DETERMINISTIC = "global batch fixed, deterministic reduction"
_KINDS = (_FIXED, _FIXED_EACH, _DETERMINISTIC)


def compare(settings: list[str], batch_size: int, num_processes: list[int], folder: Path) -> dict[str, Any]:
    """Images a second for each number of processes, the efficiency against one, and the cost of determinism."""
    rates: dict[str, dict[int, float]] = {kind: {} for kind in _KINDS}
    # The smallest number of microbatches that all these numbers of processes divide. Only the order of summing differs.
    fixed_order = ["train.reduction=deterministic", f"train.microbatches={math.lcm(*num_processes)}"]
    for count in num_processes:
        for kind in _KINDS:
            batch = batch_size * count if kind == _FIXED_EACH else batch_size
            more = fixed_order if kind == _DETERMINISTIC else []
            run_dir = folder / f"{kind.replace(' ', '-')}-{count}"
            rates[kind][count] = _run([*settings, *more], batch, count, run_dir)
    rows = []
    for kind, by_count in rates.items():
        for count, rate in by_count.items():
            rows.append((kind, count, f"{rate:.1f}", f"{100 * rate / (count * by_count[num_processes[0]]):.0f} %"))
    console.show_table("scaling", ("", "processes", "images/s", "of ideal"), rows)
    slowest = max(rates[_FIXED][count] / rates[_DETERMINISTIC][count] for count in num_processes)
    return {
        "scaling": {kind: {str(count): rate for count, rate in rate_of.items()} for kind, rate_of in rates.items()},
        "deterministic_over_ddp": slowest,
    }


def _run(settings: list[str], batch_size: int, num_processes: int, run_dir: Path) -> float:
    """Median images a second over the steps after the warm-up."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    run = [f"run_dir={run_dir}", f"train.batch_size={batch_size}", f"train.total_steps={_STEPS}"]
    quiet = ["train.log_every_steps=1", "train.eval_every_steps=0", "train.save_every_steps=1000"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*command, "-m", "slotscops.train", *settings, *run, *quiet],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if line.startswith("slotscops: ")), lines[-1] if lines else "no message")
        raise RunError(f"a run of {num_processes} processes ended with code {done.returncode}: {reason}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(float(row["images_per_second"]) for row in rows[_WARMUP_STEPS:])
