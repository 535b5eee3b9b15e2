"""Shows the scores of several methods side by side, in printed tables and in a JSON file."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from slotscops.core import console
from slotscops.core.claims import differences
from slotscops.core.errors import UserError
from slotscops.core.files import json_numbers, write_json
from slotscops.evaluate import published_numbers as literature
from slotscops.metrics.protocols import ALL_CLASSES, ALL_PROTOCOLS, ORDERS, PHOTO, PROTOCOLS, TOLD

_SCORES = ("nmi", "ari", "miou", "majority_miou")
_HEADINGS = {"nmi": "NMI", "ari": "ARI", "miou": "mIoU", "majority_miou": "mIoU maj."}
_TITLES = {
    "own": "whole crop, own background",
    "mask": "whole crop, given object mask (not comparable with the method's own background)",
    "foreground": "foreground only: pixels of true parts",
    PHOTO: "whole photo, own background",
}
# The small table: which numbers of which protocols.
_BRIEF_SCORES = ("nmi", "ari")
_BRIEF_PLACES = {"own background": "own", "given mask": "mask", "whole photo": PHOTO}
_BRIEF_ORDER = "small"
_BRIEF_LEGEND = (
    "Scores are x 100: 100 means that found and true parts are the same, 0 that they agree no more than by chance. "
    "`own background` is the whole crop as the method sees it; `given mask` tells the method where the object is. Both "
    "tell it the box, because crops are made around the true box. A method that finds parts is well above `position`, "
    "which only knows where in the crop a pixel lies. --full prints every protocol, score and class."
)
_PHOTO_LEGEND = "`whole photo` gives the method the uncropped photo and tells it nothing."
_NEEDED = "needed scores written by python -m slotscops.evaluate --json"
_MAY_DIFFER = {"seed", "run_dir"}  # settings in which the runs of one mean may differ


class Row(NamedTuple):
    """Which numbers of a method: one row of `Scored.rows`."""

    protocol: str
    order: str  # paint order of overlapping parts
    class_name: str


@dataclass(frozen=True)
class Scored:
    """One method's scores."""

    name: str
    kind: str  # run, baseline or mean
    num_parts: int  # K
    rows: dict[Row, dict[str, float]]  # scores by name, each in its own unit interval; NaN if there was no pixel
    landmarks: dict[str, float]  # error by class, as a share of the box's longer side; empty if not asked for
    settings: dict[str, Any] | None = None  # of a run; None for other kinds
    told_class: bool = False  # whether the method was told the class of each photo
    merge: str | None = None  # which true parts count as one; None: every part counts for itself
    step: int | None = None  # of a run's checkpoint

    @property
    def has_scores(self) -> bool:
        """False if no photo has true parts to compare with."""
        return any(not math.isnan(self.rows[Row("own", "first", name)]["nmi"]) for name in self.class_names)

    @property
    def class_names(self) -> list[str]:
        """The classes that were scored, and all of them together, in the order of the tables."""
        return list(dict.fromkeys(row.class_name for row in self.rows))

    @property
    def shown_name(self) -> str:
        """The name, with what the method was told beyond what its table says."""
        return f"{self.name}, told the class" if self.told_class else self.name


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation (divided by n - 1) of runs that differ only in their seed."""

    names: list[str]
    mean: Scored
    deviation: Scored


def means(methods: list[Scored]) -> list[Mean]:
    """One mean for each group of two or more runs whose settings differ only in the seed (and the run's folder)."""
    groups: list[list[Scored]] = []
    for method in methods:
        if method.settings is None:
            continue
        for group in groups:
            assert group[0].settings is not None
            if set(differences(group[0].settings, method.settings)) <= _MAY_DIFFER:
                group.append(method)
                break
        else:
            groups.append([method])
    return [_mean(group) for group in groups if len(group) > 1]


def _average(values: list[float]) -> float:
    return float(np.mean(values))


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1))


def _mean(group: list[Scored]) -> Mean:
    def combine(function: Callable[[list[float]], float], name: str) -> Scored:
        first = group[0]
        rows = {
            row: {score: function([method.rows[row][score] for method in group]) for score in scores}
            for row, scores in first.rows.items()
        }
        landmarks = {
            class_name: function([method.landmarks[class_name] for method in group]) for class_name in first.landmarks
        }
        return Scored(name, "mean", first.num_parts, rows, landmarks, None, first.told_class, first.merge)

    name = f"mean of {len(group)} as {group[0].name}"
    return Mean([method.name for method in group], combine(_average, name), combine(_deviation, name))


# ---- tables ------------------------------------------------------------------------------------------------------


