"""Fixtures shared by the tests. Real data is used where SLOTSCOPS_DATA points to it."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with pascal_part/, faces/ and weights/, or the test is skipped: the project must work without it."""
    folder = os.environ.get("SLOTSCOPS_DATA")
    if not folder:
        pytest.skip("needs real photos and weights: set SLOTSCOPS_DATA to their folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
