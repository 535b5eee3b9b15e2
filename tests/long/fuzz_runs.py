"""Readers of what comes from a user's disk or a stranger: photos, label maps, settings, runs, checkpoints, servers."""

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_readers import DEEP, VALUES, Corpus, Generator, SilentChange, damage, damage_json, damaged_json
from PIL import Image
from safetensors.torch import load, load_file, save
from servers import web_server

from slotscops.config import config_from_mapping, load_config, setting_names, to_mapping, to_yaml
from slotscops.core import transfer
from slotscops.core.files import sha256_of_file
from slotscops.core.photos import read_photo, to_array
from slotscops.datasets.label_maps import read_label_map, read_part_names
from slotscops.features.cache import open_cache
from slotscops.loader.plan import ORDER
from slotscops.loader.split import Split
from slotscops.model.saved_names import saved_parameter_names
from slotscops.shard.index import open_dataset
from slotscops.train.build import build_model, build_optimizer, load_model
from slotscops.train.damage import DamageLedger
from slotscops.train.run import checkpoint
from slotscops.train.run.folder import RunFolder, check_same_run, read_config
from slotscops.train.run.page import write_page
from slotscops.train.run.side_files import SideFiles

SIZE = (48, 32)
NAMES = "head\ntorso\n3 legs\n"
RUN_FILES = ("metrics.jsonl", "config.yaml", "status.json", "evaluation.json", "machine.json", "damaged.json",
             "owner.json", "checkpoints/best.txt")  # fmt: skip
TENSOR_KINDS = ("missing", "other name", "other values", "other type", "other shape", "more")
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
FAULTS = ("", "", "", "drop", "503", "404", "flip", "short", "whole", "gzip", "endless")


