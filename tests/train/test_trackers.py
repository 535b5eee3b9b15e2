"""Trackers besides TensorBoard: which there are, and that none of them can end a training."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from commands import PYTHON, metrics, run, training
from PIL import Image

from slotscops.config import Config, load_config
from slotscops.core.errors import UserError
from slotscops.train import optional_tracker, trackers
from slotscops.train.fit import fit
from slotscops.train.optional_tracker import OptionalTracker
from slotscops.train.trackers import choose_trackers

SETTINGS = ("train.eval_every_steps=2", "train.learning_rate=0.003")


def test_wandb_gets_numbers_and_pictures_of_both_starts(toy_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    command = [*training(PYTHON, toy_shards, tmp_path / "run", *SETTINGS), "--tracker", "wandb"]
    for extra in (["train.stop_after_steps=3"], []):
        done = run([*command, *extra], WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    number = (tmp_path / "run" / "wandb_id").read_text()
    assert len(folders) == 2
    assert all(folder.name.endswith(number) for folder in folders)
    for folder in folders:
        assert b"grad_norm" in (folder / f"run-{number}.wandb").read_bytes()
    assert [path for folder in folders for path in folder.rglob("parts*.png")]


def test_all_trackers_of_accelerate_are_known_and_others_are_refused_with_the_list() -> None:
    with pytest.raises(UserError, match=r"--tracker mlfow: unknown; Accelerate .*did you mean 'mlflow'") as refused:
        choose_trackers(["mlfow"], load_config(None))
    for name in {*LOGGER_TYPE_TO_CLASS} - {"tensorboard"}:
        assert name in str(refused.value)


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    for name, command in {"wandb": "pip install 'slotscops[wandb]'", "comet_ml": "pip install comet-ml"}.items():
        with pytest.raises(UserError, match="is not installed") as refused:
            choose_trackers([name], load_config(None))
        assert str(refused.value).endswith(command)

    def missing(_: str) -> Any:
        raise PackageNotFoundError

    monkeypatch.setattr(trackers, "metadata", missing)
    with pytest.raises(UserError, match=r"pip install wandb$"):
        choose_trackers(["wandb"], load_config(None))


class Service(GeneralTracker):
    """A tracker that fails when it is told to."""

    name = "service"
    requires_logging_directory = False
    fails: set[str]
    got: list[Any]

    def __init__(self, project: str) -> None:
        super().__init__(_blank=True)
        self.tracker = self

    def _do(self, what: str, *values: Any) -> None:
        if what in self.fails:
            raise RuntimeError(f"no {what} today\nsecond line")
        self.got.append((what, *values))

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("settings", values["train.learning_rate"])

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._do("log", step, values)

    def log_artifact(self, path: str, folder: str) -> None:
        with Image.open(path) as picture:
            self._do("picture", folder, picture.size)

    def finish(self) -> None:
        self._do("finish")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> type[Service]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "service", Service)
    monkeypatch.setattr(Service, "fails", set(), raising=False)
    monkeypatch.setattr(Service, "got", [], raising=False)
    return Service


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, [f"run_dir={tmp_path}", "train.learning_rate=0.003"])


def test_a_training_whose_tracker_fails_goes_on_and_says_so_once(
    service: type[Service], toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.fails |= {"log", "finish", "picture"}
    small = training([], toy_shards, tmp_path, *SETTINGS, "train.total_steps=2")[1:]
    assert fit(load_config(None, small), trackers=["service"]) == 0
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--tracker service" in line]
    assert len(warnings) == 1
    assert "failed (log: no log today); training goes on" in warnings[0]


def test_a_tracker_gets_settings_numbers_and_pictures(service: type[Service], config: Config) -> None:
    tracker = OptionalTracker("service", config)
    tracker.start()
    tracker.log({"step": 3, "loss": 0.5, "val_nmi": float("nan"), "batch_digest": "x", "val_ari": None}, step=3)
    tracker.log_picture("parts", Image.new("P", (5, 4)), step=3)
    tracker.finish()
    assert service.got == [
        ("start",), ("settings", 0.003), ("log", 3, {"loss": 0.5}), ("picture", "parts", (5, 4)), ("finish",)
    ]  # fmt: skip


def test_a_service_that_comes_back_gets_numbers_again_and_is_left_alone_meanwhile(
    service: type[Service], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(optional_tracker.time, "monotonic", lambda: now[0])
    service.fails |= {"start"}
    tracker = OptionalTracker("service", config)
    for step in range(7):  # tried at 0 s, 60 s and, because it failed twice, again at 180 s
        if step == 4:
            service.fails.clear()
        tracker.start() if step == 0 else tracker.log({"loss": 1.0}, step=step)
        now[0] += 30.0
    now[0] += 30.0
    tracker.log({"loss": 1.0}, step=8)
    assert [what for what, *_ in service.got] == ["start", "settings", "log", "log"]
    assert [values[0] for what, *values in service.got if what == "log"] == [6, 8]
