"""launch/tour.ipynb runs from its first cell to its last, with an untrained teacher and few steps."""

import sys
from pathlib import Path

import pytest
from commands import ROOT, TIMEOUT_S

TOUR = ROOT / "launch" / "tour.ipynb"
MAX_BYTES = 200 * 1000


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOUR": "tiny", "JUPYTER_PLATFORM_DIRS": "1", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no start-up files of the user
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))  # nor kernels
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    tour = nbformat.read(TOUR, as_version=4)
    tour.cells.append(
        nbformat.v4.new_code_cell("import sys\nprint(sys.executable, len(unseen), found[0].maps.shape[0])")
    )
    nbclient.NotebookClient(tour, timeout=TIMEOUT_S, kernel_name="python3").execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in tour.cells]
    assert texts[-1].split() == [sys.executable, "6", "6"]
    assert any("THE TEACHER IS UNTRAINED" in text for text in texts)
    pictures = [
        output for cell in tour.cells for output in cell.get("outputs", []) if "image/jpeg" in output.get("data", {})
    ]
    assert len(pictures) == 3


def test_the_tour_is_small_and_holds_no_output_but_pictures() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert TOUR.stat().st_size < MAX_BYTES
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    for cell in tour.cells:
        assert cell.get("execution_count") is None
        assert all(set(output.get("data", {})) == {"image/jpeg"} for output in cell.get("outputs", []))
