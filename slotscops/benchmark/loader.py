"""From shards and cache to a collated batch, beside webdataset's own pipeline and JPEG decoding alone, on one core."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset

from slotscops import console
from slotscops.benchmark.measure import take_turns
from slotscops.benchmark.start import measure_start
from slotscops.features import FeatureCache
from slotscops.index import Dataset
from slotscops.loader import Split
from slotscops.plan import permutation

_BATCH_SIZE = 32


def compare(dataset: Dataset, cache: FeatureCache, rounds: int, folder: Path) -> dict[str, Any]:
    """Images a second of each contestant, all in this process on one thread, every sample once a round.

    webdataset reads tars that hold the same JPEGs with the dense feature maps as raw float16, which is how a
    WebDataset user would cache them, shuffled through its buffer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        split = Split(dataset, "train", cache, with_labels=False)
        tar = _write_plain_tar(split, folder / "plain-000000.tar")
        jpegs = [_jpeg(split, sample) for sample in range(len(split))]
        contestants: dict[str, Callable[[], Any]] = {
            "slotscops": lambda: _read_shuffled(split),
            "webdataset, its own decoder": lambda: _exhaust(_webdataset_batches(tar, split, "torchrgb8")),
            "webdataset, simplejpeg": lambda: _exhaust(_webdataset_batches(tar, split, None)),
            "JPEG decoding alone": lambda: [simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs],
        }
        times = take_turns(contestants, rounds, torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    rate = {name: len(split) / result.median for name, result in times.items()}
    rows = [(name, f"{rate[name]:,.0f}", times[name].spread) for name in contestants]
    console.show_table(f"loader, one core, {len(split)} samples a round", ("", "images/s", "ms a round"), rows)
    starts = {count: measure_start(split, count, folder) for count in (1_000, 1_000_000)}
    start_rows = [
        (f"{count:,}", f"{figures['cold_s']:.2f}", f"{figures['warm_s']:.2f}", f"{figures['megabytes']:.0f}")
        for count, figures in starts.items()
    ]
    console.show_table("ready to serve", ("records", "cold s", "warm s", "MB"), start_rows)
    return {
        "start_of_a_million_cold_s": starts[1_000_000]["cold_s"],
        "start_of_a_million_megabytes": starts[1_000_000]["megabytes"],
        "loader_images_per_second": rate["slotscops"],
        "loader_over_webdataset": rate["slotscops"] / rate["webdataset, its own decoder"],
        "loader_over_webdataset_simplejpeg": rate["slotscops"] / rate["webdataset, simplejpeg"],
        "loader_over_decode": rate["slotscops"] / rate["JPEG decoding alone"],
    }


def _read_shuffled(split: Split) -> None:
    order = permutation(len(split), seed=0, epoch=0)
    for start in range(0, len(split), _BATCH_SIZE):
        split.read(order[start : start + _BATCH_SIZE])


def _jpeg(split: Split, sample: int) -> bytes:
    return bytes(split.read_member(sample, "jpg"))


def _write_plain_tar(split: Split, path: Path) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for sample in range(len(split)):
            features = split.read(np.array([sample])).features
            assert features is not None
            tar.write(
                {"__key__": split.key(sample), "jpg": _jpeg(split, sample), "features": features.numpy().tobytes()}
            )
    return path


def _webdataset_batches(tar: Path, split: Split, decoder: str | None) -> Iterator[Any]:
    assert split.cache is not None
    shape = split.cache.shape

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.frombuffer(bytearray(sample["features"]), dtype=torch.float16).view(shape)
        if decoder is not None:
            return sample["jpg"], features
        return torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"])).permute(2, 0, 1), features

    data = webdataset.WebDataset(str(tar), shardshuffle=False).shuffle(1000)
    if decoder is not None:
        data = data.decode(decoder)
    yield from data.map(decode).batched(_BATCH_SIZE)


def _exhaust(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass
