"""The options of `python -m slotscops.evaluate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from slotscops.config import BaselineTransform, Refinement, suggest
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError
from slotscops.evaluate import baselines
from slotscops.shard.remote import shards_argument

_BASELINES = (*baselines.NAMES, "supervised")
_EXAMPLE = "--checkpoint runs/toy --baseline position,kmeans"
_KNOWN = ", ".join(_BASELINES)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options of the command and checks them.

    Raises:
        UserError: if a baseline is unknown, there is nothing to score or no data to score it on, options exclude
            each other, or --clusters is out of range.
    """
    parser = command_parser("evaluate", "Score runs and baselines against the true parts.", _EXAMPLE)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="RUN",
        help="runs' folders or single checkpoints; of those that differ in their seed alone, mean and deviation",
    )  # fmt: skip
    parser.add_argument(
        "--baseline",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help=f"methods without training: {', '.join(baselines.NAMES)}; supervised: taught the true parts, a ceiling",
    )
    parser.add_argument("--shards", type=shards_argument, help="(default: those the first run was trained on)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--json", type=Path, help="write the scores here, in 0..1")
    parser.add_argument("--read", type=Path, nargs="+", default=[], metavar="FILE", help="show scores of --json again")
    parser.add_argument("--landmarks", action="store_true", help="regress part centres too; reads the training split")
    parser.add_argument("--teacher", help="network of the baselines' features (default: the first run's, or vgg19)")
    parser.add_argument("--layer", help="of it (default: the first run's, or relu5_4)")
    parser.add_argument("--size", type=int, help="of the baselines' features, pixels (default: as --layer)")
    parser.add_argument(
        "--transform",
        choices=get_args(BaselineTransform),
        default="none",
        help="of the baselines' features (default: none)",
    )
    parser.add_argument(
        "--refinement",
        choices=get_args(Refinement),
        default="none",
        help="of the baselines' labels; a run has its own in decoder.refinement (default: none)",
    )
    parser.add_argument(
        "--clusters", type=int, help="of the baselines, background included (default: the first run's slots, or 6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the baselines")
    options = parser.parse_args(arguments)
    for name in options.baseline:
        if name not in _BASELINES:
            raise UserError(f"--baseline: unknown '{name}'{suggest(name, _BASELINES) or f'; known are {_KNOWN}'}")
    if options.read and (options.checkpoint or options.baseline):
        raise UserError("--read shows what was scored before; give it without --checkpoint and --baseline")
    if options.read:
        return options
    if not (options.checkpoint or options.baseline):
        raise UserError("nothing to score; give --checkpoint RUN, --baseline NAME or both")
    if not (options.checkpoint or options.shards):
        raise UserError("a baseline alone needs data; give --shards SHARDS")
    if options.clusters is not None and not 2 <= options.clusters <= 255:
        raise UserError(f"--clusters is {options.clusters}, needed 2 to 255: a background and at least one part")
    return options
