"""Computes the features of all crops or mirrored crops and writes them beside the shards. It can be restarted anytime.

Shapes: N samples of a shard, C channels on an h x w grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slotscops.core import console
from slotscops.core.claims import claim, leased_units, remove_leases
from slotscops.core.errors import RunError, UserError
from slotscops.core.files import read_bytes, remove_abandoned, sha256_of_file, write_once
from slotscops.core.machine import keep_freed_memory, own_device
from slotscops.core.timm_networks import own_licence
from slotscops.features.cache import FeatureCache, open_cache
from slotscops.features.compact import PROJECTION, PROJECTION_SHA256, Compact, Projection, project
from slotscops.features.manifest import REMOVE_AND_REBUILD, file_label, name_of, write_manifest
from slotscops.features.projection_fit import fit_projection
from slotscops.features.rows import FeatureShard, encode
from slotscops.features.teacher import Teacher, compute_features
from slotscops.shard.index import ShardDataset, ShardEntry
from slotscops.shard.reader import ShardReader

_BATCH_SIZE = 16  # fixed: another batch size may change the last bits of a convolution; the cache must be reproducible


def build_cache(
    dataset: ShardDataset, teacher: Teacher, size: int, mirrored: bool = False, compact: Compact | None = None
) -> FeatureCache:
    """Computes what is missing in the cache and returns the finished cache.

    Args:
        mirrored: compute the features of the mirrored crops too.
        compact: the form in which they are stored; None stores the features themselves as float16.

    Raises:
        UserError: the folder holds a cache made with other settings, or the teacher has too few channels.
    """
    compact = compact or Compact()
    compact.check(teacher.num_channels, f"{teacher.layer} of {teacher.network}")
    num_samples = sum(entry.num_samples for split in dataset.splits.values() for entry in split)
    shape = teacher.output_shape(size)
    num_bytes = num_samples * compact.row_bytes(shape) * (2 if mirrored else 1)
    # Components are hardly ever zero, so there the number is no upper bound but what will be written.
    at_most, or_less = ("at most ", ", less if most values are zero") if compact.components is None else ("", "")
    console.say(
        f"features of {num_samples:,} crops, {' x '.join(map(str, compact.shape(shape)))} {compact.store} each: "
        f"{at_most}{_to_text(num_bytes)} in {dataset.folder / 'features'}{or_less}"
    )
    for flip in (False, True) if mirrored else (False,):
        write_cache(dataset, teacher, size, flip, compact)
    return open_cache(dataset, teacher.layer, size, teacher.fingerprint, teacher.network, mirrored, compact=compact)


def _to_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def write_cache(
    dataset: ShardDataset, teacher: Teacher, size: int, mirrored: bool, compact: Compact | None = None
) -> None:
    """Writes the missing files of one cache, and its manifest last.

    The mirrored cache takes the projection of the plain one, which must have been written before.

    Raises:
        ClaimError: the folder holds a cache made with other settings, or another process is writing one.
        RunError: a feature does not fit into float16.
    """
    compact = compact or Compact()
    identity = _identity(dataset, teacher, size, mirrored) | compact.fields()
    folder = dataset.folder / "features" / name_of(identity)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    claim(folder / "identity.json", identity, "remove the folder to build it anew")
    if (folder / "manifest.json").is_file():
        return
    entries = [entry for split in dataset.splits.values() for entry in split]
    paths = [folder / f"{entry.name}.safetensors" for entry in entries]
    device, shape = own_device(), compact.shape(teacher.output_shape(size))
    teacher = teacher.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    matrix = None
    if compact.components is not None:
        projection = _share_projection(folder, dataset, teacher, size, identity)
        matrix = projection.matrix.to(device)
        sha256 = sha256_of_file(folder / PROJECTION)
        identity |= {PROJECTION_SHA256: sha256, "explained_variance": projection.explained_variance}
    for number in leased_units([path.name for path in paths], folder, lambda number: paths[number].is_file()):
        label = file_label(identity, entries[number].name)
        features = _compute_shard(dataset, entries[number], teacher, size, shape, mirrored, matrix)
        content = encode(features, label, compact.store)
        # Another device may compute other last bits, and the manifest may already name the hash of the first file.
        write_once(paths[number], content)
    # One process reads and hashes all files.
    for _ in leased_units(["manifest.json"], folder, lambda _: (folder / "manifest.json").is_file()):
        _list_files(folder, identity, entries, shape)
        remove_leases(folder)


def _share_projection(
    folder: Path, dataset: ShardDataset, teacher: Teacher, size: int, identity: dict[str, Any]
) -> Projection:
    """The projection of the cache. One process fits it, or takes it from the plain cache, and writes it for all."""
    path = folder / PROJECTION
    for _ in leased_units([PROJECTION], folder, lambda _: path.is_file()):
        if identity["mirrored"]:
            content = read_bytes(folder.parent / name_of(identity | {"mirrored": False}) / PROJECTION)
        else:
            content = fit_projection(dataset, teacher, size, identity["components"]).to_bytes()
        write_once(path, content)
    try:
        return Projection.from_bytes(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; {REMOVE_AND_REBUILD}") from None


def _identity(dataset: ShardDataset, teacher: Teacher, size: int, mirrored: bool) -> dict[str, Any]:
    shapes = [list(shape) for shape in teacher.layer_shapes(size)]  # as JSON gives them back
    resized = {"layer_shapes": shapes} if len({tuple(shape[1:]) for shape in shapes}) > 1 else {}
    return resized | {
        "network": teacher.network,
        "layer": teacher.layer,
        "weights": teacher.weights_name,
        "weights_sha256": teacher.fingerprint,
        "input_size": size,
        "resize": "none" if size == dataset.size else "bicubic, antialiased",
        "normalisation": {"mean": list(teacher.mean), "std": list(teacher.std), "channels": "RGB"},
        "dtype": "float16",
        "mirrored": mirrored,
        "shard_digest": dataset.digest,
    }


def _compute_shard(
    dataset: ShardDataset,
    entry: ShardEntry,
    teacher: Teacher,
    size: int,
    shape: tuple[int, int, int],
    mirrored: bool,
    matrix: Tensor | None,
) -> NDArray[np.float16]:
    """(N, C, h, w) features of one shard's crops, or (N, D, h, w) with a (C, D) matrix; `shape` is that of a row."""
    reader = ShardReader(dataset, entry)
    features = np.empty((entry.num_samples, *shape), np.float16)
    starts = range(0, entry.num_samples, _BATCH_SIZE)
    what = f"features of {entry.name}{', mirrored' if mirrored else ''}, batches of {_BATCH_SIZE}"
    for start in console.track(starts, len(starts), what):
        images = reader.read_images(range(start, min(start + _BATCH_SIZE, entry.num_samples)))
        maps = compute_features(teacher, images.flip(-1) if mirrored else images, size)
        features[start : start + _BATCH_SIZE] = project(maps, matrix).half().cpu().numpy()
    if not np.isfinite(features).all():
        raise RunError(f"{entry.name}: features beyond 65504 do not fit float16; check the teacher's weights")
    return features


def _list_files(folder: Path, identity: dict[str, Any], entries: list[ShardEntry], shape: tuple[int, ...]) -> None:
    files = {}
    for entry in entries:
        path = folder / f"{entry.name}.safetensors"
        shard = FeatureShard(path)
        files[entry.name] = {
            "sha256": sha256_of_file(path),
            "bytes": path.stat().st_size,
            "encoding": shard.encoding,
            "negative": shard.has_negative,
        }
    # Not a part of the identity, because a cache that an earlier version began knows no licence.
    licence = own_licence(identity["network"], identity["weights"])
    known = {} if licence is None else {"weights_licence": licence}
    write_manifest(folder / "manifest.json", identity | known, shape, files)
