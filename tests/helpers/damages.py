"""Kinds of damage to the files of a data set. Each is done to a copy of the toy shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from slotscops.core.records import MEMBERS
from slotscops.features.verify import tar_header
from slotscops.shard.index import ShardIndex

SHARD = "train-000001"  # the shard that is damaged
OTHER = "train-000000"  # another one with the same number of samples
ROW = 2  # the damaged sample, if it is a single one
CACHE = "vgg19-relu5_4-64"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def append_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(kept)


def tar(shards: Path) -> Path:
    return shards / f"{SHARD}.tar"


def index_file(shards: Path) -> Path:
    return shards / "index" / f"{SHARD}.safetensors"


def feature_file(shards: Path) -> Path:
    return shards / "features" / CACHE / f"{SHARD}.safetensors"


def index_of(shards: Path) -> ShardIndex:
    return ShardIndex.read(index_file(shards))


def offset(shards: Path, member: str = "jpg") -> int:
    return int(index_of(shards).offsets[ROW, MEMBERS.index(member)])


def size(shards: Path, member: str = "jpg") -> int:
    return int(index_of(shards).sizes[ROW, MEMBERS.index(member)])


def tensor_offset(path: Path, name: str) -> int:
    """First byte of an array of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + int(json.loads(content[8 : 8 + length])[name]["data_offsets"][0])


def at_length(content: bytes, num_bytes: int) -> bytes:
    return content[:num_bytes].ljust(num_bytes, b"\0")


def write_over(path: Path, other: Path) -> None:
    """Replaces the content by that of the other file, and keeps the file's own length."""
    path.write_bytes(at_length(other.read_bytes(), path.stat().st_size))


def swap_content(first: Path, second: Path) -> None:
    """Swaps the content of two files, and keeps the length of each."""
    mine, others = first.read_bytes(), second.read_bytes()
    first.write_bytes(at_length(others, len(mine)))
    second.write_bytes(at_length(mine, len(others)))


def change_digit(path: Path, field: str) -> None:
    """Changes the first digit after the name of a field of a JSON file."""
    text = path.read_text()
    at = next(i for i in range(text.index(f'"{field}"'), len(text)) if text[i].isdigit())
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def hostile_name(shards: Path, name: str, kind: bytes = b"0") -> None:
    """Gives a member another name and kind; content and index stay as they are."""
    at = offset(shards) - 512
    content = bytearray(tar(shards).read_bytes())
    header = bytearray(tar_header(name, size(shards)))
    header[156:157] = kind
    header[157:257] = b"/etc/passwd".ljust(100, b"\0") if kind in b"12" else bytes(100)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    tar(shards).write_bytes(content)


def values_name(shards: Path) -> str:
    with safe_open(feature_file(shards), framework="np") as file:
        return "features" if "features" in file.keys() else "values"  # noqa: SIM118


def manifest(shards: Path) -> Path:
    return shards / "features" / CACHE / "manifest.json"


def dataset_json(shards: Path) -> Path:
    return shards / "index" / "dataset.json"


