import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import contrast, open_tab
from commands import PYTHON, metrics, python, run, training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slotscops.core.errors import UserError
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.page import _MAX_POINTS, write_page

SETTINGS = ("train.eval_every_steps=2", "train.learning_rate=0.003")


@pytest.fixture(scope="module")
def finished(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    done = run(training(PYTHON, toy_shards, run_dir, *SETTINGS))
    assert done.returncode == 0, done.stderr
    return run_dir


def content(page: Path) -> dict[str, Any]:
    found = re.search(r"^const run = (.*);$", page.read_text(), re.MULTILINE)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def test_the_page_tells_what_the_run_folder_holds(finished: Path) -> None:
    page = content(finished / "report.html")
    rows = metrics(finished)
    assert (page["name"], page["status"]["state"], page["evaluation"]["step"]) == ("toy", "finished", 6)
    curves = {curve["name"]: curve["points"] for panel in page["panels"] for curve in panel["curves"]}
    assert curves["loss"] == [[row["step"], row["loss"]] for row in rows]
    assert curves["val_nmi"] == [[row["step"], row["val_nmi"]] for row in rows if "val_nmi" in row]
    assert len(curves["val_nmi"]) == 3
    assert page["pictures"] == [[step, f"pictures/step-{step}.png"] for step in (2, 4, 6)]
    assert page["settings"]["train.learning_rate"] == 0.003 != page["defaults"]["train.learning_rate"]
    assert page["machine"]["processes"] == "1"
    plotted = {*curves}
    assert {name for name, value in rows[-1].items() if not isinstance(value, str)} - plotted == {
        "step",
        "samples_seen",
    }


def test_every_pixel_scored_is_in_the_confusion(finished: Path) -> None:
    evaluation = content(finished / "report.html")["evaluation"]
    for order in ("first", "small"):
        tables = [np.array(of_class[order]) for of_class in evaluation["confusion"].values()]
        for of_class, table in zip(evaluation["confusion"].values(), tables, strict=True):
            assert table.shape == (6, len(of_class["parts"]))
        assert sum(table.sum() for table in tables) == 64 * 64 * 6  # val holds six crops
    state = json.loads((finished / "checkpoints" / "step-6" / "state.json").read_text())
    assert state["slot_pixels"] == {
        name: np.array(of_class["first"]).sum(axis=1).tolist() for name, of_class in evaluation["confusion"].items()
    }


def test_it_is_there_from_the_first_evaluation_on(toy_shards: Path, tmp_path: Path) -> None:
    command = training(PYTHON, toy_shards, tmp_path / "run", *SETTINGS, "train.stop_after_steps=3")
    assert run(command).returncode == 0
    page = content(tmp_path / "run" / "report.html")
    assert page["status"] == {"state": "interrupted", "step": 3, "reason": "train.stop_after_steps"}
    assert [step for step, _ in page["pictures"]] == [2, 3]


def test_it_can_be_made_again_and_says_where_there_is_no_run(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.html").read_bytes()
    assert python("-m", "slotscops.report", finished).returncode == 0
    assert (finished / "report.html").read_bytes() == before
    with pytest.raises(UserError, match="holds no run"):
        write_page(RunFolder(tmp_path))


def test_a_long_run_and_odd_text_make_a_page_that_opens(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text("run_dir: '</script><b>'\n")
    rows = [{"step": step, "loss": 1 / step, "val_nmi": None, "batch_digest": "x"} for step in range(1, 9000)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 90')
    folder.status.write_text("[" * 100_000)  # too deep for Python
    page = content(write_page(folder))
    [points] = [curve["points"] for panel in page["panels"] for curve in panel["curves"]]
    assert 100 < len(points) <= _MAX_POINTS + 1
    assert points[-1] == [8999, 1 / 8999]
    assert folder.page.read_text().count("</script>") == 1


def test_tensorboard_has_the_same_numbers_and_the_pictures(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    for row in metrics(finished):
        for name in ("loss", "val_nmi"):
            logged = {event.step: event.value for event in events.Scalars(name)}
            assert (row["step"] in logged) == (name in row)
            if name in row:
                assert logged[row["step"]] == pytest.approx(row[name], rel=1e-6)
    assert [event.step for event in events.Images("parts")] == [2, 4, 6]


# ---- in a real browser -------------------------------------------------------------------------------------------


def test_curves_pictures_and_confusion_are_drawn(browser: Any, finished: Path) -> None:
    tab = open_tab(browser, finished / "report.html")
    assert tab.locator("h1").inner_text() == "toy"
    assert tab.locator("#status").inner_text() == "finished, step 6 of 6"
    assert tab.locator(".plot").count() == len(content(finished / "report.html")["panels"])
    for length in tab.evaluate("[...document.querySelectorAll('.plot path')].map(path => path.getTotalLength())"):
        assert length > 50
    assert tab.evaluate("document.getElementById('picture').naturalWidth") > 300
    tab.locator("#time").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#step").inner_text() == "4"
    assert tab.locator("#picture").get_attribute("src") == "pictures/step-4.png"
    shares = [text.removesuffix(" %") for text in tab.locator("#confusion td").all_inner_texts()]
    columns = np.array([int(share) for share in shares]).reshape(6, -1)
    assert np.abs(columns.sum(0) - 100).max() <= 3  # each rounded
    tab.locator("#order").select_option("first")
    assert tab.locator("#confusion td").count() <= columns.size  # some parts lie wholly below others
    assert tab.errors == []
    assert all(url.startswith(("file:", "data:")) for url in tab.asked)


def test_the_pointer_reads_a_curve(browser: Any, finished: Path) -> None:
    tab = open_tab(browser, finished / "report.html")
    plot = tab.locator(".plot").first
    box = plot.locator("svg").bounding_box()
    row = metrics(finished)[2]
    x = box["x"] + 58 + (box["width"] - 66) * (row["step"] - 1) / 5
    plot.scroll_into_view_if_needed()
    tab.mouse.move(x, plot.locator("svg").bounding_box()["y"] + 50)
    assert plot.locator(".legend").get_attribute("data-step") == "3"
    assert float(plot.locator(".legend span").first.inner_text().split()[-1]) == pytest.approx(row["loss"], rel=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(browser: Any, finished: Path, scheme: str) -> None:
    tab = open_tab(browser, finished / "report.html", 390, 844, color_scheme=scheme, is_mobile=True, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in ("body", "#status", ".plot figcaption", ".legend span", ".settings span", "#confusion th"):
        assert contrast(tab, selector) >= 4.5, selector  # WCAG 2.2, 1.4.3
