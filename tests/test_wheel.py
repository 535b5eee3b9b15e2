"""The wheel alone, installed outside the checkout, trains on toy photos, scores the run and segments a photo."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from commands import ROOT, TIMEOUT_S

_SMALL = ["data.size=64", "data.num_workers=1", "train.total_steps=4", "train.batch_size=4", "train.eval_every_steps=0"]
_LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def _run(folder: Path, *command: str | Path) -> str:
    """Runs a command in the folder without the checkout on Python's path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, because a build writes into its source folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("slotscops", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # What `pip wheel` calls, without the isolated environment for which it would download setuptools.
    _run(source, sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment that holds the wheel, and sees the other packages of this environment."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Python does not follow .pth files of folders named in one, so an editable install of the checkout stays unseen.
    (packages / "others.pth").write_text("\n".join(sorted(ours)) + "\n")
    pip = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--no-warn-script-location",
    ]
    _run(folder, folder / "bin" / "python", *pip, wheel)
    return folder / "bin"


def test_the_wheel_goes_from_toy_photos_to_scores_and_to_parts_of_a_photo(installed: Path, tmp_path: Path) -> None:
    where = _run(tmp_path, installed / "python", "-c", "import slotscops; print(slotscops.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)

    slotscops = installed / "slotscops"
    toy = ["--toy", "--toy-train", "14", "--toy-val", "6", "--size", "64", "--teacher-weights", "random:0"]
    _run(tmp_path, slotscops, "shard", *toy, "--out", "shards/toy")
    _run(tmp_path, slotscops, "train", "--config", "toy", *_SMALL)
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()
    scores = _run(tmp_path, slotscops, "evaluate", "--checkpoint", "runs/toy", "--json", "scores.json")
    assert "runs/toy" in scores
    assert '"nmi"' in (tmp_path / "scores.json").read_text()
    photo = next((tmp_path / "shards" / "toy" / "photos").rglob("*.jpg"))
    load = f"import slotscops; print(slotscops.load('runs/toy', 'random:0').segment({str(photo)!r}).labels.shape)"
    assert _run(tmp_path, installed / "python", "-c", load).startswith("(")


def test_the_wheel_trains_under_accelerate_launch(installed: Path, tmp_path: Path, toy_shards: Path) -> None:
    launch = [installed / "python", "-m", "accelerate.commands.launch", *_LAUNCH]
    _run(tmp_path, *launch, "-m", "slotscops.train", "--config", "toy", f"data.shards={toy_shards}", *_SMALL)
    assert (tmp_path / "runs" / "toy" / "checkpoints" / "step-4" / "model.safetensors").is_file()
