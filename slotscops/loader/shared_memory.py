"""The shared memory through which loader workers hand batches over, and whether there is enough of it."""

import os
import shutil
from pathlib import Path

from slotscops.core.errors import UserError
from slotscops.loader.split import Split

PREFETCHED_BATCHES = 4  # for each worker
_HELD_BATCHES = 2  # by the training process: the one of this step and the one of the next
_FOLDER = Path("/dev/shm")  # where Linux keeps shared memory; containers give it 64 MB unless told otherwise
_PAGE = os.sysconf("SC_PAGE_SIZE")


def check_shared_memory(split: Split, batch_size: int, num_workers: int) -> None:
    """Refuses to train where the batches that wait for training do not fit into the shared memory of this host.

    A worker that finds no room cannot hand its batch over, and the training process would wait for ever.

    Args:
        batch_size: samples in a microbatch of one process.
        num_workers: loader workers of one process.

    Raises:
        UserError: with what is needed by all processes of this host, what is free, and what to set.
    """
    if not num_workers or not _FOLDER.is_dir():
        return
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = needed_bytes(split, batch_size, num_workers) * num_processes
    free = shutil.disk_usage(_FOLDER).free
    if needed <= free:
        return
    of_all = f" in each of {num_processes} processes" if num_processes > 1 else ""
    raise UserError(
        f"{_FOLDER}: has {_megabytes(free)} MB of shared memory free, needed {_megabytes(needed, up=True)} MB for the "
        f"batches of data.num_workers={num_workers}{of_all}; start the container with "
        f"--shm-size={_megabytes(needed, up=True)}m or more, or set data.num_workers=0"
    )


def needed_bytes(split: Split, batch_size: int, num_workers: int) -> int:
    """The most that the batches of one process take in shared memory. Each tensor takes whole pages there."""
    tensors = [-(-num_bytes // _PAGE) * _PAGE for num_bytes in split.batch_bytes(batch_size).values()]
    return sum(tensors) * (PREFETCHED_BATCHES * num_workers + _HELD_BATCHES)


def _megabytes(num_bytes: int, up: bool = False) -> str:
    """In units of 2^20 bytes, as `--shm-size=64m` counts."""
    return f"{-(-num_bytes // 2**20) if up else num_bytes // 2**20}"
