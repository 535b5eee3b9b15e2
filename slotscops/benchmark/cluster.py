"""A synthetic data set as large as that of a cluster, on the disk of one machine.

Every shard is a link to one small shard, and so is its index, but each shard has its own row in `dataset.json` and in
the manifest of the features. A feature file says which shard it belongs to, so those that are read are files of their
own. The files are therefore as many as those of the real thing, while their content takes little room.

Shapes: N samples of a shard, C channels on an h x w grid.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from slotscops.core.files import sha256_of_bytes
from slotscops.core.records import MEMBERS, Record, to_members
from slotscops.features.manifest import IDENTITY, cache_name, file_label, write_manifest
from slotscops.features.rows import encode
from slotscops.shard.index import ShardDataset, ShardEntry, ShardIndex, index_path, write_dataset

SIZE = 32  # pixels
_SHAPE = (8, 2, 2)  # of a teacher's map
_CLASS = "thing"


def write_cluster(out: Path, num_shards: int, samples_per_shard: int) -> ShardDataset:
    """Writes the shards, their index and a feature cache whose files are links without the right label."""
    (out / "index").mkdir(parents=True)
    content, index = _one_shard(samples_per_shard)
    tar, one_index = out / "one.tar", out / "index" / "one.safetensors"
    tar.write_bytes(content)
    index.write(one_index)
    hashes = sha256_of_bytes(content), sha256_of_bytes(one_index.read_bytes())
    entries = []
    for number in range(num_shards):
        entry = ShardEntry(f"train-{number:06d}", samples_per_shard, len(content), *hashes)
        (out / f"{entry.name}.tar").symlink_to(tar.name)
        index_path(out, entry.name).symlink_to(one_index.name)
        entries.append(entry)
    dataset = ShardDataset(out, {"size": SIZE}, [_CLASS], {_CLASS: []}, {"train": entries, "val": []})
    write_dataset(dataset)
    _write_features(dataset, samples_per_shard)
    return dataset


def label_features(dataset: ShardDataset, shards: Iterable[int]) -> None:
    """Gives these shards feature files of their own, with the label that the loader looks for."""
    folder = _feature_folder(dataset)
    content, identity = (folder / "one.safetensors").read_bytes(), _identity(dataset)
    for shard in shards:
        name = dataset.split("train")[shard].name
        path = folder / f"{name}.safetensors"
        path.unlink()
        labelled = content.replace(file_label(identity, "train-000000").encode(), file_label(identity, name).encode())
        path.write_bytes(labelled)


def _one_shard(num_samples: int) -> tuple[bytes, ShardIndex]:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    members = to_members(Record("", image, labels, labels, labels > 0, {"class": _CLASS}))
    keys = [f"2010_{number:06d}_0" for number in range(num_samples)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key in keys:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        offsets = np.array([entry.offset_data for entry in tar], np.int64).reshape(num_samples, len(MEMBERS))
    index = ShardIndex.from_keys(
        keys,
        offsets=offsets,
        sizes=np.tile(np.array([len(content) for content in members.values()], np.int64), (num_samples, 1)),
        crc32=np.tile(np.array([zlib.crc32(content) for content in members.values()], np.uint32), (num_samples, 1)),
        class_ids=np.zeros(num_samples, np.int64),
    )
    return buffer.getvalue(), index


def _write_features(dataset: ShardDataset, num_samples: int) -> None:
    folder = _feature_folder(dataset)
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).random((num_samples, *_SHAPE)).astype(np.float16)
    content = encode(rows, file_label(_identity(dataset), "train-000000"))
    (folder / "one.safetensors").write_bytes(content)
    files = {}
    for number, entry in enumerate(dataset.split("train")):
        (folder / f"{entry.name}.safetensors").symlink_to("one.safetensors")
        # The hashes are not looked at in training. Each is another, as those of real files are.
        hashed = sha256_of_bytes(number.to_bytes(8, "little"))
        files[entry.name] = {"sha256": hashed, "bytes": len(content), "encoding": "dense", "negative": False}
    write_manifest(folder / "manifest.json", _identity(dataset), _SHAPE, files)


def _feature_folder(dataset: ShardDataset) -> Path:
    return dataset.folder / "features" / cache_name("relu5_4", SIZE)


def _identity(dataset: ShardDataset) -> dict[str, object]:
    known = {
        "network": "vgg19",
        "layer": "relu5_4",
        "weights": "imagenet",
        "input_size": SIZE,
        "mirrored": False,
        "shard_digest": dataset.digest,
    }
    return dict.fromkeys(IDENTITY, "") | known
