"""The page of `choose-k`: the plots and the table of what was measured. It opens from disk, without a network."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from slotscops.core.files import write_bytes

PAGE = "choose_k.html"
_WIDTH, _HEIGHT = 860, 230  # of a plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 12, 26  # margins around its axes
_PLOTS = (  # mean, values of each training, title, explanation
    (
        "stability", "stabilities", "Stability",
        "adjusted Rand index of trainings on disjoint halves of the photos; mean, one standard error, and each pair",
    ),
    (
        "likelihood", "likelihoods", "Likelihood",
        "of the features of held-out photos, in the units of the losses; mean and each training",
    ),
    ("dead_share", None, "Dead parts", "share of the parts that win less than 0.1 % of the pixels"),
)  # fmt: skip


def write_page(out: Path, content: dict[str, Any]) -> Path:
    """Writes the page of what `search.describe` gives into the folder `out`."""
    template = (resources.files("slotscops.train.choose_k") / "page.html").read_text(encoding="utf-8")
    rows = content["measured"]
    plots = [_figure(content, *plot) for plot in _PLOTS if any(row[plot[0]] is not None for row in rows)]
    text = "\n".join([_head(content), *plots, _table(content), _details(content)])
    write_bytes(out / PAGE, template.replace("<!-- CONTENT -->", text).encode("utf-8", "replace"))
    return out / PAGE


def _head(content: dict[str, Any]) -> str:
    chosen = content["recommended"]
    found = (
        "No recommendation: parts died, or trainings collapsed, at every number."
        if chosen is None
        else f"Recommended: <b>{chosen} parts</b>, {escape(content['rule'])}."
    )
    return f'<h1>How many parts</h1>\n<p>{found}</p>\n<p class="quiet">{escape(content["note"])}</p>'


def _details(content: dict[str, Any]) -> str:
    amount = content["identity"]["choose_k"]
    command = content["next_command"]
    shown = "" if command is None else f"<p>Train with:</p>\n<pre>{escape(command)}</pre>\n"
    return (
        f'{shown}<p class="quiet">Each number: {amount["repeats"]} pairs of trainings of at most {amount["steps"]} '
        f"steps, compared on at most {amount['held_out']} training photos that none of them saw.</p>"
    )


def _table(content: dict[str, Any]) -> str:
    heads = ("parts", "stability", "likelihood", "dead parts", "seconds")
    lines = ["".join(f'<th scope="col">{head}</th>' for head in heads)]
    body = [f"<tr>{lines[0]}</tr>"]
    for row in content["measured"]:
        kind = ' class="chosen"' if row["num_parts"] == content["recommended"] else ""
        body.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells_of(row))}</tr>")
    around = '<div class="scroll" tabindex="0" role="group" aria-label="What was measured">'
    return f"{around}<table>{''.join(body)}</table></div>"


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of a row of the table, for one of `measured`: parts, stability, likelihood, dead parts, seconds."""
    return (
        str(row["num_parts"]),
        number_text(row["stability"], ".3f"),
        number_text(row["likelihood"], ".4f"),
        number_text(row["dead_share"], ".0%"),
        number_text(row["seconds"], ".0f"),
    )


def number_text(value: float | None, form: str) -> str:
    """The number in that format, or a dash if there is none."""
    return "–" if value is None else format(value, form)


def _figure(content: dict[str, Any], mean: str, each: str | None, title: str, explanation: str) -> str:
    """One plot against the number of parts."""
    rows = [row for row in content["measured"] if row[mean] is not None]
    error = content["standard_error"] if mean == "stability" else None
    least = content["least_stability"] if mean == "stability" else None
    single = [(row["num_parts"], value) for row in rows for value in (row[each] if each else []) if value is not None]
    points = [(row["num_parts"], row[mean]) for row in rows]
    values = [value for _, value in points + single]
    values += [value + sign * error for _, value in points for sign in (-1, 1) if error is not None]
    values += [least] if least is not None else []
    bounds = (0.0, 1.0) if mean == "dead_share" else (min(values), max(values))
    axes = _Axes([row["num_parts"] for row in content["measured"]], *bounds)
    drawn = [axes.drawn(content["recommended"])]
    if least is not None:
        drawn.append(axes.level(least, "least"))
    drawn += [axes.dot(*point, "one", 3) for point in single]
    if error is not None:
        drawn += [
            f'<path class="bar" d="M{axes.x(number):.1f} {axes.y(value - error):.1f}V{axes.y(value + error):.1f}"/>'
            for number, value in points
        ]
    line = " ".join(f"{axes.x(number):.1f},{axes.y(value):.1f}" for number, value in points)
    drawn.append(f'<polyline class="mean" points="{line}"/>')
    drawn += [axes.dot(*point, "dot", 4.5) for point in points]
    label = f"{title} by number of parts: " + ", ".join(f"{number}: {value:.3g}" for number, value in points)
    return (
        f"<figure><figcaption>{title} <span>{escape(explanation)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg></figure>'
    )


class _Axes:
    """Places numbers of parts and values in a plot."""

    def __init__(self, numbers: Sequence[int], low: float, high: float) -> None:
        self._numbers = numbers
        room = 0.06 * (high - low) or 0.5
        self._low, self._high = low - room, high + room

    def x(self, number: int) -> float:
        first, last = min(self._numbers), max(self._numbers)
        share = (number - first) / (last - first) if last > first else 0.5
        inner = _WIDTH - _LEFT - _RIGHT - 40
        return _LEFT + 20 + inner * share

    def y(self, value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self._high - value) / (self._high - self._low)

    def level(self, value: float, kind: str) -> str:
        place = f"{self.y(value):.1f}"
        return f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place}" y2="{place}"/>'

    def dot(self, number: int, value: float, kind: str, radius: float) -> str:
        return f'<circle class="{kind}" cx="{self.x(number):.1f}" cy="{self.y(value):.1f}" r="{radius}"/>'

    def drawn(self, chosen: int | None) -> str:
        """Five lines with their values, and the numbers of parts below."""
        parts = []
        for number in range(5):
            value = self._low + (self._high - self._low) * number / 4
            parts.append(self.level(value, "axis"))
            parts.append(f'<text x="{_LEFT - 8}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
        for number in self._numbers:
            kind = ' class="chosen"' if number == chosen else ""
            parts.append(f'<text{kind} x="{self.x(number):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{number}</text>')
        return "".join(parts)
