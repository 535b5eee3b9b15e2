"""The feature cache: teacher features of every crop, computed once, row-aligned with the shards.

    python -m slotscops.features --shards SHARDS [--layer relu5_4] [--size 128] [--teacher-weights FILE]

`SHARDS/features/{name}/{split}-{000000}.safetensors` holds the features, `manifest.json` what they were made of.
Works alone or under a launcher; a start over finished files does nothing twice.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slotscops import console
from slotscops.config import differences
from slotscops.errors import RunError, UserError
from slotscops.feature_manifest import REMOVE_AND_REBUILD, file_label, read_manifest, write_manifest
from slotscops.feature_shard import FeatureShard, encode
from slotscops.files import sha256_of_file, sha256_of_json, write_bytes, write_json
from slotscops.images import IMAGENET_MEAN, IMAGENET_STD
from slotscops.index import Dataset, ShardEntry, open_dataset
from slotscops.shard_reader import ShardReader
from slotscops.teacher import Teacher
from slotscops.work import units_in_turn

_BATCH_SIZE = 16  # fixed: another batch may change the last bits of a convolution, and the cache is to be reproducible


def cache_name(layer: str, size: int) -> str:
    """Name of the cache's folder below SHARDS/features."""
    return f"vgg19-{layer}-{size}"


# ---- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h, w of one row."""
        channels, height, width = self.manifest["shape"]
        return channels, height, width

    @property
    def digest(self) -> str:
        """One hash over the manifest, and so over every file's own."""
        return sha256_of_json(self.manifest)

    @property
    def is_random(self) -> bool:
        """True where the teacher was never trained: good for tests only."""
        return str(self.manifest["weights"]).startswith("random:")

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.safetensors"

    def open_shard(self, entry: ShardEntry) -> FeatureShard:
        shard = FeatureShard(self.path(entry.name))
        if shard.label != file_label(self.manifest, entry.name):
            raise UserError(f"{shard.path}: belongs to another shard or cache (files swapped?); {REMOVE_AND_REBUILD}")
        if len(shard) != entry.num_samples or shard.shape != self.shape:
            raise UserError(
                f"{shard.path}: holds {len(shard)} maps of {shard.shape}, needed {entry.num_samples} of {self.shape}; "
                f"rebuild with: {rebuild_command(self.folder.parent.parent, self.manifest)}"
            )
        return shard


def open_cache(dataset: Dataset, layer: str, size: int, weights_sha256: str | None = None) -> FeatureCache:
    """Opens the cache of `layer` at `size` pixels, and checks that it belongs to these shards and is complete.

    Raises:
        UserError: not there, unfinished, or a field that differs, with the command that rebuilds it.
    """
    folder = dataset.folder / "features" / cache_name(layer, size)
    wanted = {"layer": layer, "input_size": size}
    command = rebuild_command(dataset.folder, wanted)
    if not (folder / "manifest.json").is_file():
        others = sorted(path.parent.name for path in dataset.folder.glob("features/*/manifest.json"))
        state = f"only {', '.join(others)}" if others else "no finished feature cache"
        raise UserError(
            f"{dataset.folder}: needed features {cache_name(layer, size)}, came {state}; build with: {command}"
        )
    cache = FeatureCache(folder, read_manifest(folder / "manifest.json"))
    wanted |= {"shard_digest": dataset.digest}
    if weights_sha256 is not None:
        wanted |= {"weights_sha256": weights_sha256}
    for name, value in wanted.items():
        if cache.manifest[name] != value:
            raise UserError(
                f"{folder}: {name} is {cache.manifest[name]}, needed {value}; "
                f"remove the folder and rebuild with: {command}"
            )
    _check_files(cache, dataset)
    return cache


def open_features(shards: str | Path, shard: str, name: str | None = None) -> FeatureShard:
    """One shard's features by name, such as `open_features("shards/horse", "train-000000")[i]`, (C, h, w) float16.

    Args:
        name: folder below SHARDS/features; may be left out where there is only one.
    """
    dataset = open_dataset(Path(shards))
    names = sorted(path.parent.name for path in dataset.folder.glob("features/*/manifest.json"))
    if name is None and len(names) != 1:
        raise UserError(f"{shards}: has feature caches {names or 'none'}; name the one you want")
    folder = dataset.folder / "features" / (name or names[0])
    manifest = read_manifest(folder / "manifest.json")
    cache = open_cache(dataset, manifest["layer"], manifest["input_size"])
    for entries in dataset.splits.values():
        for entry in entries:
            if entry.name == shard:
                return cache.open_shard(entry)
    raise UserError(f"{shards}: has no shard '{shard}'")


def rebuild_command(shards: Path, manifest: dict[str, Any]) -> str:
    return f"python -m slotscops.features --shards {shards} --layer {manifest['layer']} --size {manifest['input_size']}"


def _check_files(cache: FeatureCache, dataset: Dataset) -> None:
    for entries in dataset.splits.values():
        for entry in entries:
            path, row = cache.path(entry.name), cache.manifest["files"].get(entry.name)
            came = path.stat().st_size if path.is_file() else "no file"
            if row is None or came != row["bytes"]:
                needed = "a row in the manifest" if row is None else f"{row['bytes']} bytes"
                raise UserError(f"{path}: came {came}, needed {needed}; {REMOVE_AND_REBUILD}")


