import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slotscops.core.errors import UserError
from slotscops.evaluate import __main__ as evaluate
from slotscops.evaluate import scoreboard
from slotscops.evaluate.scoreboard import Row, Scored
from slotscops.metrics.protocols import ORDERS, PROTOCOLS


def scored(name: str, kind: str, value: float, class_name: str = "horse", **more: object) -> Scored:
    scores = dict.fromkeys(("nmi", "ari", "miou", "majority_miou"), value)
    rows = {Row(protocol, order, class_name): scores for protocol in PROTOCOLS for order in ORDERS}
    return dataclasses.replace(Scored(name, kind, 4, rows, {}), **more)  # type: ignore[arg-type]


def scores_in(folder: Path, methods: list[Scored]) -> Path:
    folder.mkdir()
    scoreboard.write(folder / "scores.json", {}, methods)
    return folder


def page_of(folder: Path, files: dict[str, list[Scored]]) -> str:
    """The page of these files, each in a folder of its own."""
    paths = [str(scores_in(folder / name, methods) / "scores.json") for name, methods in files.items()]
    assert evaluate.main(["--read", *paths, "--page", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def first_table(page: str) -> list[list[str]]:
    table = page[page.index("<table>") : page.index("</table>")]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_runs_of_several_files_share_a_column_beside_baselines_and_published_numbers(tmp_path: Path) -> None:
    files = {
        name: [
            scored(f"runs/{name}", "run", 0.5, name),
            scored("kmeans", "baseline", value, name),
            scored("supervised", "baseline", 0.9, name, told_class=True),
        ]
        for name, value in (("horse", 0.25), ("person", 0.75))
    }
    head, horse, person = first_table(page_of(tmp_path, files))
    assert head[:4] == ["class", "slotscops", "kmeans", "supervised, told the class"]
    # Bold is the best of the comparable ones: not the upper bound, and not numbers of other people's crops.
    assert horse[:4] == ["horse", "<b>50.0</b> / <b>50.0</b>", "25.0 / 25.0", "90.0 / 90.0"]
    assert person[:3] == ["person", "50.0 / 50.0", "<b>75.0</b> / <b>75.0</b>"]
    assert dict(zip(head, horse, strict=True))["SCOPS, published"] == "29.4 / 55.7"
    assert dict(zip(head, person, strict=True))["SCOPS, published"] == "–"


def test_merged_parts_stand_beside_no_published_numbers_and_two_runs_of_a_file_keep_their_names(tmp_path: Path) -> None:
    methods = [scored(f"runs/{number}", "run", 0.5, merge="left-right") for number in range(2)]
    page = page_of(tmp_path, {"a": methods})
    assert first_table(page)[0] == ["class", "runs/0", "runs/1"]
    assert "Merged true parts: left-right." in page


def test_names_from_files_are_text_on_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"a": [scored("<script>alert(1)</script>", "baseline", 0.5, "<b>horse")]})
    assert "<script>alert" not in page
    assert "&lt;b&gt;horse" in page


def test_a_page_needs_scores_and_a_folder_to_be_in(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give it with --read FILE"):
        evaluate.main(["--baseline", "position", "--shards", "x", "--page", "page.html"])
    with pytest.raises(UserError, match=r"--page .*: no such folder; make it first"):
        evaluate.main(["--read", "x", "--page", str(tmp_path / "nowhere" / "page.html")])


def test_a_damaged_picture_is_left_out_of_the_page_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "a" / "pictures"
    folder = scores_in(tmp_path / "a", [scored("run", "run", 0.5)])
    (folder / "machine.json").write_text("3")
    pictures.mkdir()
    (pictures / "step-x.png").touch()
    (pictures / "step-2.png").write_bytes(b"\x89PNG")
    assert evaluate.main(["--read", str(folder / "scores.json"), "--page", str(tmp_path / "page.html")]) == 0
    assert "<img" not in (tmp_path / "page.html").read_text()
    assert f"left out of the page: {pictures / 'step-2.png'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: content["methods"].clear(), "methods: .* at least 1 item"),
        (lambda content: content["methods"][0].update(name=[]), r"methods\.0\.name: .* valid string"),
        (lambda content: content["methods"][0]["scores"].pop("mask"), "'run' without some of the scores"),
        (lambda content: content["methods"][0]["scores"]["own"]["small"]["horse"].pop("nmi"), "without some of the"),
        (lambda content: content["methods"][0]["scores"]["own"]["first"].update(x={}), "without some of the scores"),
        (
            lambda content: content["methods"][0]["scores"]["own"]["small"].update(
                x=content["methods"][0]["scores"]["own"]["small"]["horse"]
            ),
            "scores of a class in some protocols only",
        ),
    ],
)
def test_scores_that_were_changed_are_refused_with_the_place(
    change: Callable[[Any], object], what: str, tmp_path: Path
) -> None:
    path = scores_in(tmp_path / "a", [scored("run", "run", 0.5)]) / "scores.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"scores\.json: needed scores written by .*, came .*{what}"):
        scoreboard.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="needed scores written by"):
        scoreboard.read(path)
