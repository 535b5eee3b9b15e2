"""Logs a run's numbers and pictures through Accelerate: always to TensorBoard, on request to Weights & Biases."""

import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from slotscops.config import Config, to_mapping
from slotscops.core.errors import UserError
from slotscops.core.files import write_bytes
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.side_files import SideFiles

OPTIONAL = ("wandb",)  # what --tracker takes
_TENSORBOARD = "tensorboard"  # also the name of its folder in the run's folder


def choose_trackers(names: Sequence[str], config: Config) -> list[Any]:
    """The value for Accelerate's argument `log_with`.

    Args:
        names: some of `OPTIONAL`.

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
    _silence_writer_threads()
    # What was logged after this step is purged, because it is logged again.
    accelerator.init_trackers(_TENSORBOARD, init_kwargs={_TENSORBOARD: {"purge_step": step + 1}})


def log_numbers(accelerator: Accelerator, files: SideFiles, row: dict[str, Any], step: int) -> None:
    """Logs numbers to all trackers. What cannot be written waits in `files`."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            files.write(f"{tracker.name} events", partial(_log, tracker, "log", row, step))


def log_picture(accelerator: Accelerator, files: SideFiles, name: str, picture: Image.Image, step: int) -> None:
    """Logs a picture to all trackers; call it on the main process. What cannot be written waits in `files`."""
    for tracker in accelerator.trackers:
        arguments = {"dataformats": "NHWC"} if tracker.name == _TENSORBOARD else {}
        images = {name: np.asarray(picture.convert("RGB"))[None]}
        files.write(f"{tracker.name} events", partial(_log, tracker, "log_images", images, step, **arguments))


def close_trackers(accelerator: Accelerator) -> None:
    """Ends all trackers, even if what they still hold cannot be written."""
    for tracker in accelerator.trackers:
        with suppress(OSError):
            tracker.finish()
    accelerator.trackers = []


def _log(tracker: Any, method: str, values: dict[str, Any], step: int, **arguments: Any) -> None:
    """Logs the values of one step. TensorBoard's writer is useless once it has failed: the next try opens a new one."""
    if not isinstance(tracker, TensorBoardTracker):
        getattr(tracker, method)(values, step=step, **arguments)
        return
    try:
        if tracker.writer is None:
            tracker.init_kwargs["purge_step"] = step  # what was written of this step is purged: it is logged again
            tracker.start()
        getattr(tracker, method)(values, step=step, **arguments)
        tracker.writer.flush()
    except OSError:
        if tracker.writer is not None:
            with suppress(OSError):
                tracker.writer.close()
        tracker.writer = None
        for path in Path(tracker.logging_dir).glob("events.*"):
            with suppress(OSError):
                if path.stat().st_size == 0:  # begun on the full disk
                    path.unlink()
        raise


def _silence_writer_threads() -> None:
    """Keeps Python from printing the traceback of TensorBoard's thread; its error is raised where a step is logged."""
    plain = threading.excepthook
    if getattr(plain, "is_of_slotscops", False):
        return

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and "AsyncWriter" in type(failure.thread).__name__):
            plain(failure)

    hook.is_of_slotscops = True  # type: ignore[attr-defined]
    threading.excepthook = hook
