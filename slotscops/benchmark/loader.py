"""Compares our loader, from shards and cache to a batch, with other loaders and with its own parts, on one core."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import simplejpeg
import torch

from slotscops.benchmark.contestants import BATCH_SIZE, make_contestants
from slotscops.benchmark.measure import take_turns
from slotscops.benchmark.start import measure_start
from slotscops.core import console
from slotscops.core.machine import keep_freed_memory
from slotscops.features.cache import FeatureCache
from slotscops.features.rows import FeatureShard
from slotscops.loader.plan import permutation
from slotscops.loader.split import Split
from slotscops.shard.index import ShardDataset

_NAMES = {
    "webdataset, its own decoder": "webdataset",
    "webdataset, simplejpeg": "webdataset_simplejpeg",
    "mosaicml-streaming": "streaming",
    "litdata": "litdata",
    "JPEG decoding alone": "decode",
}
_SPARSE = "features alone, sparse as for a GPU"  # of an untrained teacher they are dense
_STARTS = (1_000, 1_000_000)


def compare(dataset: ShardDataset, cache: FeatureCache, rounds: int, folder: Path) -> dict[str, Any]:
    """Images a second of each contestant. All run on one thread of this process and read each sample once a round.

    The process keeps freed memory for all of them, as a loader worker does.
    """
    keep_freed_memory()
    split = Split(dataset, "train", cache, with_labels=False)
    jpegs = [bytes(split.read_member(sample, "jpg")) for sample in range(len(split))]
    shards = [cache.open_shard(entry) for entry in dataset.split("train")]
    contestants: dict[str, Callable[[], Any]] = {
        "slotscops": lambda: _read_shuffled(split),
        **make_contestants(split, folder),
        "JPEG decoding alone": lambda: [simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs],
        "features alone": lambda: _read_features_shuffled(shards),
    }
    if {shard.encoding for shard in shards} == {"sparse"}:
        contestants[_SPARSE] = lambda: _read_sparse_features_shuffled(shards)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = take_turns(contestants, rounds, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    rate = {name: len(split) / result.median for name, result in times.items()}
    rows = [(name, f"{rate[name]:,.0f}", times[name].spread) for name in contestants]
    console.show_table(f"loader, one core, {len(split)} samples a round", ("", "images/s", "ms a round"), rows)
    ratios = {f"loader_over_{_NAMES[name]}": rate["slotscops"] / rate[name] for name in contestants if name in _NAMES}
    weights = "untrained" if cache.is_random else "trained"
    setting = f"{dataset.size} px, {cache.manifest['layer']} of a teacher that is {weights}, {len(split)} samples"
    return {
        "setting": setting,
        "loader_images_per_second": rate["slotscops"],
        "features_per_second": rate["features alone"],
        **({"sparse_features_per_second": rate[_SPARSE]} if _SPARSE in rate else {}),
        **ratios,
        **_time_starts(split, folder),
    }


def _read_shuffled(split: Split) -> None:
    order = permutation(len(split), seed=0, epoch=0)
    for start in range(0, len(split), BATCH_SIZE):
        split.read(order[start : start + BATCH_SIZE])


def _read_features_shuffled(shards: list[FeatureShard]) -> None:
    for shard in shards:
        order = permutation(len(shard), seed=0, epoch=0).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            shard.read_rows(order[start : start + BATCH_SIZE])


def _read_sparse_features_shuffled(shards: list[FeatureShard]) -> None:
    for shard in shards:
        for row in permutation(len(shard), seed=0, epoch=0).tolist():
            shard.read_sparse_row(row)


def _time_starts(split: Split, folder: Path) -> dict[str, float]:
    starts = {count: measure_start(split, count, folder) for count in _STARTS}
    rows = [
        (f"{count:,}", f"{start['cold_s']:.2f}", f"{start['warm_s']:.2f}", f"{start['megabytes']:.0f}")
        for count, start in starts.items()
    ]
    console.show_table("ready to serve", ("records", "cold s", "warm s", "MB"), rows)
    million = starts[_STARTS[-1]]
    return {
        "start_of_a_million_cold_s": million["cold_s"],
        "start_of_a_million_warm_s": million["warm_s"],
        "start_of_a_million_megabytes": million["megabytes"],
    }