def verify(cache: FeatureCache) -> list[str]:
    """Names of the shards whose feature file differs from the sha256 in the manifest."""
    return [
        shard
        for shard, row in sorted(cache.manifest["files"].items())
        if not cache.path(shard).is_file() or sha256_of_file(cache.path(shard)) != row["sha256"]
    ]


# ---- building ----------------------------------------------------------------------------------------------------


def build_cache(dataset: Dataset, teacher: Teacher, size: int) -> FeatureCache:
    """Computes whatever is missing of the cache and returns it finished.

    Raises:
        UserError: the folder holds a cache that was made otherwise.
    """
    identity = _identity(dataset, teacher, size)
    folder = dataset.folder / "features" / cache_name(teacher.layer, size)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, identity)
    entries = [entry for split in dataset.splits.values() for entry in split]
    if not (folder / "manifest.json").is_file():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = teacher.to(device)
        for number in units_in_turn(len(entries)):
            path = folder / f"{entries[number].name}.safetensors"
            if not path.is_file():
                label = file_label(identity, entries[number].name)
                write_bytes(path, _encode_shard(dataset, entries[number], teacher, size, device, label))
        _list_files(folder, identity, entries, teacher.output_shape(size))
    return open_cache(dataset, teacher.layer, size)


def _identity(dataset: Dataset, teacher: Teacher, size: int) -> dict[str, Any]:
    return {
        "network": "vgg19",
        "layer": teacher.layer,
        "weights": teacher.weights_name,
        "weights_sha256": teacher.fingerprint,
        "input_size": size,
        "resize": "none" if size == dataset.size else "bicubic, antialiased",
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "channels": "RGB"},
        "dtype": "float16",
        "mirrored": False,
        "shard_digest": dataset.digest,
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Writes down what is being built here, or refuses where it is something else."""
    path = folder / "identity.json"
    if not path.is_file():
        write_json(path, identity)
        return
    try:
        present = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: is no JSON; {REMOVE_AND_REBUILD}") from None
    differing = differences(present, identity)
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder}: was built with another {name} ({present.get(name)}, now {identity.get(name)}); "
            "remove the folder to build it anew"
        )


def _encode_shard(
    dataset: Dataset, entry: ShardEntry, teacher: Teacher, size: int, device: torch.device, label: str
) -> bytes:
    reader = ShardReader(dataset, entry)
    starts = range(0, entry.num_samples, _BATCH_SIZE)
    maps = []
    for start in console.track(starts, len(starts), f"features of {entry.name}, batches of {_BATCH_SIZE}"):
        images = reader.read_images(range(start, min(start + _BATCH_SIZE, entry.num_samples)))
        maps.append(compute_features(teacher, images.to(device), size).half().cpu())
    features = torch.cat(maps) if maps else torch.empty(0, *teacher.output_shape(size), dtype=torch.float16)
    if not torch.isfinite(features).all():
        raise RunError(f"{entry.name}: features beyond 65504 do not fit float16; check the teacher's weights")
    return encode(features.numpy(), label)


@torch.inference_mode()
def compute_features(teacher: Teacher, images: Tensor, size: int) -> Tensor:
    """(B, C, h, w) float32 features of (B, 3, S, S) uint8 crops, resized to `size` first where S differs."""
    if images.shape[-1] != size:
        images = functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    features: Tensor = teacher(images)
    return features


def _list_files(folder: Path, identity: dict[str, Any], entries: list[ShardEntry], shape: tuple[int, ...]) -> None:
    files = {}
    for entry in entries:
        path = folder / f"{entry.name}.safetensors"
        files[entry.name] = {
            "sha256": sha256_of_file(path),
            "bytes": path.stat().st_size,
            "encoding": FeatureShard(path).encoding,
        }
    write_manifest(folder / "manifest.json", identity, shape, files)


# ---- command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slotscops.features", description="Build or verify a feature cache."
    )
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--layer", default="relu5_4", help="VGG19 layer; join several with + (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of the crops for VGG, pixels (default: that of the shards)")
    parser.add_argument(
        "--teacher-weights", default="imagenet", help="imagenet, a .safetensors or .pth file, random:SEED"
    )
    parser.add_argument("--verify", action="store_true", help="check every hash instead of building")
    options = parser.parse_args(arguments)
    dataset = open_dataset(options.shards)
    size = options.size or dataset.size
    if options.verify:
        damaged = verify(open_cache(dataset, options.layer, size))
        if damaged:
            raise RunError(f"damaged feature files: {', '.join(damaged)}; {REMOVE_AND_REBUILD}")
        console.say("every feature file is what the manifest says")
        return 0
    report(build_cache(dataset, Teacher(options.layer, options.teacher_weights), size))
    return 0


def report(cache: FeatureCache) -> None:
    """Says what the cache holds and what it was made with."""
    num_bytes = sum(row["bytes"] for row in cache.manifest["files"].values())
    console.say(
        f"features {cache.folder}: {len(cache.manifest['files'])} shards, {num_bytes / 1e6:.1f} MB, "
        f"VGG19 weights {cache.manifest['weights']} (sha256 {cache.manifest['weights_sha256'][:12]})"
    )
    warn_if_random(cache)


def warn_if_random(cache: FeatureCache) -> None:
    if cache.is_random and console.is_main():
        console.warn(
            f"WARNING: the features in {cache.folder} come from an UNTRAINED VGG19 ({cache.manifest['weights']}). "
            "Scores made with them mean nothing beyond a test."
        )


if __name__ == "__main__":
    console.run_command(main)