def show(title: str, methods: list[Scored], full: bool = False) -> None:
    """Prints one small table, or with `full` a wide table for each protocol."""
    merges = {method.merge for method in methods}
    if merges == {None}:
        console.say(title)
    elif len(merges) == 1:
        console.say(f"{title}, true parts merged by {merges.pop()}")
    else:  # of several files
        console.say(title)
        methods = [replace(method, name=_with_merge(method)) for method in methods]
    (_show_all if full else _show_brief)(methods)


def _with_merge(method: Scored) -> str:
    return method.name if method.merge is None else f"{method.name}, parts merged by {method.merge}"


def protocols_of(methods: list[Scored]) -> list[str]:
    """The protocols of which any method has scores."""
    return [name for name in ALL_PROTOCOLS if any(row.protocol == name for method in methods for row in method.rows)]


def protocol_title(protocol: str) -> str:
    """What the protocol scores, and what it tells every method."""
    return f"{_TITLES[protocol]}; told: {', '.join(TOLD[protocol]) or 'nothing'}"


def _show_brief(methods: list[Scored]) -> None:
    averaged = means(methods)
    protocols = protocols_of(methods)
    places = {place: protocol for place, protocol in _BRIEF_PLACES.items() if protocol in protocols}
    columns = [f"{place}\n{_HEADINGS[score]}" for place in places for score in _BRIEF_SCORES]
    rows = _rows(methods, averaged, _class_of_all, partial(_brief_cells, list(places.values())))
    without_class = [(name, *cells) for name, _, *cells in rows]
    console.show_table("agreement of found and true parts", ("method", *columns), without_class)
    _show_landmarks(methods, averaged)
    console.say(f"{_BRIEF_LEGEND} {_PHOTO_LEGEND}" if PHOTO in protocols else _BRIEF_LEGEND)


def _class_of_all(method: Scored) -> list[str]:
    """All classes together, or the only class."""
    return [ALL_CLASSES] if ALL_CLASSES in method.class_names else method.class_names[:1]


def _brief_cells(protocols: list[str], method: Scored, class_name: str) -> list[str]:
    """NMI and ARI of each of these protocols."""
    rows = [method.rows.get(Row(protocol, _BRIEF_ORDER, class_name), {}) for protocol in protocols]
    return [_percent(row.get(score, math.nan)) for row in rows for score in _BRIEF_SCORES]


def _show_all(methods: list[Scored]) -> None:
    averaged = means(methods)
    for protocol in protocols_of(methods):
        prefix = "FG-" if protocol == "foreground" else ""
        columns = [f"{prefix}{_HEADINGS[score]}\n{order}" for order in ORDERS for score in _SCORES]
        rows = _rows(methods, averaged, lambda method: method.class_names, partial(_cells, protocol))
        if protocol == literature.PROTOCOL:
            rows += _published_cells(methods)
        console.show_table(protocol_title(protocol), ("method", "class", *columns), rows, num_names=2)
    _show_landmarks(methods, averaged)
    console.say(
        "Scores are x 100. Where true masks overlap, the part listed first (first) or the smallest one (small) is on "
        "top. mIoU uses the best one-to-one matching; maj. counts each found part for the true part it mostly covers."
    )
    if _published_cells(methods):
        console.say(
            f"* other people's numbers, not measured here: {literature.SOURCE}; their crops and networks differ"
        )


def _rows(
    methods: list[Scored],
    averaged: list[Mean],
    classes_of: Callable[[Scored], list[str]],
    cells_of: Callable[[Scored, str], list[str]],
) -> list[tuple[str, ...]]:
    """Name, class and cells of the runs, of their means with deviations, and of all other methods, in that order."""
    runs, others = (
        [
            (method.shown_name, name, *cells_of(method, name))
            for method in methods
            if (method.kind == "run") == is_run
            for name in classes_of(method)
        ]
        for is_run in (True, False)
    )
    for mean in averaged:
        for name in classes_of(mean.mean):
            pairs = zip(cells_of(mean.mean, name), cells_of(mean.deviation, name), strict=True)
            runs.append((mean.mean.shown_name, name, *(f"{value} ± {off}" for value, off in pairs)))
    return runs + others


def _cells(protocol: str, method: Scored, class_name: str) -> list[str]:
    rows = [method.rows.get(Row(protocol, order, class_name), {}) for order in ORDERS]
    return [_percent(row.get(score, math.nan)) for row in rows for score in _SCORES]


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.1f}"


