"""Quickly made runs and photos, for tests of what comes after training."""

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.config import Config, load_config, to_mapping, write_config
from slotscops.features.teacher import Teacher
from slotscops.segment.segmenter import FoundParts, load
from slotscops.train.build import build_model
from slotscops.train.run import checkpoint


def save_run(folder: Path, config: Config) -> Path:
    """A run's folder with one checkpoint of the untrained network."""
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    state = checkpoint.State(1, 8, to_mapping(config), "", "", "random:0", _fingerprint(), {"nmi": 0.25})
    tensors = {"model": build_model(config, 512).state_dict(), "optimizer": {}, "rng": {}}
    checkpoint.save_checkpoint(folder / "checkpoints", tensors, state, keep=1)
    return folder


def publish(run: Path) -> Path:
    """The folder `published` beside a run, with its published model."""
    folder = run.parent / "published"
    load(run).save_pretrained(folder)
    return folder


@functools.cache
def _fingerprint() -> str:
    return Teacher("relu5_4", "random:0").fingerprint


def save_resnet_run(folder: Path, *settings: str) -> Path:
    resnet = ["encoder.name=resnet18", "encoder.weights=random:0", "data.size=64"]
    return save_run(folder, load_config(None, [*resnet, *settings]))


def save_feature_run(folder: Path, *settings: str) -> Path:
    return save_run(folder, load_config(None, ["encoder.name=features", "data.size=64", *settings]))


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A photo of large coloured blots."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def parts_of_labels(labels: NDArray[np.uint8], num_slots: int, class_name: str | None = None) -> FoundParts:
    """Found parts whose label map is the given (H, W) one."""
    height, width = labels.shape
    side = max(labels.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = labels
    logits = 8 * (square == np.arange(num_slots)[:, None, None]).astype(np.float32)
    return FoundParts(np.zeros((height, width, 3), np.uint8), logits, class_name, np.ones((3, 2, 2), np.float32))
