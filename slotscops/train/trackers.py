"""Logs a run's numbers and pictures through Accelerate: always to TensorBoard, on request to other trackers."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate import __version__ as accelerate_version
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from slotscops.config import Config
from slotscops.core.errors import UserError, suggest
from slotscops.train.optional_tracker import OptionalTracker
from slotscops.train.run.side_files import SideFiles

_TENSORBOARD = "tensorboard"  # also the name of its folder in the run's folder


def known_trackers() -> list[str]:
    """What `--tracker` takes: all that the installed Accelerate knows, but for TensorBoard, which is always on."""
    return sorted({*LOGGER_TYPE_TO_CLASS} - {_TENSORBOARD})


def choose_trackers(names: Sequence[str], config: Config) -> list[Any]:
    """The value for Accelerate's argument `log_with`.

    Args:
        names: some of `known_trackers()`.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    for name in names:
        if name not in known_trackers():
            raise UserError(
                f"--tracker {name}: unknown; Accelerate {accelerate_version} knows {', '.join(known_trackers())} "
                f"(TensorBoard is always on){suggest(name, known_trackers())}"
            )
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise UserError(f"--tracker {name}: is not installed; {_how_to_install(name)}")
    return [_TENSORBOARD, *(OptionalTracker(name, config) for name in dict.fromkeys(names))]


def _how_to_install(name: str) -> str:
    """The command that installs a tracker: as an extra of this package if it is one, else the package of its name."""
    with suppress(PackageNotFoundError):  # run from a checkout that is not installed
        if name in (metadata("slotscops").get_all("Provides-Extra") or []):
            return f"pip install 'slotscops[{name}]'"
    return f"pip install {name.replace('_', '-')}"


def open_trackers(accelerator: Accelerator, step: int) -> None:
    """Starts the trackers. Logs of an earlier start of the run are continued from `step`."""
    _silence_writer_threads()
    # What was logged after this step is purged, because it is logged again.
    accelerator.init_trackers(_TENSORBOARD, init_kwargs={_TENSORBOARD: {"purge_step": step + 1}})


def log_numbers(accelerator: Accelerator, files: SideFiles, row: dict[str, Any], step: int) -> None:
    """Logs numbers to all trackers. What cannot be written to TensorBoard waits in `files`."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if isinstance(tracker, OptionalTracker):
                tracker.log(row, step)
            else:
                files.write(f"{tracker.name} events", partial(_log, tracker, "log", row, step))


def log_picture(accelerator: Accelerator, files: SideFiles, name: str, picture: Image.Image, step: int) -> None:
    """Logs a picture to all trackers; call it on the main process. `files` is as in `log_numbers`."""
    for tracker in accelerator.trackers:
        if isinstance(tracker, OptionalTracker):
            tracker.log_picture(name, picture, step)
            continue
        images = {name: np.asarray(picture.convert("RGB"))[None]}
        files.write(f"{tracker.name} events", partial(_log, tracker, "log_images", images, step, dataformats="NHWC"))


def close_trackers(accelerator: Accelerator) -> None:
    """Ends all trackers, even if what they still hold cannot be written."""
    for tracker in accelerator.trackers:
        with suppress(OSError):
            tracker.finish()
    accelerator.trackers = []


def _log(tracker: TensorBoardTracker, method: str, values: dict[str, Any], step: int, **arguments: Any) -> None:
    """Logs the values of one step. TensorBoard's writer is useless once it has failed: the next try opens a new one."""
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
