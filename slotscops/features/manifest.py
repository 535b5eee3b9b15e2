"""The description of a feature cache: `SHARDS/features/{name}/manifest.json`."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.core.errors import UserError, first_line
from slotscops.core.files import is_plain_name, sha256_of_json, write_json
from slotscops.core.pretrained import OWN
from slotscops.features.compact import PROJECTION_SHA256, Compact, check_fields

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
_OF_ITS_OWN = ("bytes", "sha256")
_SHA256 = re.compile(r"[0-9a-f]{64}")
REMOVE_AND_REBUILD = "remove the folder and rebuild it with python -m slotscops.features"


def cache_name(
    layer: str, size: int, network: str = "vgg19", mirrored: bool = False, compact: Compact | None = None
) -> str:
    """Name of the cache's folder below SHARDS/features.

    Raises:
        UserError: the names of network and layer would make it another folder.
    """
    form = (compact or Compact()).name_suffix()
    name = f"{network.replace('/', '-')}-{layer}-{size}{form}" + ("-mirrored" if mirrored else "")
    if not is_plain_name(name):
        raise UserError(f"'{name}' is no name of a feature cache; give the names of a network and of its layer")
    return name


def name_of(manifest: dict[str, Any]) -> str:
    """The cache's name for a manifest, or for the fields wanted of one."""
    compact = Compact.of(manifest)
    return cache_name(manifest["layer"], manifest["input_size"], manifest["network"], manifest["mirrored"], compact)


def rebuild_command(shards: str, manifest: dict[str, Any]) -> str:
    """The command that computes the cache that the manifest describes."""
    command = f"python -m slotscops.features --shards {shards}"
    if manifest["network"] != "vgg19":
        command += f" --teacher {manifest['network']}"
    command += f" --layer {manifest['layer']} --size {manifest['input_size']}"
    if manifest["weights"] not in OWN:
        command += f" --teacher-weights {manifest['weights']}"
    command += Compact.of(manifest).options()
    return command + (" --mirrored" if manifest["mirrored"] else "")


def file_label(identity: dict[str, Any], shard: str) -> str:
    """The label stored in each file of a cache, by which swapped files are found whatever their names."""
    compact = {name: identity[name] for name in (*Compact.of(identity).fields(), PROJECTION_SHA256) if name in identity}
    return f"{sha256_of_json({name: identity[name] for name in IDENTITY} | compact)[:16]}/{shard}"


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
    if not check_fields(manifest):
        raise UserError(f"{path}: what it says of its components is damaged; {REMOVE_AND_REBUILD}")
    manifest["files"] = FileTable(manifest["files"])
    return manifest


class FileTable(Mapping[str, dict[str, Any]]):
    """The files of a cache by shard, as the manifest lists them, in arrays: 60 bytes a row instead of 500 as a dict."""

    def __init__(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        names = sorted(files)
        self._names = np.array([name.encode() for name in names], np.bytes_)
        self._bytes = np.array([files[name]["bytes"] for name in names], np.int64)
        self._hashes = np.frombuffer(
            b"".join(bytes.fromhex(files[name]["sha256"]) for name in names), np.dtype((np.void, 32))
        )
        others = [
            {field: row[field] for field in row if field not in _OF_ITS_OWN} for row in (files[name] for name in names)
        ]
        kinds = {json.dumps(other, sort_keys=True): other for other in others}
        self._kinds = list(kinds.values())  # the fields that many rows share, such as the encoding
        numbers = {text: number for number, text in enumerate(kinds)}
        self._kind = np.array([numbers[json.dumps(other, sort_keys=True)] for other in others], np.int32)

    def __getitem__(self, shard: str) -> dict[str, Any]:
        number = int(np.searchsorted(self._names, shard.encode()))
        if number == len(self._names) or self._names[number] != shard.encode():
            raise KeyError(shard)
        own: dict[str, Any] = {"bytes": int(self._bytes[number]), "sha256": self._hashes[number].tobytes().hex()}
        own |= self._kinds[self._kind[number]]
        return own

    def any_holds(self, field: str) -> bool:
        """Whether a field that many rows share, such as `negative`, is true in any of them."""
        return any(kind.get(field) is True for kind in self._kinds)

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_table(files: Any) -> bool:
    return isinstance(files, dict) and all(
        is_plain_name(name)
        and isinstance(row, dict)
        and all(type(row.get(field)) is kind for field, kind in _OF_EACH_FILE.items())
        and _SHA256.fullmatch(row["sha256"])
        and 0 <= row["bytes"] < 1 << 63
        for name, row in files.items()
    )


def write_manifest(
    path: Path, identity: dict[str, Any], shape: tuple[int, ...], files: Mapping[str, dict[str, Any]]
) -> None:
    manifest = identity | {"format": FORMAT, "shape": list(shape), "files": dict(files)}
    write_json(path, manifest | {"digest": sha256_of_json(manifest)})
