"""Readers of folders that were handed over or left by an earlier start: models, archives, caches, scores, shards."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_readers import DEEP, Corpus, Generator, SilentChange, damage, damage_json, damaged_json
from fuzz_runs import Strangers, damage_tensors, strangers
from PIL import Image
from safetensors.torch import load, save, save_file
from torch import nn

from slotscops.core import pretrained
from slotscops.core.files import sha256_of_bytes, sha256_of_json
from slotscops.datasets.merging import open_merge
from slotscops.datasets.pascal_part.archives import _members_by_folder
from slotscops.datasets.pascal_part.source import open_pascal_part
from slotscops.datasets.photo_folder import PhotoFolder
from slotscops.evaluate import scoreboard
from slotscops.evaluate.results_page import write_results_page
from slotscops.evaluate.scoreboard import Row, Scored
from slotscops.features.cache import open_cache
from slotscops.features.compact import PROJECTION, PROJECTION_SHA256, Compact
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.metrics.protocols import ALL_CLASSES, ALL_PROTOCOLS, ORDERS
from slotscops.segment.names import PartNames, write_names
from slotscops.segment.segmenter import Segmenter
from slotscops.shard.card import make_card
from slotscops.shard.writer import ShardSettings, write_shards
from slotscops.train.build import load_model
from slotscops.train.run.published import write_published

ARCHIVES = ("VOCtrainval_03-May-2010.tar", "trainval.tar.gz")
PARTS = {"horse": ["lear", "rear", "tail"], "cow": ["lear", "rear"]}
MERGES = {"horse": {"ear": ["lear", "rear"]}, "cow": {"ears": ["lear", "rear"]}}
COMPACT = Compact(4, "int8")
SMALL = ShardSettings(["object"], 32, {"train": 0.0, "val": 0.0}, 2)


class Folders:
    """A folder of each kind, and its whole files; damaged ones take their place one after the other."""

    def __init__(self, corpus: Corpus, own: Strangers) -> None:
        self.place = own.scratch / "folders"
        self.place.mkdir()
        self.teacher = Teacher("relu5_4", "random:0")
        self.model = self._make("model", lambda folder: self._make_model(folder, own))
        self.archives = self._make("archives", lambda folder: make_archives(folder, corpus.tree))
        self.weights = self._make("weights", self._make_weights)
        self.scores = self._make("scores", make_scores)
        self.shards = self._make("shards", self._make_shards)
        self.dataset = corpus.dataset
        self.cache = self._make_compact(corpus)
        self.whole = {path: path.read_bytes() for path in self._files()}
        for folder in (self.model, self.archives, self.weights, self.scores, self.shards, self.cache):
            assert any(folder in path.parents for path in self.whole)
        own.listing = own._list()

    def _files(self) -> list[Path]:
        return [path for folder in (self.place, self.cache) for path in folder.rglob("*") if path.is_file()]

    def _make(self, name: str, fill: Callable[[Path], object]) -> Path:
        folder = self.place / name
        folder.mkdir()
        fill(folder)
        return folder

    def _make_model(self, folder: Path, own: Strangers) -> None:
        trained = load_model(own.run)
        state = replace(trained.state, teacher_weights="random:0", teacher_sha256=self.teacher.fingerprint)
        write_published(folder, own.network.state_dict(), own.config, state)
        names = ["head", None, "legs", None, "tail"]
        write_names(folder, PartNames({"": names[: own.network.num_slots - 1]}, 0.5, 3))

    def _make_weights(self, folder: Path) -> None:
        module = small_module()
        save_file(module.state_dict(), folder / "weights.safetensors")
        torch.save(module.state_dict(), folder / "weights.pth")

    def _make_shards(self, folder: Path) -> None:
        photos = self.place / "photos"
        photos.mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(photos / f"{number}.jpg")
        (photos / "damaged.jpg").write_bytes(b"\xff\xd8")
        write_shards(self.photos, folder, SMALL, 1, "photos, parts False, val 0.5")

    @property
    def photos(self) -> PhotoFolder:
        return PhotoFolder(self.place / "photos", None, 0.5, "object")

    def _make_compact(self, corpus: Corpus) -> Path:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            return build_cache(corpus.dataset, self.teacher, 32, compact=COMPACT).folder

    def damage_one_of(self, paths: list[Path], generator: Generator) -> Path:
        """Damages one of the files, a JSON file sometimes so that it stays JSON."""
        path = paths[generator.integers(len(paths))]
        whole = self.whole[path]
        if path.suffix == ".json" and generator.integers(3):
            path.write_bytes(damaged_json(whole, generator))
        else:
            path.write_bytes(damage(whole, [self.whole[other] for other in paths], generator))
        return path

    def files_of(self, folder: Path) -> list[Path]:
        return sorted(path for path in self.whole if folder in path.parents)

    def restore(self) -> None:
        """Makes every file whole again, and removes the others."""
        for path in set(self._files()) - set(self.whole):
            path.unlink()
        for path, content in self.whole.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
                path.write_bytes(content)


def folders(corpus: Corpus) -> Folders:
    """Made once a process, before its first input."""
    if not hasattr(corpus, "folders"):
        vars(corpus)["folders"] = Folders(corpus, strangers(corpus))
    made: Folders = vars(corpus)["folders"]
    return made


@contextmanager
def restored(corpus: Corpus) -> Iterator[Folders]:
    own = folders(corpus)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield own
    finally:
        own.restore()
        strangers(corpus).check_nothing_lies_elsewhere()


def small_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def make_archives(folder: Path, tree: Path) -> None:
    """The toy's tree as the two official archives. Some members have names and attributes in headers of their own."""
    with tarfile.open(folder / ARCHIVES[0], "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tree / "VOCdevkit", "VOCdevkit", filter=_with_attributes)
    with tarfile.open(folder / ARCHIVES[1], "w:gz", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tree / "Annotations_Part", "./Annotations_Part")
        tar.addfile(tarfile.TarInfo("x" * 150))


def _with_attributes(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if member.name.endswith(".jpg"):
        member.pax_headers = {"comment": "a photo", "SCHILY.xattr.user": "x" * 40}
    return member


def make_scores(folder: Path) -> None:
    """A run's folder with the scores of a run and of a baseline, its costs and a picture."""
    numbers = dict.fromkeys(("nmi", "ari", "miou", "majority_miou"), 0.5)
    names = ("horse", ALL_CLASSES)
    rows = {Row(place, order, name): numbers for place in ALL_PROTOCOLS for order in ORDERS for name in names}
    methods = [Scored(name, name, 4, rows, {"horse": 0.1}, told_class=name == "run") for name in ("run", "baseline")]
    scoreboard.write(folder / "scores.json", {"merge": None}, methods)
    (folder / "machine.json").write_text(json.dumps({"device": "cpu", "threads": 2}))
    (folder / "cost.json").write_text(json.dumps({"stage": "train", "seconds": 2.5}))
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "step-10.png")


# ---- readers -----------------------------------------------------------------------------------------------------


def read_models(corpus: Corpus, generator: Generator) -> None:
    """A published model with a damaged file, or with tensors, a state or a fingerprint that somebody else wrote."""
    with restored(corpus) as own:
        model_path = own.model / "model.safetensors"
        if generator.integers(2):
            model_path.write_bytes(_other_model(own.whole[model_path], generator))
        else:
            own.damage_one_of(own.files_of(own.model), generator)
        model = Segmenter(load_model(own.model), teacher=own.teacher)
        photo = Image.new("RGB", (20, 12), (200, 90, 40))
        parts = model.segment(photo, model.class_names[0] if model.class_names else None)
        assert parts.labels.shape == (12, 20)
        assert np.isfinite(parts.maps).all()
        assert parts.areas.sum() == 12 * 20


def _other_model(content: bytes, generator: Generator) -> bytes:
    """The file with other tensors or another state, and with a fingerprint that fits them, as a stranger can write."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = load(content)
    if generator.integers(2):
        tensors = damage_tensors(tensors, generator)
    else:
        header["slotscops.state"] = damaged_json(header["slotscops.state"].encode(), generator).decode()
    if generator.integers(4):
        header["slotscops.sha256"] = pretrained.fingerprint(tensors)
    return save(tensors, header)


def read_archives(corpus: Corpus, generator: Generator) -> None:
    """PASCAL-Part's archives, of which one is damaged, scanned and read as `shard` does."""
    with restored(corpus) as own:
        _members_by_folder.cache_clear()
        path = own.archives / ARCHIVES[generator.integers(2)]
        path.write_bytes(_damaged_archive(own.whole[path], path.suffix == ".gz", generator))
        with open_pascal_part(own.archives, own.place / ".unpacked") as source:
            images = source.list_images()
            splits = source.splits(["horse", "cow"])
            share = {"train": 0.0, "val": 0.0}
            for image in images[:2]:
                kept = source.scan(image, splits.of_image(image), ["horse", "cow"], share).candidates
                for record in source.read(image, kept, 32, SMALL.context)[0]:
                    assert record.image.shape == (32, 32, 3)


def _damaged_archive(content: bytes, is_compressed: bool, generator: Generator) -> bytes:
    """Damaged bytes, or members' headers that are damaged and have a checksum that fits."""
    if is_compressed:
        import gzip

        if generator.integers(2):
            return damage(content, [content], generator)
        return gzip.compress(_damaged_archive(gzip.decompress(content), False, generator), 1)
    if generator.integers(3) == 0:
        return damage(content, [content], generator)
    changed = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [place for member in tar for place in {member.offset, member.offset_data - 512}]
    for _ in range(generator.integers(1, 4)):
        start = starts[generator.integers(len(starts))]
        header = changed[start : start + 512]
        field, width = HEADER_FIELDS[generator.integers(len(HEADER_FIELDS))]
        value = HEADER_VALUES[generator.integers(len(HEADER_VALUES))]
        header[field : field + width] = value[:width].ljust(width, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        changed[start : start + 512] = header
    return bytes(changed)


HEADER_FIELDS = ((0, 100), (0, 100), (124, 12), (124, 12), (156, 1), (156, 1), (157, 100), (257, 8), (345, 155))
HEADER_VALUES = (
    b"", b"0", b"1", b"5", b"L", b"K", b"S", b"x", b"g", b"2", b"00000001000", b"77777777777", b"\x80" + b"\xff" * 11,
    b"\xff" * 12, b"\x80" + bytes(7) + b"\x7f" + bytes(3), b"-1", b"../../x.jpg", b"/etc/passwd", b"a\nb.jpg",
    b"\xff.jpg", b"VOCdevkit/VOC2010/JPEGImages/2010_000001.jpg", b"ustar  \0",
)  # fmt: skip


def read_weights(corpus: Corpus, generator: Generator) -> None:
    """Weights of a network, from a file or from a server."""
    with restored(corpus) as own:
        files = own.files_of(own.weights)
        path = files[generator.integers(len(files))]
        if path.suffix == ".safetensors" and generator.integers(2):
            path.write_bytes(save(damage_tensors(load(own.whole[path]), generator)))
        else:
            path = own.damage_one_of([path], generator)
        source = str(path)
        if path.suffix == ".safetensors" and generator.integers(2):
            served = strangers(corpus)
            shutil.copy(path, served.scratch / "web" / path.name)
            served.server.faults = {}
            served.server.sent.clear()
            source = f"{served.server.url}/{path.name}"
        module = small_module()
        try:
            pretrained.fill(module, source, None)  # type: ignore[arg-type]  # never asked for
        finally:
            shutil.rmtree(strangers(corpus).scratch / "cache", ignore_errors=True)
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


def read_scores(corpus: Corpus, generator: Generator) -> None:
    """Scores in a run's folder, of which a file is damaged, as `evaluate --read --page` shows them."""
    with restored(corpus) as own:
        cost, lines = own.scores / "cost.json", own.scores / "cost.jsonl"
        own.damage_one_of(own.files_of(own.scores), generator)
        cost.rename(lines)
        methods = scoreboard.read(own.scores / "scores.json")
        scoreboard.show("scores", methods, bool(generator.integers(2)))
        write_results_page(own.scores / "page.html", [own.scores / "scores.json"])


def read_shards_again(corpus: Corpus, generator: Generator) -> None:
    """Shards that are written again over a folder with a damaged plan, list or index, and their card."""
    with restored(corpus) as own:
        paths = [path for path in own.files_of(own.shards) if path.suffix != ".tar"]
        path = own.damage_one_of(paths, generator)
        if path.name != "dataset.json" and generator.integers(2):
            (own.shards / "index" / "dataset.json").unlink()
        outcome = write_shards(own.photos, own.shards, SMALL, 1, "photos, parts False, val 0.5")
        assert {item.image for item in outcome.left_out if item.damaged} <= {"damaged.jpg"} or path.name != "plan.json"
        make_card(outcome.dataset)


def read_compact_caches(corpus: Corpus, generator: Generator) -> None:
    """A compact cache with a damaged file; the manifest's hashes fit it or not."""
    with restored(corpus) as own:
        manifest_path = own.cache / "manifest.json"
        path = own.damage_one_of([path for path in own.files_of(own.cache) if path.name != "identity.json"], generator)
        is_whole = path.read_bytes() == own.whole[path]
        if fits := bool(generator.integers(2)) and path != manifest_path:
            manifest = json.loads(own.whole[manifest_path])
            del manifest["digest"]
            if path.name == PROJECTION:
                manifest[PROJECTION_SHA256] = sha256_of_bytes(path.read_bytes())
            else:
                manifest["files"][path.stem] |= {
                    "sha256": sha256_of_bytes(path.read_bytes()),
                    "bytes": path.stat().st_size,
                }
            manifest_path.write_text(json.dumps(manifest | {"digest": sha256_of_json(manifest)}))
        cache = open_cache(own.dataset, "relu5_4", 32, compact=COMPACT)
        rows = cache.open_shard(corpus.entry).read_rows(range(corpus.entry.num_samples))
        assert cache.projection is not None
        assert rows.shape[1] == cache.projection.shape[1]
        if not fits and not is_whole and path.name == PROJECTION:
            raise SilentChange("a projection was read although its hash is wrong")


def read_merges(corpus: Corpus, generator: Generator) -> None:
    """Groups of parts in a YAML file."""
    with restored(corpus) as own:
        path = own.place / "merge.yaml"
        changed: Any = damage_json(MERGES, generator) if generator.integers(2) else MERGES
        text = yaml.safe_dump(changed).replace(DEEP, "[" * 3000 + "]" * 3000).encode("utf-8", "replace")
        path.write_bytes(damage(text, [text], generator) if generator.integers(2) else text)
        merge = open_merge(str(path), PARTS)
        for name in PARTS:
            assert (
                merge.apply(np.arange(4, dtype=np.uint8), name).max() <= len(merge.part_names[name]) or len(PARTS) == 2
            )


READERS: dict[str, Callable[[Corpus, Generator], None]] = {
    "model": read_models,
    "archive": read_archives,
    "weights": read_weights,
    "scores": read_scores,
    "again": read_shards_again,
    "compact": read_compact_caches,
    "merge": read_merges,
}
