"""Random damage to files, and the readers that must cope with it."""

import copy
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from slotscops.core.errors import DamageError, RunError
from slotscops.core.files import sha256_of_json
from slotscops.core.records import MEMBERS
from slotscops.datasets.pascal_part.annotation import read_annotation
from slotscops.features.cache import FeatureCache, check_feature_files
from slotscops.features.manifest import read_manifest
from slotscops.shard.index import ShardIndex, index_path, open_dataset
from slotscops.shard.reader import ShardReader

Generator = np.random.Generator
NUMBERS = (0, 1, 2, 7, 8, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, 1.5, float("nan"), "", "x", "../x", "/etc/passwd", "a\nb", "\x1b[2J", [], [[]], {},
    {"a": 1}, [None], ["../x"], "\ud800",
)  # fmt: skip
DEEP = "lists in lists"  # `json_text` writes them in the place of this text, because json.dumps cannot


class SilentChange(Exception):
    """A damaged file was read without an error, but with another result."""


# ---- damage ------------------------------------------------------------------------------------------------------


def damage(content: bytes, others: list[bytes], generator: Generator) -> bytes:
    """One to four damages of random kinds."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        kind = KINDS[generator.integers(len(KINDS))]
        if changed:
            kind(changed, others, generator)
    return bytes(changed)


def _span(changed: bytearray, generator: Generator) -> tuple[int, int]:
    """A random place, often near the beginning, where headers are, and a random length, mostly short."""
    at = int(len(changed) * generator.random() ** generator.choice([1, 4]))
    return at, int(2 ** (generator.random() * 12))


def _flip(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, _ = _span(changed, generator)
    changed[at] ^= 1 << int(generator.integers(8))


def _byte(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, _ = _span(changed, generator)
    changed[at] = int(generator.integers(256))


def _number(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, _ = _span(changed, generator)
    number, width = NUMBERS[generator.integers(len(NUMBERS))], int(generator.choice([1, 2, 4, 8]))
    order = "little" if generator.integers(2) else "big"
    changed[at : at + width] = (number % 256**width).to_bytes(width, order)


def _cut(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    block = int(generator.choice([1, 8, 512]))
    del changed[int(generator.integers(len(changed))) // block * block :]


def _remove(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, length = _span(changed, generator)
    del changed[at : at + length]


def _zeros(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, length = _span(changed, generator)
    changed[at : at + length] = bytes(len(changed[at : at + length]))


def _insert(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, length = _span(changed, generator)
    changed[at:at] = generator.bytes(min(length, 64))


def _splice(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    at, length = _span(changed, generator)
    other = others[generator.integers(len(others))]
    start = int(generator.integers(len(other) + 1))
    changed[at : at + length] = other[start : start + length]


def _move(changed: bytearray, others: list[bytes], generator: Generator) -> None:
    (at, length), (to, _) = _span(changed, generator), _span(changed, generator)
    changed[to : to + length] = changed[at : at + length]


KINDS = (_flip, _flip, _byte, _number, _number, _cut, _remove, _zeros, _insert, _splice, _move)


def damage_json(content: Any, generator: Generator) -> Any:
    """One to three damages of random kinds anywhere in the content: other values, keys, types, places and nesting."""
    holder = [json.loads(json.dumps(content))]
    for _ in range(generator.integers(1, 4)):
        node, place = _place_in(holder, generator)
        kind = JSON_KINDS[generator.integers(len(JSON_KINDS))]
        kind(node, place, generator)
    return holder[0] if holder else None


def json_text(content: Any, generator: Generator) -> str:
    """The content as JSON. `DEEP` becomes lists in lists, so many that a parser may give up."""
    depth = int(generator.choice([10, 900, 100_000]))
    return json.dumps(content).replace(json.dumps(DEEP), "[" * depth + "]" * depth)


def damaged_json(content: bytes, generator: Generator) -> bytes:
    """A damaged JSON file that still is JSON."""
    return json_text(damage_json(json.loads(content), generator), generator).encode()


def _place_in(holder: list[Any], generator: Generator) -> tuple[Any, Any]:
    """A dictionary or list somewhere in the holder, and a key or number of it. The outermost place is seldom chosen."""
    node: Any = holder
    chance = 0.97
    while True:
        place = _any_of(list(node) if isinstance(node, dict) else range(len(node)), generator)
        inner = node[place]
        if not isinstance(inner, dict | list) or not inner or generator.random() > chance:
            return node, place
        node, chance = inner, 0.8


def _any_of(choices: Sequence[Any], generator: Generator) -> Any:
    return choices[generator.integers(len(choices))]


def _replace(node: Any, place: Any, generator: Generator) -> None:
    node[place] = copy.deepcopy(_any_of(VALUES, generator))


def _delete(node: Any, place: Any, generator: Generator) -> None:
    if len(node) > 1 or isinstance(node, dict):
        del node[place]


def _rename(node: Any, place: Any, generator: Generator) -> None:
    """Gives the value another key: that of a neighbour, a slightly different one, or a strange one."""
    if isinstance(node, dict):
        others = [*node, f"{place}x", str(place).upper(), str(place)[:-1], "", "../x", "/", "a\nb", "\x1b[2J", "\ud800"]
        node[_any_of(others, generator)] = node.pop(place)


def _nest(node: Any, place: Any, generator: Generator) -> None:
    """Puts the value into itself, into a list, or into a deep pile of lists."""
    value = node[place]
    nested: list[Any] = [{str(place): value}, [value], [value, value], {"a": {"a": value}}, DEEP]
    if isinstance(value, dict):
        nested.append(value | {str(key): value for key in value})
    node[place] = copy.deepcopy(_any_of(nested, generator))


def _retype(node: Any, place: Any, generator: Generator) -> None:
    """The same value as another type."""
    value = node[place]
    if isinstance(value, dict):
        others: list[Any] = [list(value), list(value.values()), list(map(list, value.items())), json.dumps(value)]
    elif isinstance(value, list):
        others = [{str(number): item for number, item in enumerate(value)}, json.dumps(value), len(value)]
    elif isinstance(value, str):
        others = [[value], list(value), {value: value}, len(value), bool(value)]
    elif value is None:
        others = [[], {}, 0, ""]
    else:
        others = [str(value), [value], bool(value), float(value), -value, {"a": value}]
    node[place] = copy.deepcopy(_any_of(others, generator))


def _exchange(node: Any, place: Any, generator: Generator) -> None:
    """Exchanges two values of one list or dictionary, or gives both the same."""
    other = _any_of(list(node) if isinstance(node, dict) else range(len(node)), generator)
    both = (node[other], node[place]) if generator.integers(2) else (node[place], copy.deepcopy(node[place]))
    node[place], node[other] = both


def _repeat(node: Any, place: Any, generator: Generator) -> None:
    if isinstance(node, list):
        node[place:place] = [copy.deepcopy(node[place]) for _ in range(generator.integers(1, 4))]


JSON_KINDS = (_replace, _replace, _delete, _rename, _nest, _retype, _exchange, _repeat)


# ---- readers -----------------------------------------------------------------------------------------------------


class Corpus:
    """Whole files to damage, and a copy of the data set that takes the damaged files."""

    def __init__(self, shards: Path, scratch: Path, real: Path | None) -> None:
        self.tree = shards / "photos"  # the toy's photos in the form of PASCAL-Part; not to be changed
        annotations = sorted(self.tree.rglob("*.mat"))[:4] + (sorted(real.rglob("*.mat"))[:8] if real else [])
        compressed = [path.read_bytes() for path in annotations]
        # An uncompressed copy is damaged too, because zlib's checksum finds nearly all damage to compressed data.
        self.annotations = [*compressed, *map(inflated, compressed)]
        self.shards = Path(shutil.copytree(shards, scratch / "shards", ignore=shutil.ignore_patterns("photos")))
        self.dataset = open_dataset(self.shards)
        self.entry = self.dataset.splits["train"][0]
        self.tars = self._read(self.shards.glob("*.tar"), self.dataset.tar_path(self.entry))
        self.index_path = index_path(self.shards, self.entry.name)
        self.indices = self._read(self.index_path.parent.glob("*.safetensors"), self.index_path)
        self.manifest_path = next(self.shards.glob("features/*/manifest.json"))
        self.cache = FeatureCache(self.manifest_path.parent, read_manifest(self.manifest_path), self.dataset)
        self.features_path = self.cache.path(self.entry.name)
        self.features = self._read(self.features_path.parent.glob("*.safetensors"), self.features_path)
        self.rows = self.cache.open_shard(self.entry).read_rows(range(self.entry.num_samples)).numpy().copy()
        self.dataset_json = (self.shards / "index" / "dataset.json").read_bytes()
        self.manifest = self.manifest_path.read_bytes()
        reader = ShardReader(self.dataset, self.entry)
        self.members = {(row, m): reader.read_member(row, m) for row in range(len(reader.index)) for m in MEMBERS}
        self.photos = reader.read_images(range(len(reader.index)))

    @staticmethod
    def _read(paths: Any, first: Path) -> list[bytes]:
        return [first.read_bytes(), *(path.read_bytes() for path in sorted(paths) if path != first)]


def inflated(annotation: bytes) -> bytes:
    """The same MATLAB file with its first matrix uncompressed."""
    kind, size = np.frombuffer(annotation[128:136], "<u4")
    return annotation[:128] + zlib.decompress(annotation[136 : 136 + size]) if kind == 15 else annotation


def read_mat(corpus: Corpus, generator: Generator) -> None:
    whole = corpus.annotations[generator.integers(len(corpus.annotations))]
    read_annotation(BytesIO(damage(whole, corpus.annotations, generator)))


def read_tar(corpus: Corpus, generator: Generator) -> None:
    """Reads every member as training and evaluation do. Each must be unchanged or reported as damaged."""
    path = corpus.dataset.tar_path(corpus.entry)
    path.write_bytes(damage(corpus.tars[0], corpus.tars, generator))
    try:
        reader = ShardReader(corpus.dataset, corpus.entry)
        errors: list[DamageError] = []
        for row in range(len(reader.index)):
            try:
                photo = reader.read_images([row])[0]
                reader.read_part_labels(row)
                reader.read_object_mask(row)
                reader.read_description(row)
                for member in MEMBERS:
                    if reader.read_member(row, member) != corpus.members[row, member]:
                        raise SilentChange(f"member {member} of row {row}")
            except DamageError as error:
                errors.append(error)
                continue
            if not (photo == corpus.photos[row]).all():
                raise SilentChange(f"photo of row {row}")
        if errors:
            raise errors[-1]
    finally:
        path.write_bytes(corpus.tars[0])


def read_index(corpus: Corpus, generator: Generator) -> None:
    """Reads the index with its sha256, as always, and without it, so that the later checks are reached too."""
    corpus.index_path.write_bytes(damage(corpus.indices[0], corpus.indices, generator))
    try:
        index = ShardIndex.read(corpus.index_path)
        reader = ShardReader(corpus.dataset, corpus.entry, index)
        for row in range(min(len(index), 100)):
            assert index.key(row).isprintable()
            for member in MEMBERS:
                try:
                    reader.read_member(row, member)
                except DamageError as error:
                    _check_line(error)
        found = corpus.dataset.read_index(corpus.entry)
        if any((mine != whole).any() for mine, whole in zip(_arrays(found), _arrays(index), strict=True)):
            raise SilentChange("index")
    finally:
        corpus.index_path.write_bytes(corpus.indices[0])


def _arrays(index: ShardIndex) -> list[Any]:
    return list(vars(index).values())


def _check_line(error: RunError) -> None:
    if not str(error).isprintable():
        raise SilentChange(f"error of several lines: {error}")


def read_features(corpus: Corpus, generator: Generator) -> None:
    corpus.features_path.unlink()  # a new file: the old one is still mapped
    corpus.features_path.write_bytes(damage(corpus.features[0], corpus.features, generator))
    try:
        shard = corpus.cache.open_shard(corpus.entry)
        errors: list[DamageError] = []
        for row in range(len(shard)):
            try:
                came = shard[row].numpy()
            except DamageError as error:
                errors.append(error)
                continue
            if (came.view(np.uint16) != corpus.rows[row].view(np.uint16)).any():
                raise SilentChange(f"row {row}")
        if errors:
            raise errors[-1]
    finally:
        corpus.features_path.unlink()
        corpus.features_path.write_bytes(corpus.features[0])


def _damaged_text(content: bytes, generator: Generator) -> bytes:
    """Damaged bytes, or damaged values with a digest that fits them, as in a malicious file."""
    if generator.integers(2):
        return damage(content, [content], generator)
    values = json.loads(content)
    del values["digest"]
    changed = damage_json(values, generator)
    if isinstance(changed, dict):
        changed["digest"] = sha256_of_json(changed)
    return json_text(changed, generator).encode()


def read_dataset_json(corpus: Corpus, generator: Generator) -> None:
    path = corpus.shards / "index" / "dataset.json"
    path.write_bytes(_damaged_text(corpus.dataset_json, generator))
    try:
        dataset = open_dataset(corpus.shards)
        for entries in dataset.splits.values():
            for entry in entries:
                if dataset.tar_path(entry).resolve().parent != corpus.shards.resolve():
                    raise SilentChange(f"would read {dataset.tar_path(entry)}")
                dataset.read_index(entry)
                ShardReader(dataset, entry).read_member(0, "jpg")
        assert dataset.size > 0
        for name in dataset.class_names:
            assert all(isinstance(part, str) for part in dataset.part_names[name])
    finally:
        path.write_bytes(corpus.dataset_json)


def read_feature_manifest(corpus: Corpus, generator: Generator) -> None:
    corpus.manifest_path.write_bytes(_damaged_text(corpus.manifest, generator))
    try:
        cache = replace(corpus.cache, manifest=read_manifest(corpus.manifest_path))
        check_feature_files(cache)
        cache.open_shard(corpus.entry).read_rows([0])
        assert len(cache.shape) == 3
    finally:
        corpus.manifest_path.write_bytes(corpus.manifest)


READERS: dict[str, Callable[[Corpus, Generator], None]] = {
    "mat": read_mat,
    "tar": read_tar,
    "index": read_index,
    "features": read_features,
    "dataset": read_dataset_json,
    "manifest": read_feature_manifest,
}