Damage = Callable[[Path], object]
# Damage -> how to do it, and where it is found: at opening (O), when reading samples by index (R), by --verify (V).
DAMAGES: dict[str, tuple[Damage, str]] = {
    "tar cut at a member boundary": (lambda s: cut(tar(s), offset(s) - 512), "O V"),
    "tar cut inside a member": (lambda s: cut(tar(s), offset(s) + 10), "O V"),
    "tar cut to nothing": (lambda s: cut(tar(s), 0), "O V"),
    "tar with a byte too many": (lambda s: append_byte(tar(s)), "O V"),
    "tar missing": (lambda s: tar(s).unlink(), "O V"),
    "tar replaced by a folder": (lambda s: (tar(s).unlink(), tar(s).mkdir()), "O V"),
    "tar: bit of a header": (lambda s: flip(tar(s), offset(s) - 500), "V"),
    "tar: bit of a header's size": (lambda s: flip(tar(s), offset(s) - 512 + 130), "V"),
    "tar: bit of a photo": (lambda s: flip(tar(s), offset(s) + 20), "R V"),
    "tar: last byte of a photo": (lambda s: flip(tar(s), offset(s) + size(s) - 1), "R V"),
    "tar: bit of the part labels": (lambda s: flip(tar(s), offset(s, "parts.png") + 20), "R V"),
    "tar: bit of the object mask": (lambda s: flip(tar(s), offset(s, "object.png") + 20), "R V"),
    "tar: bit of the description": (lambda s: flip(tar(s), offset(s, "json") + 5), "V"),
    "tar: bit of the padding": (lambda s: flip(tar(s), offset(s) + size(s)), "V"),
    "tar: bit of the end mark": (lambda s: flip(tar(s), tar(s).stat().st_size - 1), "V"),
    "tar: zeros from the middle on": (
        lambda s: tar(s).write_bytes(tar(s).read_bytes()[: offset(s)].ljust(tar(s).stat().st_size, b"\0")),
        "R V",
    ),
    "tar: another shard's content": (lambda s: write_over(tar(s), s / f"{OTHER}.tar"), "R V"),
    "tars of the same length swapped": (lambda s: swap_content(tar(s), s / f"{OTHER}.tar"), "R V"),
    "tar: name ../": (lambda s: hostile_name(s, "../../evil.jpg"), "V"),
    "tar: absolute name": (lambda s: hostile_name(s, "/tmp/evil.jpg"), "V"),
    "tar: member becomes a link": (lambda s: hostile_name(s, "evil.jpg", b"2"), "V"),
    "tar: member becomes a hard link": (lambda s: hostile_name(s, "evil.jpg", b"1"), "V"),
    "index cut": (lambda s: cut(index_file(s), 300), "R V"),
    "index cut to nothing": (lambda s: cut(index_file(s), 0), "R V"),
    "index missing": (lambda s: index_file(s).unlink(), "R V"),
    "index: bit of its header": (lambda s: flip(index_file(s), 30), "R V"),
    "index: bit of a key": (lambda s: flip(index_file(s), tensor_offset(index_file(s), "key_bytes") + 3), "R V"),
    "index: bit of an offset": (lambda s: flip(index_file(s), tensor_offset(index_file(s), "offsets") + 1), "R V"),
    "index: bit of a size": (lambda s: flip(index_file(s), tensor_offset(index_file(s), "sizes")), "R V"),
    "index: bit of a crc32": (lambda s: flip(index_file(s), tensor_offset(index_file(s), "crc32")), "R V"),
    "index: bit of a class": (lambda s: flip(index_file(s), tensor_offset(index_file(s), "class_ids")), "R V"),
    "indices swapped": (lambda s: swap(index_file(s), s / "index" / f"{OTHER}.safetensors"), "R V"),
    "dataset.json cut": (lambda s: cut(dataset_json(s), 200), "O V"),
    "dataset.json: a number": (lambda s: change_digit(dataset_json(s), "num_samples"), "O V"),
    "dataset.json: a hash": (lambda s: change_digit(dataset_json(s), "sha256"), "O V"),
    "dataset.json: its digest": (lambda s: change_digit(dataset_json(s), "digest"), "O V"),
    "features cut": (lambda s: cut(feature_file(s), 5000), "O V"),
    "features missing": (lambda s: feature_file(s).unlink(), "O V"),
    "features with a byte too many": (lambda s: append_byte(feature_file(s)), "O V"),
    "features: bit of the header": (lambda s: flip(feature_file(s), 12), "R V"),
    "features: bit of a value": (
        lambda s: flip(feature_file(s), tensor_offset(feature_file(s), values_name(s)) + 9), "R V"
    ),
    "features: last byte": (lambda s: flip(feature_file(s), -1), "R V"),
    "features: bit of a crc32": (lambda s: flip(feature_file(s), tensor_offset(feature_file(s), "crc32")), "R V"),
    "features swapped": (
        lambda s: swap(feature_file(s), feature_file(s).with_name(f"{OTHER}.safetensors")), "R V"
    ),
    "manifest: a number": (lambda s: change_digit(manifest(s), "bytes"), "O V"),
    "manifest: a hash": (lambda s: change_digit(manifest(s), "weights_sha256"), "O V"),
    "manifest cut": (lambda s: cut(manifest(s), 100), "O V"),
}  # fmt: skip