class Strangers:
    """Whole photos, label maps, settings, a run and a server; the damaged ones take their place one after the other."""

    def __init__(self, corpus: Corpus, scratch: Path) -> None:
        self.scratch = scratch / "strangers"
        self.scratch.mkdir()
        self.photos, self.labels = make_photos(), make_label_maps()
        self.config = load_config(None, ["encoder.name=features", "data.size=32", f"data.shards={corpus.shards}"])
        self.run = self.scratch / "run"
        self.network = build_model(self.config, corpus.cache.shape[0])
        self.optimizer = build_optimizer(self.config, self.network)
        self.checkpoint = self._make_run(corpus)
        self.whole = {path: path.read_bytes() for path in self.run.rglob("*") if path.is_file()}
        self.tensors = {name: load_file(self.checkpoint / f"{name}.safetensors") for name in ("model", "optimizer")}
        self._open = ExitStack()  # until the process ends
        self.server = self._open.enter_context(web_server(Path(shutil.copytree(corpus.shards, self.scratch / "web"))))
        self.served = {path: path.read_bytes() for path in self.server.folder.rglob("*") if path.is_file()}
        os.environ["SLOTSCOPS_CACHE"] = str(self.scratch / "cache")
        transfer.PAUSES = (0.0,) * 2
        self.listing = self._list()

    def _make_run(self, corpus: Corpus) -> Path:
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.run.mkdir()
        contents: dict[str, Any] = {name: {"step": 1, "a": {"step": 1, "what": "b"}} for name in RUN_FILES}
        for name in RUN_FILES[2:7]:
            (self.run / name).write_text(json.dumps(contents[name]))
        (self.run / "config.yaml").write_text(to_yaml(self.config))
        rows = [{"step": step, "loss": 0.5, "val_nmi": 0.1, "slot_share_0": 1.0, "lr_head": 1e-4} for step in (1, 2, 3)]
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        state = checkpoint.State(
            1, 8, to_mapping(self.config), corpus.dataset.digest, corpus.cache.digest, order=ORDER
        )  # fmt: skip
        tensors = {
            "model": self.network.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, saved_parameter_names(self.network)),
            "rng": checkpoint.rng_tensors(0),
        }
        path = checkpoint.save_checkpoint(self.run / "checkpoints", tensors, state, keep=1)
        (self.run / "checkpoints" / "best.txt").write_text("step-1\n")
        saved = checkpoint.load_checkpoint(path)  # undamaged, it is taken
        check_same_run(saved.state, self.config, corpus.dataset, corpus.cache, path)
        checkpoint.restore(saved, self.network, None, self.optimizer, 0)
        return path

    def _list(self) -> list[str]:
        return sorted(path.name for path in [*self.scratch.iterdir(), *self.scratch.parent.iterdir()])

    def check_nothing_lies_elsewhere(self) -> None:
        if self._list() != self.listing:
            raise SilentChange(f"wrote outside: {sorted(set(self._list()) ^ set(self.listing))}")

    def restore_run(self) -> None:
        for path in [path for path in self.run.rglob("*") if path.is_file() and path not in self.whole]:
            path.unlink()
        for path, content in self.whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def make_photos() -> list[bytes]:
    """JPEGs with Exif blocks that turn them, and photos of other formats and modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    photo, made = Image.fromarray(pixels), []
    for orientation in (1, 6, 8):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F], exif[0x9003] = orientation, "maker", "2026:01:01 00:00:00"
        exif.get_ifd(0x8825)[2] = (48.0, 8.0, 11.0)
        made += [_saved(photo, kind, exif=exif) for kind in ("JPEG", "JPEG", "TIFF", "WEBP", "PNG")]
    made += [_saved(photo.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    return [*made, _saved(photo, "GIF"), _saved(photo, "BMP"), _saved(photo.convert("F"), "TIFF")]


def make_label_maps() -> list[bytes]:
    labels = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE[::-1]) // 64 % 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [_saved(labels, "PNG"), _saved(labels.convert("P"), "PNG"), _saved(labels, "PNG", exif=exif)]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_right_checksums(png: bytes) -> bytes:
    """The chunks of a PNG with checksums that fit them, so that the readers behind the checksums are reached."""
    content, place = bytearray(png), 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        content[end : end + 4] = zlib.crc32(content[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(content[: len(png)])


def strangers(corpus: Corpus) -> Strangers:
    """Made once a process, before its first input."""
    if not hasattr(corpus, "strangers"):
        vars(corpus)["strangers"] = Strangers(corpus, corpus.shards.parent)
    made: Strangers = vars(corpus)["strangers"]
    return made


# ---- readers -----------------------------------------------------------------------------------------------------


def read_photos(corpus: Corpus, generator: Generator) -> None:
    own = strangers(corpus)
    path = own.scratch / "web" / "photo"
    content = damage(own.photos[generator.integers(len(own.photos))], own.photos, generator)
    path.write_bytes(with_right_checksums(content) if generator.integers(2) else content)
    photo = read_photo(path)
    assert photo.mode == "RGB"
    assert to_array(photo).shape == (photo.height, photo.width, 3)


def read_label_maps(corpus: Corpus, generator: Generator) -> None:
    own = strangers(corpus)
    path, names = own.scratch / "web" / "labels.png", own.scratch / "web" / "parts.txt"
    content = damage(own.labels[generator.integers(len(own.labels))], own.labels, generator)
    path.write_bytes(with_right_checksums(content) if generator.integers(4) else content)
    text = NAMES.encode("utf-16" if generator.integers(2) else "utf-8")
    names.write_bytes(damage(text, own.labels, generator) if generator.integers(2) else text)
    found = read_label_map(path, SIZE, int(generator.integers(1, 9)), read_part_names(names))
    assert found.part_labels.shape == found.object_mask.shape == SIZE[::-1]


def read_settings(corpus: Corpus, generator: Generator) -> None:
    """A damaged YAML file, or one with other values, and an override with a value of any kind."""
    own = strangers(corpus)
    path = own.scratch / "web" / "settings.yaml"
    mapping = to_mapping(own.config)
    if generator.integers(2):
        mapping = damage_json(mapping, generator)
    text = yaml.safe_dump(mapping).replace(DEEP, "[" * 3000 + "]" * 3000).encode("utf-8", "replace")
    path.write_bytes(damage(text, [text], generator) if generator.integers(2) else text)
    names, value = setting_names(), VALUES[generator.integers(len(VALUES))]
    overrides = [f"{names[generator.integers(len(names))]}={value}"] if generator.integers(2) else []
    config = load_config(path, overrides)
    again = config_from_mapping(yaml.safe_load(to_yaml(config)), "again")
    if to_yaml(again) != to_yaml(config):
        raise SilentChange("settings differ when written and read again")


def read_checkpoints(corpus: Corpus, generator: Generator) -> None:
    """A damaged file, with the hash of the manifest or with one that fits it, restored into network and optimizer."""
    own = strangers(corpus)
    files = sorted(path for path in own.checkpoint.iterdir() if path.name != "manifest.json")
    path = files[generator.integers(len(files))]
    try:
        path.write_bytes(_damaged_tensors(own.whole[path], generator))
        is_whole = path.read_bytes() == own.whole[path]
        if fits := bool(generator.integers(4)):
            manifest = json.loads(own.whole[own.checkpoint / "manifest.json"])
            manifest[path.name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            (own.checkpoint / "manifest.json").write_text(json.dumps(manifest))
        if generator.integers(2):
            load_model(own.run)
        saved = checkpoint.load_checkpoint(own.checkpoint)
        if not fits and not is_whole:
            raise SilentChange(f"{path.name} was read although its hash is wrong")
        check_same_run(saved.state, own.config, corpus.dataset, corpus.cache, own.checkpoint)
        checkpoint.restore(saved, own.network, None, own.optimizer, 0)
        own.optimizer.step()  # walks through all of its state
        json.dumps(asdict(saved.state))
    finally:
        own.restore_run()


def _damaged_tensors(content: bytes, generator: Generator) -> bytes:
    """Damaged bytes, or a safetensors file whose header says something else of the same tensors."""
    length = int.from_bytes(content[:8], "little")
    if length >= len(content):  # JSON
        return damage(content, [content], generator) if generator.integers(2) else damaged_json(content, generator)
    kind = generator.integers(3)
    if kind == 0:
        return damage(content, [content], generator)
    if kind == 1:
        return save(damage_tensors(load(content), generator))
    header = damaged_json(content[8 : 8 + length], generator)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damage_tensors(tensors: dict[str, torch.Tensor], generator: Generator) -> dict[str, torch.Tensor]:
    """The same tensors, of which one to three are missing, have another name, shape or type, or strange values."""
    changed = dict(tensors)
    for _ in range(generator.integers(1, 4)):
        if not changed:
            break
        name = sorted(changed)[generator.integers(len(changed))]
        tensor = changed.pop(name)
        kind = TENSOR_KINDS[generator.integers(len(TENSOR_KINDS))]
        if kind == "other name":
            changed[sorted(tensors)[generator.integers(len(tensors))]] = tensor
        elif kind == "other values":  # 6e4 is as large as float16 takes
            value = (0, -1, 6e4, math.nan, math.inf)[generator.integers(5)] if tensor.is_floating_point() else 99
            changed[name] = torch.full_like(tensor, value)
        elif kind == "other type":
            changed[name] = tensor.to(DTYPES[generator.integers(len(DTYPES))])
        elif kind == "other shape":
            shapes = [
                tensor.flatten(),
                tensor[None],
                tensor.flatten()[:0],
                tensor.flatten()[:1],
                tensor.new_zeros(3, 2),
            ]
            changed[name] = shapes[generator.integers(len(shapes))].contiguous()
        elif kind == "more":
            changed |= {name: tensor, f"{name}.more": tensor.clone()}
    return changed


def read_run_folders(corpus: Corpus, generator: Generator) -> None:
    """A run's folder with a damaged file, as its start, its page and a reader of its model find it."""
    own = strangers(corpus)
    path = own.run / RUN_FILES[generator.integers(len(RUN_FILES))]
    content = own.whole[path]
    is_json = path.suffix in (".json", ".jsonl") and generator.integers(2)
    changed = _damaged_lines(content, generator) if is_json else damage(content, [content], generator)
    path.write_bytes(changed)
    folder = RunFolder(own.run)
    try:
        with redirect_stderr(io.StringIO()):
            folder.find_checkpoint("auto")
            checkpoint.best_checkpoint(folder.checkpoints)
            DamageLedger(corpus.dataset, "train", 1.0, folder, SideFiles()).reload(2)
            folder.open(own.config, 1)
            write_page(folder)
            path.write_bytes(changed)
            read_config(own.checkpoint)
            write_page(folder)
    finally:
        folder.release()
        own.restore_run()
        own.check_nothing_lies_elsewhere()


