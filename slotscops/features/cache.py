"""The feature cache: teacher features of every crop, computed once, row-aligned with the shards.

    python -m slotscops.features --shards SHARDS [--teacher vgg19] [--layer relu5_4] [--size 128] [--mirrored]

`SHARDS/features/{name}/{split}-{000000}.safetensors` holds the features, and `manifest.json` says how they were made.
Features of the mirrored crops are a separate cache beside it. The command runs as one process or under a launcher. A
new start keeps finished files.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from slotscops.core import console
from slotscops.core.errors import DamageError, UserError
from slotscops.core.files import sha256_of_bytes, sha256_of_file, sha256_of_json, size_of_file
from slotscops.features.compact import PROJECTION, PROJECTION_SHA256, Compact, Projection
from slotscops.features.manifest import (
    REMOVE_AND_REBUILD,
    FileTable,
    file_label,
    name_of,
    read_manifest,
    rebuild_command,
)
from slotscops.features.rows import FeatureShard
from slotscops.shard.index import ShardDataset, ShardEntry, open_dataset

_SHARED = ("weights_sha256", PROJECTION_SHA256)  # in which the caches of plain and mirrored crops must agree

# ---- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    dataset: ShardDataset
    mirrored: "FeatureCache | None" = None  # the cache of the mirrored crops, if it was requested

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, h, w of one row."""
        channels, height, width = self.manifest["shape"]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """One hash over the manifest, which holds each file's hash; with mirrored features, over both manifests."""
        own = sha256_of_json(self.manifest)
        return own if self.mirrored is None else sha256_of_json([own, self.mirrored.digest])

    @property
    def is_random(self) -> bool:
        """True if the teacher has random weights, which are good for tests only."""
        return str(self.manifest["weights"]).startswith("random:")

    @property
    def has_negative(self) -> bool:
        """True if any file holds negative numbers, which features after a ReLU never are."""
        files: FileTable = self.manifest["files"]
        return files.any_holds("negative")

    @property
    def compact(self) -> Compact:
        """The form in which the rows are stored."""
        return Compact.of(self.manifest)

    @cached_property
    def projection(self) -> Tensor | None:
        """(C, D) matrix that turned teacher features into these rows; None if the rows are the features themselves.

        Raises:
            UserError: its file is missing or damaged.
        """
        sha256 = self.manifest.get(PROJECTION_SHA256)
        if sha256 is None:
            return None
        path = self.folder / PROJECTION
        try:
            with self.dataset.opened(f"features/{self.folder.name}/{PROJECTION}", sha256) as path:
                content = path.read_bytes()
            if sha256_of_bytes(content) != sha256:
                raise ValueError("its sha256 differs from the manifest")
            matrix = Projection.from_bytes(content).matrix
            if matrix.shape[1] != self.shape[0]:
                raise ValueError(f"has {matrix.shape[1]} components, needed {self.shape[0]}")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMOVE_AND_REBUILD}") from None
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}); {REMOVE_AND_REBUILD}") from None
        return matrix

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.safetensors"

    def file(self, entry: ShardEntry) -> tuple[str, str, int]:
        """Path inside SHARDS, sha256 and bytes of the features of one shard."""
        row = self.manifest["files"][entry.name]
        return f"features/{self.folder.name}/{entry.name}.safetensors", row["sha256"], row["bytes"]

    def open_shard(self, entry: ShardEntry) -> FeatureShard:
        """The features of one shard, downloaded first if they are remote.

        Raises:
            UserError: the file cannot be read, is another shard's, or has another shape than the manifest says.
        """
        with self.dataset.opened(*self.file(entry)) as path:
            shard = FeatureShard(path)
        if shard.label != file_label(self.manifest, entry.name):
            raise UserError(f"{shard.path}: belongs to another shard or cache (files swapped?); {REMOVE_AND_REBUILD}")
        if len(shard) != entry.num_samples or shard.shape != self.shape:
            raise UserError(
                f"{shard.path}: holds {len(shard)} maps of {shard.shape}, needed {entry.num_samples} of {self.shape}; "
                f"rebuild with: {rebuild_command(self.dataset.location, self.manifest)}"
            )
        return shard


