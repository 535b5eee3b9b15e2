"""Other loaders on the same samples: the JPEG of each crop beside its dense feature map as raw float16.

Users of these loaders would cache features in this way. All loaders shuffle, decode and stack batches on the calling
thread.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from torch import Tensor

from slotscops.loader.split import Split

BATCH_SIZE = 32
_CHUNK_BYTES = 64_000_000


def make_contestants(split: Split, folder: Path) -> dict[str, Callable[[], None]]:
    """Each reads every sample of the split once. Those that are not installed are left out."""
    tar = _write_tar(split, folder / "plain-000000.tar")
    contestants: dict[str, Callable[[], None]] = {
        "webdataset, its own decoder": lambda: _exhaust(_read_tar(tar, split, decoder="torchrgb8")),
        "webdataset, simplejpeg": lambda: _exhaust(_read_tar(tar, split, decoder=None)),
    }
    if importlib.util.find_spec("streaming"):
        mds = _write_mds(split, folder / "mds")
        contestants["mosaicml-streaming"] = lambda: _exhaust(_read_mds(mds, split))
    if importlib.util.find_spec("litdata"):
        chunks = _write_chunks(split, folder / "litdata")
        contestants["litdata"] = lambda: _exhaust(_read_chunks(chunks, split))
    return contestants


def _samples(split: Split) -> Iterator[tuple[str, bytes, bytes]]:
    """Key, JPEG and dense features."""
    for sample in range(len(split)):
        features = split.read(np.array([sample])).features
        assert features is not None
        yield split.key(sample), bytes(split.read_member(sample, "jpg")), features.numpy().tobytes()


def _write_tar(split: Split, path: Path) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for key, jpeg, features in _samples(split):
            tar.write({"__key__": key, "jpg": jpeg, "features": features})
    return path


def _read_tar(tar: Path, split: Split, decoder: str | None) -> Iterator[Any]:
    data = webdataset.WebDataset(str(tar), shardshuffle=False).shuffle(1000)
    if decoder is None:
        yield from _stack((sample["jpg"], sample["features"]) for sample in data.map(_decode_with(split)))
    else:
        shape = _shape(split)
        decoded = data.decode(decoder).map(lambda sample: (sample["jpg"], _map(sample["features"], shape)))
        yield from decoded.batched(BATCH_SIZE)


def _write_mds(split: Split, folder: Path) -> Path:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "features": "bytes"}) as writer:
        for _, jpeg, features in _samples(split):
            writer.write({"jpg": jpeg, "features": features})
    return folder


def _read_mds(folder: Path, split: Split) -> Iterator[Any]:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_SIZE)
    decode = _decode_with(split)
    yield from _stack((sample["jpg"], sample["features"]) for sample in map(decode, data))


def _write_chunks(split: Split, folder: Path) -> Path:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=_CHUNK_BYTES)
    for number, (_, jpeg, features) in enumerate(_samples(split)):
        writer[number] = {"jpg": jpeg, "features": features}
    writer.done()
    writer.merge()
    return folder


def _read_chunks(folder: Path, split: Split) -> Iterator[Any]:
    from litdata import StreamingDataset

    data = StreamingDataset(str(folder), shuffle=True)
    decode = _decode_with(split)
    yield from _stack((sample["jpg"], sample["features"]) for sample in map(decode, data))


def _decode_with(split: Split) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    shape = _shape(split)

    def decode(sample: dict[str, Any]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(sample["jpg"])).permute(2, 0, 1)
        return {"jpg": pixels, "features": _map(sample["features"], shape)}

    return decode


def _map(content: bytes, shape: tuple[int, int, int]) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape)


def _shape(split: Split) -> tuple[int, int, int]:
    assert split.cache is not None
    return split.cache.shape


def _stack(samples: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    batch: list[tuple[Tensor, Tensor]] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == BATCH_SIZE:
            yield torch.stack([image for image, _ in batch]), torch.stack([features for _, features in batch])
            batch = []
    if batch:
        yield torch.stack([image for image, _ in batch]), torch.stack([features for _, features in batch])


def _exhaust(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass
