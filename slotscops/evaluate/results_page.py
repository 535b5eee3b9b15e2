"""One page with the results of several runs, each scored on its own data: scores, pictures and costs, class by class.

    python -m slotscops.evaluate --read runs/*/scores.json --page results.html

The page is one file that opens from disk without a network. Scores come from the files that `evaluate --json` wrote. If
such a file lies in the folder of a run, that run's last picture and its costs are shown, too. Costs are read from
`cost.jsonl`, one line for each command that was timed: {"stage": "train", "seconds": 12.3}.
"""

import base64
import html
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slotscops.core import console
from slotscops.core.errors import UserError, visible
from slotscops.core.files import read_json_or_none, write_bytes
from slotscops.core.photos import read_photo
from slotscops.evaluate import published_numbers as literature
from slotscops.evaluate import scoreboard
from slotscops.evaluate.scoreboard import Row, Scored
from slotscops.metrics.protocols import ALL_CLASSES, ORDERS
from slotscops.train.run.folder import RunFolder
from slotscops.train.run.page import list_pictures

_PLACE = "<!-- CONTENT -->"
_SCORES = ("nmi", "ari")
_OURS = "slotscops"
_ORDERS = {"first": "the part listed first on top", "small": "the smallest part on top"}
_STAGES = ("shard", "features", "train", "evaluate")
_JPEG_QUALITY = 85
_FIRST = (literature.PROTOCOL, literature.ORDER)


@dataclass(frozen=True)
class Result:
    """The scores in one file."""

    folder: RunFolder  # of the file; it may hold no run
    methods: list[Scored]

    @property
    def class_names(self) -> list[str]:
        return list(dict.fromkeys(name for method in self.methods for name in method.class_names))

    @property
    def title(self) -> str:
        return ", ".join(name for name in self.class_names if name != ALL_CLASSES)


def write_results_page(path: Path, files: Sequence[Path]) -> None:
    """Writes the page.

    Args:
        files: written by `evaluate --json`.

    Raises:
        UserError: one of them is no such file.
    """
    results = [Result(RunFolder(file.parent), scoreboard.read(file)) for file in files]
    methods = [method for result in results for method in result.methods]
    merges = sorted({method.merge or "none" for method in methods})
    protocols = scoreboard.protocols_of(methods)
    # The protocol and order of the published numbers come first, because they are what a reader compares.
    sections = sorted(
        ((protocol, order) for protocol in protocols for order in ORDERS), key=lambda pair: pair != _FIRST
    )
    pieces = ["<h1>Scores by class</h1>", _paragraph(f"NMI / ARI x 100. Merged true parts: {', '.join(merges)}.")]
    pieces += _score_section(results, *sections[0])
    pieces += ["<details><summary>Other protocols and paint orders</summary>"]
    pieces += [piece for section in sections[1:] for piece in _score_section(results, *section)]
    pieces += ["</details>", *_cost_section(results), *_picture_section(results, path)]
    page = (resources.files("slotscops.evaluate") / "results_page.html").read_text(encoding="utf-8")
    write_bytes(path, page.replace(_PLACE, "\n".join(pieces)).encode())


# ---- scores ------------------------------------------------------------------------------------------------------


def _score_section(results: list[Result], protocol: str, order: str) -> list[str]:
    """A heading and a table: one row for each class, one column for each method."""
    columns: dict[str, bool] = {}  # column -> whether its numbers may be compared with each other
    rows: dict[tuple[int, str], dict[str, tuple[float, ...]]] = {}
    for number, result in enumerate(results):
        for method in result.methods:
            column = _column(method, result)
            for name in method.class_names:
                scores = method.rows.get(Row(protocol, order, name))
                if scores is not None:
                    columns[column] = not method.told_class
                    rows.setdefault((number, name), {})[column] = tuple(scores[score] for score in _SCORES)
    has_published = False
    for (number, name), cells in rows.items() if (protocol, order) == _FIRST else ():
        for row in _published(results[number], name):
            has_published = True
            columns[f"{row.method}, published"] = False
            cells[f"{row.method}, published"] = (row.nmi, row.ari)
    comparable = [column for column, is_comparable in columns.items() if is_comparable]
    body = [(name, *(_cell(cells, column, comparable) for column in columns)) for (_, name), cells in rows.items()]
    title = f"{scoreboard.protocol_title(protocol)}; {_ORDERS[order]}"
    note = (
        f"Published: other people's numbers, not measured here ({literature.SOURCE}); their crops and networks differ."
    )
    return [_heading(title), _table(("class", *columns), body), *([_paragraph(note)] if has_published else [])]