def open_cache(
    dataset: ShardDataset,
    layer: str,
    size: int,
    weights_sha256: str | None = None,
    network: str = "vgg19",
    mirrored: bool = False,
    check_files: bool = True,
    compact: Compact | None = None,
) -> FeatureCache:
    """Opens the cache of `layer` at `size` pixels, and checks that it belongs to these shards and is complete.

    Args:
        mirrored: open the features of the mirrored crops too, made with the same weights.
        check_files: False if `check_feature_files` is called later, or by another process of this machine.
        compact: the form in which the features are stored; None: the features themselves as float16.

    Raises:
        UserError: the cache is missing or unfinished, or a field differs; the message gives the command to rebuild it.
    """
    wanted: dict[str, Any] = {"network": network, "layer": layer, "input_size": size, "mirrored": False}
    wanted |= (compact or Compact()).fields()
    wanted |= {} if weights_sha256 is None else {"weights_sha256": weights_sha256}
    cache = _open_one(dataset, wanted)
    if mirrored:
        shared = {name: cache.manifest[name] for name in _SHARED if name in cache.manifest}
        wanted |= {"mirrored": True} | shared
        cache = replace(cache, mirrored=_open_one(dataset, wanted, cache.manifest["weights"]))
    if check_files:
        check_feature_files(cache)
    return cache


def _open_one(dataset: ShardDataset, wanted: dict[str, Any], weights: str = "imagenet") -> FeatureCache:
    name = name_of(wanted)
    folder = dataset.folder / "features" / name
    command = rebuild_command(dataset.location, wanted | {"weights": weights})
    if not _has_manifest(dataset, name):
        others = _finished_names(dataset)
        state = f"only {', '.join(others)}" if others else "no finished feature cache"
        reason = " of the mirrored crops (data.mirror is on)" if wanted["mirrored"] else ""
        build = "build with" if dataset.remote is None else "build and upload it, where the shards were made, with"
        raise UserError(f"{dataset.location}: needs features {name}{reason}, has {state}; {build}: {command}")
    cache = FeatureCache(folder, read_manifest(folder / "manifest.json"), dataset)
    for field, value in (wanted | {"shard_digest": dataset.digest}).items():
        if cache.manifest.get(field) != value:
            raise UserError(
                f"{folder}: {field} is {cache.manifest.get(field)}, needed {value}; "
                f"remove the folder and rebuild with: {command}"
            )
    return cache


def _has_manifest(dataset: ShardDataset, name: str) -> bool:
    """Whether the cache is finished. The manifest of a remote cache is fetched."""
    if dataset.remote is None:
        return (dataset.folder / "features" / name / "manifest.json").is_file()
    try:
        dataset.remote.fetch_anew(f"features/{name}/manifest.json")
    except FileNotFoundError:
        return False
    return True


def _finished_names(dataset: ShardDataset) -> list[str]:
    """Names of the finished caches. A web server cannot list files, so remote caches count once fetched."""
    return sorted(path.parent.name for path in dataset.folder.glob("features/*/manifest.json"))


