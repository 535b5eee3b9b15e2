"""Quickly made runs and photos, for tests of what comes after training."""

from pathlib import Path

import numpy as np
from PIL import Image

from slotscops.config import Config, load_config, to_mapping, write_config
from slotscops.features.teacher import Teacher
from slotscops.train.build import build_model
from slotscops.train.run import checkpoint


def save_run(folder: Path, config: Config) -> Path:
    """A run's folder with one checkpoint of the untrained network."""
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    fingerprint = Teacher("relu5_4", "random:0").fingerprint
    state = checkpoint.State(1, 8, to_mapping(config), "", "", "random:0", fingerprint, {"nmi": 0.25})
    tensors = {"model": build_model(config, 512).state_dict(), "optimizer": {}, "rng": {}}
    checkpoint.save_checkpoint(folder / "checkpoints", tensors, state, keep=1)
    return folder


def save_resnet_run(folder: Path) -> Path:
    return save_run(folder, load_config(None, ["encoder.name=resnet18", "encoder.weights=random:0", "data.size=64"]))


def save_feature_run(folder: Path, *settings: str) -> Path:
    return save_run(folder, load_config(None, ["encoder.name=features", "data.size=64", *settings]))


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A photo of large coloured blots."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)
