"""The options of `python -m slotscops.evaluate`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from slotscops.config import BaselineTransform, FeatureStore, Refinement
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError, suggest
from slotscops.evaluate import baselines
from slotscops.shard.remote import shards_argument

_BASELINES = (*baselines.NAMES, "supervised")
_EXAMPLE = "--checkpoint runs/toy --baseline position,kmeans"
_KNOWN = ", ".join(_BASELINES)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options of the command and checks them.

    Raises:
        UserError: if a baseline is unknown, there is nothing to score or no data to score it on, options exclude
            each other, --clusters is out of range, or the file of --json cannot be written.
    """
    options = _parser().parse_args(arguments)
    for name in options.baseline:
        if name not in _BASELINES:
            raise UserError(f"--baseline: unknown '{name}'{suggest(name, _BASELINES) or f'; known are {_KNOWN}'}")
    if options.read and (options.checkpoint or options.baseline):
        raise UserError("--read shows what was scored before; give it without --checkpoint and --baseline")
    if options.read:
        return options
    if not (options.checkpoint or options.baseline):
        raise UserError("nothing to score; give --checkpoint RUN, --baseline NAME or both")
    if options.json is not None:
        _check_writable(options.json)
    if not (options.checkpoint or options.shards):
        raise UserError("a baseline alone needs data; give --shards SHARDS")
    if options.clusters is not None and not 2 <= options.clusters <= 255:
        raise UserError(f"--clusters is {options.clusters}, needed 2 to 255: a background and at least one part")
    return options


def _check_writable(path: Path) -> None:
    """Refuses a file that could not be written after the scoring, which may take hours."""
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: no such folder; make it first")
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--json {path}: its folder cannot be written; check its permissions, or name another place")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", "Score runs and baselines against the true parts.", _EXAMPLE)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="RUN",
        help="folders of runs, or checkpoints; runs that differ only in their seed also get a mean and a deviation",
    )  # fmt: skip
    parser.add_argument(
        "--baseline",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help=f"methods to score beside the runs: {', '.join(baselines.NAMES)}, or supervised, an upper bound that is "
        "trained on the true parts",
    )
    parser.add_argument(
        "--shards",
        type=shards_argument,
        help="shards to score on (default: those of the first run's training, if they lie below this folder)",
    )
    parser.add_argument("--split", default="val", help="split to score (default: %(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="print every protocol, score and class, not the small table"
    )
    parser.add_argument("--json", type=Path, help="file for the scores, not multiplied by 100")
    parser.add_argument(
        "--read", type=Path, nargs="+", default=[], metavar="FILE", help="show the scores that --json wrote earlier"
    )
    parser.add_argument(
        "--landmarks", action="store_true", help="also score regressed part centres; this reads the training split"
    )
    _add_baseline_options(parser)
    return parser


def _add_baseline_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which features the baselines use, and how."""
    parser.add_argument(
        "--teacher", help="network whose features the baselines use (default: the first run's, or vgg19)"
    )
    parser.add_argument("--layer", help="layer of that network (default: the first run's, or relu5_4)")
    parser.add_argument(
        "--size", type=int, help="side of the crops for that network, pixels (default: the first run's)"
    )
    parser.add_argument(
        "--components",
        type=int,
        metavar="D",
        help="the baselines read the cache of so many components (default: the first run's)",
    )
    parser.add_argument(
        "--store",
        choices=get_args(FeatureStore),
        help="the baselines read the cache that is stored in this way (default: the first run's)",
    )
    parser.add_argument(
        "--transform",
        choices=get_args(BaselineTransform),
        default="none",
        help="what is done to the features before a baseline uses them (default: %(default)s)",
    )
    parser.add_argument(
        "--refinement",
        choices=get_args(Refinement),
        default="none",
        help="refinement of the baselines' labels; runs use their own decoder.refinement (default: %(default)s)",
    )
    parser.add_argument(
        "--clusters",
        type=int,
        help="clusters of each baseline, with the background (default: the first run's slots, or 6)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the baselines (default: %(default)s)")