def open_features(shards: str | Path, shard: str, name: str | None = None) -> FeatureShard:
    """Opens one shard's features, such as `open_features("shards/horse", "train-000000")[i]`, (C, h, w) float16.

    Args:
        name: folder below SHARDS/features; may be left out if there is only one, not counting mirrored ones.

    Raises:
        UserError: there is no such shard or cache, or several caches and no name.
    """
    dataset = open_dataset(shards)
    names = [other for other in _finished_names(dataset) if not other.endswith("-mirrored")]
    if name is None and len(names) != 1:
        raise UserError(f"{shards}: has feature caches {names or 'none'}; name the one you want")
    name = name or names[0]
    if not _has_manifest(dataset, name):
        raise UserError(f"{shards}: has no finished feature cache '{name}', only {', '.join(names) or 'none'}")
    manifest = read_manifest(dataset.folder / "features" / name / "manifest.json")
    fields = ("network", "layer", "input_size", "mirrored")
    cache = _open_one(dataset, {field: manifest[field] for field in fields} | Compact.of(manifest).fields())
    for entries in dataset.splits.values():
        for entry in entries:
            if entry.name == shard:
                return cache.open_shard(entry)
    raise UserError(f"{shards}: has no shard '{shard}'")


def check_feature_files(cache: FeatureCache) -> None:
    """Raises UserError if the manifest does not list the features of a shard, or a file has not the size it says."""
    for one in [cache] if cache.mirrored is None else [cache, cache.mirrored]:
        if PROJECTION_SHA256 in one.manifest and one.dataset.remote is None:
            _ = one.projection  # raises if it is damaged
        for entry in (entry for entries in one.dataset.splits.values() for entry in entries):
            path, row = one.path(entry.name), one.manifest["files"].get(entry.name)
            if row is not None and one.dataset.remote is not None:
                continue  # checked when it is fetched
            num_bytes = size_of_file(path)
            if row is None or num_bytes != row["bytes"]:
                came = "no file" if num_bytes is None else num_bytes
                needed = "a row in the manifest" if row is None else f"{row['bytes']} bytes"
                raise UserError(f"{path}: came {came}, needed {needed}; {REMOVE_AND_REBUILD}")


def find_projection_damage(cache: FeatureCache) -> list[str]:
    """Checks the cache's projection, if it has one; returns the line that says what is damaged, usually none."""
    try:
        _ = replace(cache).projection  # a copy, which reads the file again
    except UserError as error:
        return [str(error)]
    return []


def find_damage(cache: FeatureCache, entry: ShardEntry) -> list[str]:
    """Checks the features of one shard; returns one line for each damaged file or row, usually none."""
    path, row = cache.path(entry.name), cache.manifest["files"].get(entry.name)
    if row is None:
        return [f"{cache.folder / 'manifest.json'}: lists no {path.name}; {REMOVE_AND_REBUILD}"]
    try:
        is_as_written = sha256_of_file(path) == row["sha256"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror}); {REMOVE_AND_REBUILD}"]
    try:
        shard = cache.open_shard(entry)
    except UserError as error:
        return [str(error)]
    damaged = dict.fromkeys(shard.rows_not_finite(), "holds NaN or infinity")
    for number in () if is_as_written else range(len(shard)):
        try:
            shard.read_rows([number])
        except DamageError:
            damaged.setdefault(number, "is damaged")
    keys = _keys_of(cache, entry) if damaged else {}
    lines = [f"{path}: row {n}{keys.get(n, '')} {what}; {REMOVE_AND_REBUILD}" for n, what in sorted(damaged.items())]
    if not lines and not is_as_written:
        lines = [f"{path}: is damaged (sha256 differs from the manifest), though no row is; {REMOVE_AND_REBUILD}"]
    return lines


def _keys_of(cache: FeatureCache, entry: ShardEntry) -> dict[int, str]:
    """The key of the sample of each row, as messages add it; none if the index is damaged, which `--verify` reports."""
    try:
        index = cache.dataset.read_index(entry)
    except UserError:
        return {}
    return {number: f" ({index.key(number)})" for number in range(len(index))}


def warn_if_random(cache: FeatureCache) -> None:
    """Prints a warning if the features come from a teacher with random weights."""
    if cache.is_random and console.is_main():
        console.warn(
            f"WARNING: the features in {cache.folder} come from an UNTRAINED {cache.manifest['network']} "
            f"({cache.manifest['weights']}). "
            "Scores made with them mean nothing beyond a test."
        )
