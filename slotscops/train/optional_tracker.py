"""A tracker besides TensorBoard, such as MLflow: if its service fails, the training goes on and tries it again later.

Accelerate's trackers differ in what they take, and this file knows in what. Of one that it does not name, Accelerate's
common methods are used. Numbers go to all; pictures to those that take pictures or files.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from slotscops.config import Config, to_mapping
from slotscops.core import console
from slotscops.core.errors import first_line, shorten
from slotscops.core.files import write_bytes
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.page import flat_settings

_PROJECT = "slotscops"
_PAUSE_S = 60.0  # after a failure; doubled by each that follows
_LONGEST_PAUSE_S = 3600.0
_ONE_PICTURE = ("aim", "clearml")  # their `log_images` takes one picture of a name, the others' a list of pictures
# MLflow's own defaults wait for a server that is gone for many minutes, in which no step is taken.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class OptionalTracker(GeneralTracker):  # type: ignore[misc]  # Accelerate has no types
    """One of Accelerate's trackers, of which no error leaves. It works on the main process only."""

    requires_logging_directory = False
    main_process_only = True

    def __init__(self, name: str, config: Config) -> None:
        """
        Args:
            name: a key of Accelerate's `LOGGER_TYPE_TO_CLASS`. The tracker's package is imported by `start`.
        """
        super().__init__(_blank=True)
        self.name = name
        self._folder = RunFolder.of(config)
        self._settings = to_mapping(config)
        self._plain: Any = None
        self._told = False
        self._pause_s, self._next_try = _PAUSE_S, 0.0

    @property
    def tracker(self) -> Any:
        """The tracker's own object, such as a run of Weights & Biases; None if it could not be started."""
        return None if self._plain is None else self._plain.tracker

    def start(self) -> None:
        """Begins a run there, or goes on with the one that an earlier start of this run has begun."""
        self._try("start", lambda: None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Does nothing, because `start` stores the settings."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs the numbers among the values, but for NaN, which not every service takes, and `step`, which all know."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and value == value}
        numbers.pop("step", None)
        self._try("log", lambda: self._plain.log(numbers, step=step, **kwargs))

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Logs a picture, if the tracker takes pictures or files."""
        self._try("pictures", lambda: self._log_picture(name, picture.convert("RGB"), step))

    def finish(self) -> None:
        """Ends the run there."""
        if self._plain is not None:
            self._try("finish", lambda: self._plain.finish())

    def _try(self, what: str, work: Callable[[], None]) -> None:
        """Starts the tracker if it is not yet started, and does the work. After a failure it rests for a while."""
        if not PartialState().is_main_process or time.monotonic() < self._next_try:
            return
        try:
            if self._plain is None:
                self._start()
            work()
        except Exception as error:  # whatever the many trackers raise; training needs none of them
            if what != "pictures":  # numbers may get there all the same
                self._next_try = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            if not self._told:
                reason = f"{what}: {shorten(first_line(error))}"
                console.warn(
                    f"WARNING: --tracker {self.name} failed ({reason}); training goes on, and it is tried again later. "
                    "metrics.jsonl and TensorBoard have all numbers"
                )
            self._told = True
        else:
            self._pause_s = _PAUSE_S

    def _start(self) -> None:
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        folder = [str(self._folder.path)] if kind.requires_logging_directory else []
        number = self._folder.tracker_id(self.name)
        is_new = not number.exists()
        plain = kind(_PROJECT, *folder, **_arguments(self.name, self._folder, self._settings))
        plain.start()
        self._plain = plain
        if self.name == "mlflow":
            write_bytes(number, plain.tracker.info.run_id.encode())
        if is_new and self.name not in _TAKE_SETTINGS:
            self._try("settings", lambda: plain.store_init_configuration(flat_settings(self._settings)))

    def _log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        if hasattr(self._plain, "log_images"):
            pixels = np.asarray(picture)  # (H, W, 3) uint8
            self._plain.log_images({name: pixels if self.name in _ONE_PICTURE else pixels[None]}, step=step)
        elif hasattr(self._plain, "log_artifact"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"step-{step}.png"
                picture.save(path)
                self._plain.log_artifact(str(path), name)


_TAKE_SETTINGS = ("wandb", "trackio")  # when they start


def _arguments(name: str, folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments besides the project, by which the tracker names the run and goes on with an earlier start of it."""
    run, number = folder.path.resolve().name, folder.tracker_id(name)
    if name == "wandb":
        if not number.exists():
            write_bytes(number, uuid.uuid4().hex[:12].encode())
        return {
            "name": run,
            "dir": str(folder.path),
            "config": settings,
            "resume": "allow",
            "id": number.read_text(),
        }
    if name == "trackio":
        return {"name": run, "config": settings, "resume": "allow"}
    if name == "mlflow":
        return {"run_id": number.read_text()} if number.exists() else {"run_name": run}
    if name == "dvclive":
        return {"dir": str(folder.path / "dvclive"), "resume": True}
    return {}
