"""Measures time and memory until a data set of a given size serves its first batch.

The data set is synthetic: its index lists the requested number of records, and all shards are links to one small real
shard. The feature files are links too, except those that the first batch reads, because each names the shard that it
belongs to. A separate process is measured, so that nothing has been imported or cached for it beforehand.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.features.cache import open_cache
from slotscops.features.manifest import IDENTITY, file_label, write_manifest
from slotscops.features.rows import FeatureShard, encode
from slotscops.loader.plan import permutation
from slotscops.loader.split import Split
from slotscops.shard.index import ShardDataset, ShardEntry, index_path, open_dataset, write_dataset

_BATCH_SIZE = 32


def measure_start(real: Split, num_records: int, folder: Path) -> dict[str, float]:
    """Seconds and MB until the first shuffled batch, without imports. Cold: the index is not in the page cache."""
    shards = folder / f"start-{num_records}"
    _write_synthetic(real, num_records, shards)
    cold = _serve_in_own_process(shards, drop_cache=True)
    warm = _serve_in_own_process(shards, drop_cache=False)
    return {"cold_s": cold["seconds"], "warm_s": warm["seconds"], "megabytes": cold["megabytes"]}


def _write_synthetic(real: Split, num_records: int, out: Path) -> None:
    assert real.cache is not None
    entry = real.dataset.split(real.name)[0]
    (out / "index").mkdir(parents=True)
    features = out / "features" / real.cache.folder.name
    features.mkdir(parents=True)
    entries = []
    for number in range(-(-num_records // entry.num_samples)):
        name = f"train-{number:06d}"
        (out / f"{name}.tar").symlink_to(real.dataset.tar_path(entry).resolve())
        content = index_path(real.dataset.folder, entry.name).read_bytes()
        index_path(out, name).write_bytes(content)  # no link: a real index of as many records has as many bytes to read
        entries.append(ShardEntry(name, entry.num_samples, entry.num_bytes, entry.sha256, entry.index_sha256))
    dataset = ShardDataset(
        out, real.dataset.settings, real.dataset.class_names, real.dataset.part_names, {"train": entries, "val": []}
    )
    write_dataset(dataset)
    files = {shard.name: real.cache.manifest["files"][entry.name] for shard in entries}
    identity = {name: real.cache.manifest[name] for name in IDENTITY} | {"shard_digest": dataset.digest}
    write_manifest(features / "manifest.json", identity, real.cache.shape, files)
    rows = FeatureShard(real.cache.path(entry.name)).read_rows(range(entry.num_samples)).numpy()
    first_batch = permutation(len(entries) * entry.num_samples, 0, 0)[:_BATCH_SIZE] // entry.num_samples
    for number, shard in enumerate(entries):
        path = features / f"{shard.name}.safetensors"
        if number in first_batch:
            path.write_bytes(encode(rows, file_label(identity, shard.name)))
        else:
            path.symlink_to(real.cache.path(entry.name).resolve())


def _serve_in_own_process(shards: Path, drop_cache: bool) -> dict[str, Any]:
    if drop_cache:
        _drop_from_page_cache(shards)
    command = [sys.executable, "-m", "slotscops.benchmark.start", str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _drop_from_page_cache(folder: Path) -> None:
    """Best effort, without root's rights: tells the kernel that these files will not be needed."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve(shards: Path) -> dict[str, float]:
    """Opens a data set, reads one shuffled batch, and returns what that took."""
    before = resident_bytes()
    start = time.perf_counter()
    dataset = open_dataset(shards)
    folder = next((shards / "features").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    split = Split(
        dataset,
        "train",
        open_cache(dataset, manifest["layer"], manifest["input_size"], network=manifest["network"]),
        with_labels=False,
    )
    split.read(np.array(permutation(len(split), 0, 0)[:_BATCH_SIZE]))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": (resident_bytes() - before) / 1e6}


def resident_bytes() -> int:
    """Memory of this process now; its recorded peak would be the one of the process that started it (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(serve(Path(sys.argv[1]))))
