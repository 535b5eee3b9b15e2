"""What grows with processes, shards and samples, on a simulated cluster: one rank after the other, on this machine.

The data set is synthetic (see `cluster`), everything that reads it is the real code (see `rank`). What processes say to
each other is not part of the times. How many descriptors it takes is measured with a few real processes that join.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from slotscops.benchmark.cluster import label_features, write_cluster
from slotscops.benchmark.rank import READ_BATCHES, num_descriptors, plan_of, settings
from slotscops.core import console
from slotscops.core.errors import RunError
from slotscops.shard.index import ShardDataset
from slotscops.train.processes import check_same_on_all_ranks, open_training_data, start_accelerator
from slotscops.train.stopping import Agreement

_JOINED = (4, 8, 16)  # processes that really join, for the descriptors that each needs
# Each figure, what it says, and the target it is held against.
_FIGURES = {
    "megabytes": ("memory for the data set in each process, at its peak, MB", 200),
    "held_megabytes": ("the same after the first batch, MB", None),
    "sent_to_a_worker_megabytes": ("sent to each loader worker, MB", None),
    "first_batch_s": ("from the start to the first batch, s", 10),
    "program_s": ("of that the program's own start, with one shard, s", None),
    "first_batch_processor_s": ("what the data set adds to the start, in processor time, s", None),
    "step_ms": ("bookkeeping of a step, ms", 1),
    "log_ms": ("a logged step's own work, ms", 50),
    "log_processor_ms": ("the same in processor time, of all threads, ms", None),
    "epoch_end_ms": ("longest planning of a step at an epoch's end, ms", 100),
    "read_ms_a_sample": ("reading a sample, each from another shard, ms", None),
    "descriptors": ("open files", 1024),
    "opened_on_resume": ("opens of each file of a checkpoint on resume, by all processes", 1),
}


def compare(num_shards: int, samples_per_shard: int, num_ranks: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """The figures of the first and the last rank, the worse of the two, and the descriptors of processes that join."""
    start = time.perf_counter()
    dataset = write_cluster(folder / "cluster", num_shards, samples_per_shard)
    ranks = sorted({0, num_ranks - 1})
    label_features(dataset, _shards_read(dataset, ranks, num_ranks, batch_size))
    console.say(f"a cluster of {num_shards:,} shards, made in {time.perf_counter() - start:.0f} s")
    small = write_cluster(folder / "small", 1, samples_per_shard)
    label_features(small, [0])
    measured = [_measure([dataset.folder, small.folder], folder, rank, num_ranks, batch_size) for rank in ranks]
    worst: dict[str, Any] = {name: max(figures[name] for figures in measured) for name in _FIGURES}
    rows = [
        (meaning, *(f"{figures[name]:.4g}" for figures in measured), "" if target is None else f"<= {target}")
        for name, (meaning, target) in _FIGURES.items()
    ]
    title = f"scale: {num_shards:,} shards, {num_shards * samples_per_shard:,} samples, {num_ranks} ranks"
    console.show_table(title, ("", *(f"rank {rank}" for rank in ranks), "target"), rows)
    joined = {count: _run(["slotscops.benchmark.scale", folder, count]) for count in _JOINED}
    console.show_table(
        "descriptors of processes that joined",
        ("processes", "rank 0", "last rank"),
        [(count, *numbers) for count, numbers in joined.items()],
    )
    return {f"scale_{name}": value for name, value in worst.items()} | {
        "scale_descriptors_of_joined": {str(count): numbers for count, numbers in joined.items()},
        "setting": f"{num_shards} shards, {num_shards * samples_per_shard} samples, {num_ranks} ranks, "
        f"batch {batch_size}",
    }


def _shards_read(dataset: ShardDataset, ranks: list[int], num_ranks: int, batch_size: int) -> list[int]:
    """The shards that these ranks read from in their first steps."""
    config = settings(dataset.folder, Path(), batch_size)
    num_samples = dataset.num_samples("train")
    plans = [plan_of(config, num_samples, rank, num_ranks, 0, READ_BATCHES) for rank in ranks]
    samples = np.array([sample for plan in plans for microbatch in plan for sample in microbatch])
    shards: list[int] = np.unique(samples // dataset.split("train")[0].num_samples).tolist()
    return shards


def _measure(shards: list[Path], folder: Path, rank: int, num_ranks: int, batch_size: int) -> dict[str, Any]:
    figures: dict[str, Any] = _run(
        ["slotscops.benchmark.rank", *shards, folder / f"run-{rank}", rank, num_ranks, batch_size]
    )
    return figures


def _run(module: list[Any]) -> Any:
    """What a module of the benchmark prints as JSON in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, module)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},  # more processes than GPUs
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{module[0]} ended with code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def _descriptors_of_joined(count: int, folder: Path) -> dict[int, int]:
    """Descriptors of the first and the last of `count` processes, after the start and a few exchanges of a stop.

    Rank 0 serves the store by which processes find each other, with a socket for each of them. Under torchrun the
    launcher does. The processes are forked, which is quick. This process must run neither threads nor
    kernels of PyTorch before.
    """
    small = folder / f"joined-{count}"
    write_cluster(small, num_shards=1, samples_per_shard=2 * count)
    context = multiprocessing.get_context("fork")
    assert isinstance(context, ForkContext)
    counts = context.SimpleQueue()
    port = _free_port()
    processes = [context.Process(target=_join, args=(rank, count, port, small, counts)) for rank in range(count)]
    for process in processes:
        process.start()
    running = processes
    while running and not any(process.exitcode for process in processes):
        connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    for process in running:  # they wait for one that failed
        process.terminate()
        process.join()
    if any(process.exitcode for process in processes):
        raise RunError(f"{count} processes could not join; see above for the reason")
    return dict(sorted(counts.get() for _ in range(2)))


def _join(rank: int, count: int, port: int, shards: Path, counts: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
    before = num_descriptors()
    config = settings(shards, shards / "run", 2 * count)
    accelerator = start_accelerator(config)
    check_same_on_all_ranks(config, *open_training_data(config))
    agreement = Agreement(timedelta(minutes=1))
    for _ in range(3):
        agreement.exchange(0)
    agreement.finish()
    dist.barrier()  # Accelerate's own names the GPU of this rank, which may not exist
    if rank in (0, count - 1):
        counts.put((rank, num_descriptors() - before))
    dist.barrier()
    accelerator.end_training()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


if __name__ == "__main__":
    print(json.dumps(list(_descriptors_of_joined(int(sys.argv[2]), Path(sys.argv[1])).values())))
