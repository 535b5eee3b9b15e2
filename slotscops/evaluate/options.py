"""The options of `python -m slotscops.evaluate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from slotscops.config import BaselineTransform, FeatureStore, Refinement
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError, suggest
from slotscops.core.files import why_not_writable
from slotscops.datasets.merging import PRESETS
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
    if options.page and not options.read:
        raise UserError("--page makes a page of scores that were written before; give it with --read FILE...")
    for option in ("page", "json"):
        path = getattr(options, option)
        if path is not None and (refusal := why_not_writable(path)):  # the scoring may take hours
            raise UserError(f"--{option} {path}: {refusal}")
    if options.read:
        return options
    if not (options.checkpoint or options.baseline):
        raise UserError("nothing to score; give --checkpoint RUN, --baseline NAME or both")
    if not (options.checkpoint or options.shards):
        raise UserError("a baseline alone needs data; give --shards SHARDS")
    if options.parts and not options.photos:
        raise UserError("--parts goes with --photos: it names the label maps of a folder of photos")
    if options.clusters is not None and not 2 <= options.clusters <= 255:
        raise UserError(f"--clusters is {options.clusters}, needed 2 to 255: a background and at least one part")
    return options


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
    _add_output_options(parser)
    _add_protocol_options(parser)
    _add_baseline_options(parser)
    return parser


def _add_protocol_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos", type=Path, metavar="ROOT",
        help="also score the uncropped photos, found in what shard was given as --root or --images (for the toy, "
        "SHARDS/photos)",
    )  # fmt: skip
    parser.add_argument("--parts", type=Path, metavar="DIR", help="for --photos: what shard was given as --parts")
    parser.add_argument(
        "--merge", metavar="NAME_OR_FILE",
        help=f"score several true parts as one: {', '.join(PRESETS)}, or a YAML file 'CLASS: {{NEW: [PART, ...]}}'",
    )  # fmt: skip
    parser.add_argument(
        "--teacher-weights",
        help="for --photos: weights of the network whose features the methods read, if they came from a file (default: "
        "those of the training)",
    )
    parser.add_argument(
        "--landmarks",
        action="store_true",
        help="also score how well the centres of the found parts predict those of the true parts; this reads the "
        "training split",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full", action="store_true", help="print every protocol, score and class, not the small table"
    )
    parser.add_argument("--json", type=Path, help="file for the scores, not multiplied by 100")
    parser.add_argument(
        "--read", type=Path, nargs="+", default=[], metavar="FILE", help="show the scores that --json wrote earlier"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE.html", help="for --read: file for a page with the scores, costs and pictures"
    )


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
        help="the baselines read the compact cache of D components (default: the first run's)",
    )
    parser.add_argument(
        "--store",
        choices=get_args(FeatureStore),
        help="the baselines read the cache with numbers of this kind (default: the first run's)",
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