def _column(method: Scored, result: Result) -> str:
    """One column for the runs of all files, if each file has one run."""
    is_only_run = method.kind == "run" and sum(other.kind == "run" for other in result.methods) == 1
    return replace(method, name=_OURS if is_only_run else method.name).shown_name


def _published(result: Result, class_name: str) -> list[literature.Published]:
    numbers = {method.num_parts for method in result.methods if method.merge is None}
    return [row for number in sorted(numbers) for row in literature.published_scores(class_name, number)]


def _cell(cells: dict[str, tuple[float, ...]], column: str, comparable: list[str]) -> str:
    """NMI / ARI as HTML. A number is bold if no comparable method of the row has a larger one."""
    if column not in cells:
        return "–"
    texts = []
    for place, score in enumerate(cells[column]):
        others = [cells[other][place] for other in comparable if other in cells]
        is_best = column in comparable and score == score and not any(other > score for other in others)
        text = "–" if score != score else f"{100 * score:.1f}"
        texts.append(f"<b>{text}</b>" if is_best else text)
    return " / ".join(texts)


# ---- costs -------------------------------------------------------------------------------------------------------


def _cost_section(results: list[Result]) -> list[str]:
    rows = []
    for result in results:
        seconds = _read_costs(result.folder)
        machine = _read_machine(result.folder)
        if not seconds and not machine:
            continue
        stages = [f"{seconds[stage]:,.0f}" if stage in seconds else "–" for stage in _STAGES]
        total = f"{sum(seconds.values()):,.0f}" if seconds else "–"
        devices = [str(machine[name]) for name in ("device", "threads") if name in machine]
        device = _escaped(", ".join(devices) + (" threads" if "threads" in machine else "")) or "–"
        rows.append((result.title, *stages, total, device))
    if not rows:
        return []
    columns = ("class", *(f"{stage}, s" for stage in _STAGES), "together, s", "device of training")
    note = "Seconds of the commands, their starts included. Work that was killed is counted as long as it could say so."
    return [_heading("Cost"), _table(columns, rows), _paragraph(note)]


def _read_machine(folder: RunFolder) -> dict[str, Any]:
    machine = read_json_or_none(folder.machine)
    return machine if isinstance(machine, dict) else {}


def _read_costs(folder: RunFolder) -> dict[str, float]:
    """Seconds by stage, summed over all starts. Lines that were cut by a crash are left out."""
    seconds: dict[str, float] = {}
    try:
        lines = folder.cost.read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # nothing was timed
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + float(row["seconds"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return {stage: seconds[stage] for stage in _STAGES if stage in seconds}


# ---- pictures ----------------------------------------------------------------------------------------------------


def _picture_section(results: list[Result], page: Path) -> list[str]:
    figures = []
    for result in results:
        if not (pictures := list_pictures(result.folder)):
            continue
        step, newest = pictures[-1]
        try:
            address_of_picture = _as_address(newest)
        except UserError as error:
            console.warn(f"left out of the page: {error}")
            continue
        caption = _escaped(f"{result.title}, step {step:,}")
        if result.folder.page.is_file():
            address = os.path.relpath(result.folder.page, page.parent)
            caption += f' (<a href="{html.escape(quote(address))}">the run\'s own page</a>)'
        alt = _escaped(f"{result.title}: photos, parts found, true parts")
        picture = f'<img loading="lazy" alt="{alt}" src="{address_of_picture}">'
        figures.append(f"<figure><figcaption>{caption}</figcaption>{picture}</figure>")
    if not figures:
        return []
    return [_heading("Parts found"), _paragraph("Rows: photos, parts found, true parts."), *figures]


def _as_address(path: Path) -> str:
    """The picture as a JPEG inside the page, a tenth of the size of its PNG."""
    jpeg = io.BytesIO()
    read_photo(path).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


# ---- HTML --------------------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _heading(text: str) -> str:
    return f"<h2>{_escaped(text[:1].upper() + text[1:])}</h2>"


def _paragraph(text: str) -> str:
    return f"<p>{_escaped(text)}</p>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose rows begin with a name. The other cells are HTML."""
    head = "".join(f'<th scope="col">{_escaped(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_escaped(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