def _published(methods: list[Scored]) -> list[tuple[str, literature.Published]]:
    """Pairs of a class and its published scores, for each class and number of parts that was scored.

    They were scored with all true parts apart, so they stand beside no scores of merged parts.
    """
    wanted = {(name, method.num_parts): None for method in methods if not method.merge for name in method.class_names}
    return [(name, row) for name, num_parts in wanted for row in literature.published_scores(name, num_parts)]


def _published_cells(methods: list[Scored]) -> list[tuple[str, ...]]:
    empty = [""] * (len(_SCORES) * len(ORDERS) - 2)
    return [
        (f"* {row.method}, published", name, _percent(row.nmi), _percent(row.ari), *empty)
        for name, row in _published(methods)
    ]


def _show_landmarks(methods: list[Scored], averaged: list[Mean]) -> None:
    rows = [(method.name, name, _percent(error)) for method in methods for name, error in method.landmarks.items()]
    for mean in averaged:
        for name, error in mean.mean.landmarks.items():
            rows.append((mean.mean.name, name, f"{_percent(error)} ± {_percent(mean.deviation.landmarks[name])}"))
    if rows:
        title = "landmarks: error of regressed part centres, less is better (weak: read it beside position)"
        console.show_table(title, ("method", "class", "% of the box's longer side"), rows, num_names=2)


# ---- JSON --------------------------------------------------------------------------------------------------------


def write(path: Path, about: dict[str, Any], methods: list[Scored]) -> None:
    """Writes everything that `show` prints to a JSON file, not x 100. A score without pixels is null."""
    content = about | {
        "methods": [_to_json(method) for method in methods],
        "means": [
            {"of": mean.names, "mean": _to_json(mean.mean), "deviation": _to_json(mean.deviation)}
            for mean in means(methods)
        ],
        "published": [
            {"class": name, "source": literature.SOURCE, "protocol": literature.PROTOCOL, **row._asdict()}
            for name, row in _published(methods)
        ],
    }
    write_json(path, content)


def read(path: Path) -> list[Scored]:
    """Reads the methods from a file of `write`. They have no settings, so `means` makes no new means of them.

    Raises:
        UserError: if there is no such file, or `write` did not write it.
    """
    try:
        return [_from_json(method) for method in TypeAdapter(_File).validate_json(path.read_bytes()).methods]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_NEEDED}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {_NEEDED}, came {f'{place}: ' if place else ''}{first['msg']}") from None
    except ValueError as error:
        raise UserError(f"{path}: {_NEEDED}, came {error}") from None


Numbers = dict[str, float | None]  # by name of the score, or by class


@dataclass(frozen=True)
class _Method:
    """A method as `write` writes it; what no reader needs is left out."""

    name: str
    kind: str
    num_parts: int
    scores: dict[str, dict[str, dict[str, Numbers]]]  # by protocol, paint order and class
    landmark_error: Numbers
    told_class: bool = False
    merge: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class _File:
    methods: Annotated[list[_Method], Field(min_length=1)]


def _from_json(method: _Method) -> Scored:
    rows = {
        Row(protocol, order, name): _numbers(numbers)
        for protocol in ALL_PROTOCOLS
        if protocol != PHOTO or PHOTO in method.scores
        for order in ORDERS
        for name, numbers in method.scores.get(protocol, {}).get(order, {}).items()
    }
    crops = {(row.protocol, row.order) for row in rows} >= {(name, order) for name in PROTOCOLS for order in ORDERS}
    if not crops or not all(numbers.keys() >= {*_SCORES} for numbers in rows.values()):
        raise ValueError(f"a method '{method.name}' without some of the scores")
    names = {row.class_name for row in rows}
    if any(Row("own", "first", name) not in rows for name in names):
        raise ValueError(f"a method '{method.name}' with scores of a class in some protocols only")
    landmarks = _numbers(method.landmark_error)
    return Scored(
        method.name, method.kind, method.num_parts, rows, landmarks, None, method.told_class, method.merge, method.step
    )


def _numbers(row: Numbers) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _to_json(method: Scored) -> dict[str, Any]:
    protocols = protocols_of([method])
    scores: dict[str, dict[str, dict[str, Any]]] = {protocol: {order: {} for order in ORDERS} for protocol in protocols}
    for row, numbers in method.rows.items():
        scores[row.protocol][row.order][row.class_name] = json_numbers(numbers)
    return {
        "name": method.name,
        "kind": method.kind,
        "num_parts": method.num_parts,
        "step": method.step,
        "merge": method.merge,
        "told_class": method.told_class,
        "told": {protocol: [*TOLD[protocol], *["class"] * method.told_class] for protocol in protocols},
        "scores": scores,
        "landmark_error": json_numbers(method.landmarks),
    }
