"""Logs a run's numbers and pictures through Accelerate: always to TensorBoard, on request to Weights & Biases."""

import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from PIL import Image

from slotscops.config import Config, to_mapping
from slotscops.core.errors import UserError
from slotscops.core.files import write_bytes
from slotscops.train.run.folder import RunFolder

OPTIONAL = ("wandb",)  # what --tracker takes
_TENSORBOARD = "tensorboard"  # also the name of its folder in the run's folder


def choose_trackers(names: Sequence[str], config: Config) -> list[Any]:
    """What Accelerate's `log_with` takes.

    Args:
        names: of `OPTIONAL`.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    chosen: list[Any] = [_TENSORBOARD]
    for name in names:
        if name not in OPTIONAL:
            raise UserError(f"--tracker {name}: unknown; known are {', '.join(OPTIONAL)} (TensorBoard is always on)")
        if find_spec(name) is None:
            raise UserError(f"--tracker {name}: is not installed; pip install 'slotscops[{name}]'")
        folder = RunFolder.of(config)
        settings = {"name": folder.path.resolve().name, "dir": str(folder.path), "config": to_mapping(config)}
        # It is started and gets its id in `open_trackers`, when the run's folder exists.
        chosen.append(WandBTracker("slotscops", resume="allow", **settings))
    return chosen


def open_trackers(accelerator: Accelerator, folder: RunFolder, step: int) -> None:
    """Starts the trackers. Logs of an earlier start of the run are continued from `step`."""
    for tracker in accelerator.log_with:
        if isinstance(tracker, WandBTracker) and accelerator.is_main_process:
            if not folder.wandb_id.exists():
                write_bytes(folder.wandb_id, uuid.uuid4().hex[:12].encode())
            tracker.init_kwargs["id"] = folder.wandb_id.read_text()
    # What was logged after this step is purged, because it is logged again.
    accelerator.init_trackers(_TENSORBOARD, init_kwargs={_TENSORBOARD: {"purge_step": step + 1}})


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Logs a picture to all trackers; call it on the main process."""
    for tracker in accelerator.trackers:
        arguments = {"dataformats": "NHWC"} if tracker.name == _TENSORBOARD else {}
        tracker.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step=step, **arguments)
