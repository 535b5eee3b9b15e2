"""A run's own page, `runs/NAME/report.html`. It is made from the run folder's files and can be made again any time.

    python -m slotscops.report RUN

The page opens from disk without a network. It shows the pictures that lie in the run folder's `pictures/`.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from slotscops.config import Config, load_config, to_mapping
from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError
from slotscops.core.files import read_bytes, write_bytes
from slotscops.core.pictures import voc_palette
from slotscops.train.run.folder import RunFolder, read_metrics

_MAX_POINTS = 2000  # of a curve: more than a screen shows, and few enough for a page that opens at once
_MAX_DIGITS = 20  # of the step in a picture's name
_PLACE = '"RUN"'  # the template's placeholder for the content
# Panel -> prefixes of the values that it plots. A value goes to the first panel that has a prefix of its name.
_PANELS = {
    "Loss": ("loss",),
    "Scores": ("val_",),
    "Share of cells of each slot": ("slot_share_",),
    "Signs of collapse": ("map_entropy", "basis_cosine", "background_share"),
    "Slots and basis rows out of use": ("dead_slots", "zero_basis_rows", "damaged_samples"),
    "Norm of the gradient": ("grad_norm",),
    "Learning rates": ("lr_",),
    "Images per second": ("images_per_second",),
    "Share of time waiting for data": ("data_wait",),
    "Peak memory, bytes": ("peak_memory_bytes",),
}


def write_page(folder: RunFolder) -> Path:
    """Writes the page from the folder's settings, logged steps, pictures, status, last evaluation and `scores.json`.

    Raises:
        UserError: the folder holds no run.
    """
    if not folder.config.is_file():
        raise UserError(f"{folder.path}: holds no run (no config.yaml); give runs/NAME")
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    content = {
        "name": folder.path.resolve().name,
        "status": _read_json(folder.status),
        "evaluation": _read_json(folder.evaluation),
        "machine": _read_json(folder.machine),
        "scores": _read_json(folder.scores),
        "settings": flat_settings(to_mapping(load_config(folder.config))),
        "defaults": flat_settings(to_mapping(Config())),
        "last": {name: value for name, value in (rows[-1] if rows else {}).items() if name != "batch_digest"},
        "panels": _panels(rows),
        "pictures": [(step, f"pictures/{path.name}") for step, path in list_pictures(folder)],
        "palette": voc_palette(256).tolist(),
    }
    page = (resources.files("slotscops.train.run") / "page.html").read_text(encoding="utf-8")
    # ASCII, and no tag within it can end the script.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    write_bytes(folder.page, page.replace(_PLACE, text).encode())
    return folder.page


def _panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Curves by panel: each value that is a number in some row, against the step."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value)))
    panels = []
    for title, prefixes in _PANELS.items():
        curves = []
        for name in [name for name in names if name.startswith(prefixes)]:
            points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
            curves.append({"name": name, "points": _thin(points)})
        if curves:
            panels.append({"title": title, "curves": curves})
    return panels


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every n-th point, so that about 2,000 remain, and always the last one."""
    every = -(-len(points) // _MAX_POINTS)
    return points[:-1][::every] + points[-1:]


def list_pictures(folder: RunFolder) -> list[tuple[int, Path]]:
    """Step and path of each picture of a run, in the order of the steps."""
    paths = [(path.stem.removeprefix("step-"), path) for path in folder.pictures.glob("step-*.png")]
    return sorted((int(step), path) for step, path in paths if step.isdecimal() and len(step) < _MAX_DIGITS)


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError, RecursionError):  # not written yet, or damaged
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("report", "Write the HTML page of a run again.", "runs/toy")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    console.say(str(write_page(RunFolder(parser.parse_args(arguments).run))))
    return 0
