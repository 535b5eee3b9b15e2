"""With SLOTSCOPS_NO_SKIPS=1, a session that skipped a test fails."""

from pathlib import Path

import pytest
import skips
from commands import PYTHON, run


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("environment", "reason", "status"),
    [
        ({"SLOTSCOPS_NO_SKIPS": "1"}, "needs Chromium", 1),
        ({"SLOTSCOPS_NO_SKIPS": "0"}, "needs Chromium", 0),
        ({"SLOTSCOPS_NO_SKIPS": "1", "SLOTSCOPS_DATA": ""}, skips.NO_DATA, 0),
        ({"SLOTSCOPS_NO_SKIPS": "1", "SLOTSCOPS_DATA": "data"}, skips.NO_DATA, 1),
    ],
    ids=["a program missing", "skips allowed", "no data", "data present"],
)
def test_a_skipped_test_fails_the_session(
    tmp_path: Path, environment: dict[str, str], reason: str, status: int, workers: str
) -> None:
    body = f"import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip({reason!r})\n"
    (tmp_path / "test_small.py").write_text(body)
    plugins = ["-p", "skips", "-p", "no:cacheprovider", "-n", workers]
    command = [*PYTHON, "-m", "pytest", *plugins, f"--rootdir={tmp_path}", str(tmp_path)]
    done = run(command, PYTHONPATH=str(Path(skips.__file__).parent), **environment)
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert (f"test_small.py::test_two: Skipped: {reason}" in done.stdout) == (status == 1)
