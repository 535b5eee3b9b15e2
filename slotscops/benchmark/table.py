"""The table of speed in launch/README.md, written from the files that the benchmark wrote with --json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slotscops.core.errors import UserError
from slotscops.core.files import write_bytes

_BEGIN, _END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
# The row's text for each figure, and the format of its value.
_LINES = {
    "step_over_encoder": ("a whole training step, against the encoder's own forward, backward and update", "{:.2f} x"),
    "recipe_over_step": ("faster than VGG19 and upsampled features in every step (float32)", "{:.1f} x"),
    "images_per_second": ("images a second in training", "{:.1f}"),
    "data_wait": ("share of a step spent waiting for data", "{:.2%}"),
    "logging_share": ("cost of logging every 20 steps", "{:.2%}"),
    "checkpoint_wait": ("what the loop waits for a checkpoint a minute, the copy to host memory", "{:.2%}"),
    "checkpoint_share": ("the whole cost of a checkpoint a minute, written on the cores that train", "{:.2%}"),
    "deterministic_over_ddp": ("a step with deterministic reduction, against DDP's", "{:.2f} x"),
    "loss_speedup": ("exact loss, faster than with its tensors built (batch 8, 128 px)", "{:.0f} x"),
    "loss_memory_ratio": ("exact loss, smaller in peak memory", "{:.0f} x"),
    "loader_images_per_second": ("loader, images a second on one core", "{:,.0f}"),
    "features_per_second": ("cached features decoded into batches, images a second on one core", "{:,.0f}"),
    "loader_over_webdataset": ("loader, against webdataset's own pipeline", "{:.1f} x"),
    "loader_over_webdataset_simplejpeg": ("loader, against webdataset with the same JPEG library", "{:.1f} x"),
    "loader_over_streaming": ("loader, against mosaicml-streaming", "{:.1f} x"),
    "loader_over_litdata": ("loader, against litdata", "{:.1f} x"),
    "loader_over_decode": ("loader, against JPEG decoding alone", "{:.0%}"),
    "shard_tree_s": ("sharding all of PASCAL-Part, copies of real annotations, without features", "{:.0f} s"),
    "shard_archives_s": ("the same from archives unopened", "{:.0f} s"),
    "start_of_a_million_cold_s": ("a million records ready to serve", "{:.2f} s"),
    "start_of_a_million_megabytes": ("a million records, memory", "{:.0f} MB"),
    "scale_megabytes": ("memory for the data set in each process, at its peak", "{:.0f} MB"),
    "scale_first_batch_s": ("from the start of a process to its first batch", "{:.0f} s"),
    "scale_first_batch_processor_s": ("of that, what the data set adds in processor time", "{:.1f} s"),
    "scale_step_ms": ("bookkeeping of a step outside the network", "{:.2f} ms"),
    "scale_log_ms": ("work of a logged step outside the network", "{:.0f} ms"),
    "scale_log_processor_ms": ("the same in processor time", "{:.0f} ms"),
    "scale_epoch_end_ms": ("longest planning of a step at an epoch's end", "{:.2f} ms"),
    "scale_opened_on_resume": ("opens of each file of a checkpoint on resume, by all processes together", "{:.0f}"),
}


def write_section(files: Sequence[Path], readme: Path) -> None:
    """Puts a table of all figures between the markers in the README.

    Raises:
        UserError: a file without figures of the benchmark, or a README without the markers.
    """
    rows = ["| what | figure | setting | machine, commit |", "|---|---|---|---|"]
    for path in files:
        rows += _rows(_read(path))
    text = readme.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"{readme}: needs the lines {_BEGIN} and {_END} around the table")
    write_bytes(readme, "\n".join([before + _BEGIN, *rows, _END + after]).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text())
        figures["machine"]["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no figures of the benchmark ({error}); write one with --json") from None
    return figures


def _rows(figures: dict[str, Any]) -> list[str]:
    machine = figures["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['commit']}"
    setting = figures.get("setting", "")
    rows = [
        f"| {meaning} | {style.format(figures[key])} | {setting} | {where} |"
        for key, (meaning, style) in _LINES.items()
        if key in figures
    ]
    for kind, rates in figures.get("scaling", {}).items():
        listed = ", ".join(f"{count}: {rate:.1f}" for count, rate in rates.items())
        rows.append(f"| images a second by processes, {kind} | {listed} | {setting} | {where} |")
    return rows
