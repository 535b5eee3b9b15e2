"""Fixtures shared by the tests. Real data is used where SLOTSCOPS_DATA points to it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skips
import torch
from filelock import FileLock
from skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

from slotscops.shard import __main__ as shard

TOY = ["--toy", "--toy-train", "14", "--toy-val", "6", "--size", "64", "--samples-per-shard", "5", "--workers", "1"]


# Their tests start processes, wait for them, and take the longest.
LONG_FIRST = (
    "long",
    "benchmark",
    "train",
    "evaluate",
    "shard/test_remote",
    "segment/test_export",
    "test_wheel",
    "test_tour",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long tests first, so that no worker is still busy with one after the others have nothing left to do."""
    root = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(root).as_posix().startswith(LONG_FIRST))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with pascal_part/, faces/ and weights/, or the test is skipped: the project must work without it."""
    folder = os.environ.get("SLOTSCOPS_DATA")
    if not folder:
        pytest.skip(skips.NO_DATA)
    return Path(folder)


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy data set of 64 px crops in several shards, with features of a random teacher. Not to be changed.

    One worker of pytest makes it for all.
    """
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "toy"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "made").exists():
            command = [*TOY, "--out", str(folder / "shards"), "--teacher-weights", "random:0"]
            assert shard.main(command) == 0
            (folder / "made").touch()
    return folder / "shards"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system; nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
