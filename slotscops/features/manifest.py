"""The description of a feature cache: `SHARDS/features/{name}/manifest.json`."""

import json
from pathlib import Path
from typing import Any

from slotscops.core.errors import UserError, first_line
from slotscops.core.files import is_plain_name, sha256_of_json, write_json

FORMAT = 2
# Fields that must be equal for two caches to hold the same features.
IDENTITY = (
    "network",
    "layer",
    "weights",
    "weights_sha256",
    "input_size",
    "resize",
    "normalisation",
    "dtype",
    "mirrored",
    "shard_digest",
)
_OF_EACH_FILE = {"bytes": int, "sha256": str, "encoding": str}
REMOVE_AND_REBUILD = "remove the folder and rebuild it with python -m slotscops.features"


def cache_name(layer: str, size: int, network: str = "vgg19", mirrored: bool = False) -> str:
    """Name of the cache's folder below SHARDS/features.

    Raises:
        UserError: the names of network and layer would make it another folder.
    """
    name = f"{network}-{layer}-{size}" + ("-mirrored" if mirrored else "")
    if not is_plain_name(name):
        raise UserError(f"'{name}' is no name of a feature cache; give the names of a network and of its layer")
    return name


def name_of(manifest: dict[str, Any]) -> str:
    """The cache's name for a manifest, or for the fields wanted of one."""
    return cache_name(manifest["layer"], manifest["input_size"], manifest["network"], manifest["mirrored"])


def rebuild_command(shards: str, manifest: dict[str, Any]) -> str:
    """The command that computes the cache that the manifest describes."""
    command = f"python -m slotscops.features --shards {shards}"
    if manifest["network"] != "vgg19":
        command += f" --teacher {manifest['network']}"
    command += f" --layer {manifest['layer']} --size {manifest['input_size']}"
    if manifest["weights"] != "imagenet":
        command += f" --teacher-weights {manifest['weights']}"
    return command + (" --mirrored" if manifest["mirrored"] else "")


def file_label(identity: dict[str, Any], shard: str) -> str:
    """The label stored in each file of a cache, by which swapped files are found whatever their names."""
    return f"{sha256_of_json({name: identity[name] for name in IDENTITY})[:16]}/{shard}"


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest. Raises UserError if it is missing, damaged or of another version."""
    try:
        manifest = dict(json.loads(path.read_text()))
        missing = {"format", "files", "shape", *IDENTITY} - set(manifest)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {REMOVE_AND_REBUILD}") from None
    if missing or manifest["format"] != FORMAT:
        raise UserError(f"{path}: is of another format or lacks {sorted(missing)}; {REMOVE_AND_REBUILD}")
    if manifest.pop("digest", None) != sha256_of_json(manifest):
        raise UserError(f"{path}: its content does not fit its own digest; {REMOVE_AND_REBUILD}")
    shape = manifest["shape"]
    if not _is_table(manifest["files"]) or not isinstance(shape, list) or [type(side) for side in shape] != [int] * 3:
        raise UserError(f"{path}: its shape or table of files is damaged; {REMOVE_AND_REBUILD}")
    return manifest


def _is_table(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in _OF_EACH_FILE.items())
        for row in files.values()
    )


def write_manifest(
    path: Path, identity: dict[str, Any], shape: tuple[int, ...], files: dict[str, dict[str, Any]]
) -> None:
    manifest = identity | {"format": FORMAT, "shape": list(shape), "files": files}
    write_json(path, manifest | {"digest": sha256_of_json(manifest)})