def _damaged_lines(content: bytes, generator: Generator) -> bytes:
    """JSON in one line, or one JSON a line, of which one line is damaged."""
    lines = content.splitlines(keepends=True)
    number = generator.integers(len(lines))
    lines[number] = damaged_json(lines[number], generator) + b"\n"
    return b"".join(lines)


def read_servers(corpus: Corpus, generator: Generator) -> None:
    """A data set of a server that serves a damaged file, or breaks off; what is read is what the folder gives."""
    own = strangers(corpus)
    files = sorted(path for path in own.served if path.suffix in (".json", ".tar", ".safetensors"))
    path = files[generator.integers(len(files))]
    name = str(path.relative_to(own.server.folder))
    if generator.integers(2):
        path.write_bytes(damage(own.served[path], list(own.served.values()), generator))
    own.server.faults = {name: [FAULTS[generator.integers(len(FAULTS))] for _ in range(3)]}
    own.server.sent.clear()
    try:
        with redirect_stderr(io.StringIO()):
            dataset = open_dataset(own.server.url)
            split = Split(dataset, "train", open_cache(dataset, "relu5_4", 32), with_labels=True)
            batch = split.read(np.arange(min(len(split), 3)))
        if dataset.digest == corpus.dataset.digest and not torch.equal(batch.images, corpus.photos[: len(batch)]):
            raise SilentChange(f"{name}: other photos came")
    finally:
        path.write_bytes(own.served[path])
        shutil.rmtree(own.scratch / "cache", ignore_errors=True)
        own.check_nothing_lies_elsewhere()


READERS: dict[str, Callable[[Corpus, Generator], None]] = {
    "photo": read_photos,
    "labels": read_label_maps,
    "settings": read_settings,
    "checkpoint": read_checkpoints,
    "run": read_run_folders,
    "server": read_servers,
}
