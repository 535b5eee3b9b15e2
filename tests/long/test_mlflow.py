"""MLflow's own client gets a run's settings, numbers and pictures, and a second start goes on with the same run.

The client alone is installed for the tests (`mlflow-skinny`), which stores runs in a folder but brings no server.
"""

from pathlib import Path

import pytest
from PIL import Image

from slotscops.config import load_config
from slotscops.train.optional_tracker import OptionalTracker


@pytest.mark.filterwarnings("ignore")  # of MLflow's imports
def test_mlflow_gets_settings_numbers_and_pictures_of_both_starts_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    (tmp_path / "horse").mkdir()
    config = load_config(None, [f"run_dir={tmp_path / 'horse'}", "slots.num_parts=4"])
    for step in (1, 2):
        tracker = OptionalTracker("mlflow", config)
        tracker.start()
        tracker.log({"loss": 1.0 / step, "val_nmi": None}, step=step)
        tracker.log_picture("parts", Image.new("RGB", (8, 8)), step=step)
        tracker.finish()
    assert capsys.readouterr().err == ""
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("slotscops").experiment_id])
    assert (run.info.run_name, run.info.status) == ("horse", "FINISHED")
    assert run.data.params["slots.num_parts"] == "4"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "parts")] == [
        "parts/step-1.png",
        "parts/step-2.png",
    ]
