"""Turns PASCAL-Part into WebDataset shards with an index and the teacher's features.

    python -m slotscops.shard --root DIR --out SHARDS [--classes horse,cow] --config RECIPE [NAME=VALUE ...]
    python -m slotscops.shard --root DIR --out SHARDS [--classes horse,cow] [--size 128] [--teacher-weights FILE]
    python -m slotscops.shard --images DIR [--parts DIR] --out SHARDS [--val-share 0.1] [--class-name NAME]
    python -m slotscops.shard --toy --out shards/toy
    python -m slotscops.shard --root DIR --out SHARDS --context 0.5,0.5
    python -m slotscops.shard --inspect SHARDS [--out FILE.png]
    python -m slotscops.shard --verify SHARDS
    python -m slotscops.shard --card SHARDS

Runs as one process or under a launcher. If it was interrupted, start it again: it finishes what is missing.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from slotscops.config import Config
from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError
from slotscops.core.pixels import DEFAULT_CONTEXT, Context
from slotscops.core.pool import usable_cores
from slotscops.datasets.pascal_part.classes import PART_NAMES, check_class_names
from slotscops.datasets.pascal_part.scan import BOX_SHARE
from slotscops.datasets.pascal_part.source import open_pascal_part
from slotscops.datasets.photo_folder import PhotoFolder
from slotscops.datasets.sources import SPLITS
from slotscops.datasets.toy import tree as toy
from slotscops.features.__main__ import add_feature_options, features_of, recipe_of, show_cache, show_next_command
from slotscops.features.teacher import Teacher
from slotscops.features.verify import verify_shards
from slotscops.features.writer import build_cache
from slotscops.shard.counts import count_split
from slotscops.shard.overview import inspect_shards
from slotscops.shard.remote import check_local, is_remote, shards_argument
from slotscops.shard.writer import Outcome, ShardSettings, claimed_drawing, write_shards

_MAX_CONTEXT = 10.0  # box sides; the object is then 1/21 of the crop's side
_LISTED = 20  # damaged files named at the end; all are in index/left_out.json


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.inspect:
        inspect_shards(options.inspect, options.out)
        return 0
    if options.verify:
        return verify_shards(options.verify, options.workers)
    if options.card:
        # Imported here, because it imports huggingface_hub, which the shards themselves do not need.
        from slotscops.shard.card import check_place, write_card

        check_place(options.card_folder)
        if options.out is None:
            write_card(options.card_folder)
            return 0
    settings, source = _settings(options), _source_text(options)
    # Built before any work, so that missing weights stop the command at once and not after an hour.
    asked = features_of(options, options.size)
    teacher = None if options.no_features else Teacher(asked.layer, asked.weights, asked.network)
    root = options.out / "photos" if options.toy else options.root
    if options.toy:
        # The plan is written after the whole tree. If a tree exists, the plan checks that these options drew it.
        numbers = {"num_train": options.toy_train, "num_val": options.toy_val, "seed": options.toy_seed}
        with claimed_drawing(options.out, numbers) as is_needed:
            if is_needed:
                toy.write_tree(root, **numbers)
    if options.images:
        folder = PhotoFolder(options.images, options.parts, options.val_share, options.class_name)
        outcome = write_shards(folder, options.out, settings, options.workers, source)
    else:
        with open_pascal_part(root, options.out / ".unpacked") as pascal_part:
            outcome = write_shards(pascal_part, options.out, settings, options.workers, source)
    _show(outcome, options.out)
    if teacher is not None:
        show_cache(build_cache(outcome.dataset, teacher, asked.size, asked.mirrored, asked.compact))
        show_next_command(options, options.out, options.size, asked)
    if options.card:
        write_card(options.out)
    return 1 if options.strict and outcome.num_damaged else 0


def _settings(options: argparse.Namespace) -> ShardSettings:
    if options.images:
        classes = [options.class_name]
    else:
        classes = check_class_names(options.classes.split(",")) if options.classes else list(PART_NAMES)
    return ShardSettings(
        classes=classes,
        size=options.size,
        min_box_share={split: _min_box_share(options, split) for split in SPLITS},
        samples_per_shard=options.samples_per_shard,
        context=options.context,
    )


def _source_text(options: argparse.Namespace) -> str:
    """What `index/plan.json` says of the photos; `slotscops.shard.card.command_options` reads it."""
    if options.toy:
        return f"toy, seed {options.toy_seed}, {options.toy_train} + {options.toy_val} photos"
    if options.images:
        return f"photos, parts {options.parts is not None}, val {options.val_share}"
    return "files"


def _min_box_share(options: argparse.Namespace, split: str) -> float:
    """The option if it was given; otherwise 0 for --images, which keeps all photos, and the default for the split."""
    asked: float | None = getattr(options, f"min_box_{split}")
    return asked if asked is not None else 0.0 if options.images else BOX_SHARE[split]


def _context(text: str) -> Context:
    """SHARE or SHARE,JITTER.

    Raises:
        UserError: no such numbers, or the object would be cut off.
    """
    try:
        share, jitter = (float(number) for number in f"{text},0".split(",")[:2])
        is_good = text.count(",") <= 1 and 0 <= share <= _MAX_CONTEXT and not math.isnan(jitter)
    except ValueError:
        is_good = False
    if not is_good:
        raise UserError(f"--context is {text!r}, needed SHARE or SHARE,JITTER, such as 0.5,0.5: 0 to {_MAX_CONTEXT:g}")
    if not 0 <= jitter <= share:
        raise UserError(
            f"--context is {text!r}, needed a jitter of 0 to {share:g}, which is SHARE: the object would be cut off"
        )
    return Context(share, jitter)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    options.recipe = recipe_of(options)
    if options.size is None:
        options.size = options.recipe.data.size
    makes_shards = bool(options.root or options.toy or options.images)
    if not (makes_shards or options.inspect or options.verify or options.card):
        parser.error("one of the arguments --root --toy --images --inspect --verify or --card SHARDS is required")
    if options.card not in (None, True) and (makes_shards or options.inspect or options.verify or options.out):
        parser.error("--card SHARDS goes alone; where shards are made, give --card without a folder")
    if options.card is True and not makes_shards:
        parser.error("--card needs the folder of the shards")
    options.card_folder = check_local(options.out if options.card is True else options.card) if options.card else None
    if options.out is None and makes_shards:
        parser.error("the following arguments are required: --out")
    if options.out is not None:
        options.out = check_local(options.out)
    if options.verify and is_remote(options.verify):
        raise UserError(f"{options.verify}: files of a URL are verified when fetched; give --verify the folder itself")
    options.class_name = " ".join(options.class_name.split())  # no-break spaces become plain ones
    if not options.class_name.isprintable() or not options.class_name:
        raise UserError(f"--class-name is {options.class_name!r}, needed a name in printable characters")
    if options.parts and not options.images:
        parser.error("--parts goes with --images")
    options.context = _context(options.context)
    if options.images and not options.parts and options.context != DEFAULT_CONTEXT:
        raise UserError("--context needs the boxes of objects; photos without --parts are taken whole")
    if not 0 <= options.val_share <= 1:
        raise UserError(f"--val-share is {options.val_share}, needed 0 to 1")
    for name, least in (("size", 32), ("samples_per_shard", 1), ("workers", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, needed at least {least}")
    return options


def _parser() -> argparse.ArgumentParser:
    sentence = "Turn annotated photos, or drawn toy photos, into WebDataset shards with an index and features."
    parser = command_parser("shard", sentence, "--toy --out shards/toy")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--root", type=Path, help="folder that holds VOCdevkit and Annotations_Part, or their archives")
    source.add_argument("--toy", action="store_true", help="draw toy photos into OUT/photos and shard them")
    source.add_argument(
        "--images", type=Path, help="folder of photos that show one object each; train/ and val/ are splits"
    )
    source.add_argument(
        "--inspect",
        type=shards_argument,
        metavar="SHARDS",
        help="print statistics and draw a sheet of crops (--out FILE.png)",
    )
    source.add_argument(
        "--verify", type=shards_argument, metavar="SHARDS", help="check every hash and name what is damaged"
    )
    parser.add_argument(
        "--card", type=shards_argument, nargs="?", const=True, metavar="SHARDS",
        help="write a data set card for the Hugging Face hub into SHARDS, or into the shards that are being made",
    )  # fmt: skip
    parser.add_argument("--parts", type=Path, help="for --images: folder of label PNGs; its parts.txt names the labels")
    parser.add_argument(
        "--val-share", type=float, default=0.1, help="for --images: share of the photos in the val split (default: 0.1)"
    )
    parser.add_argument("--class-name", default="object", help="for --images: class of all photos (default: object)")
    parser.add_argument("--out", type=shards_argument, help="folder for the shards")
    parser.add_argument("--classes", help="VOC classes to shard, separated by commas (default: all 20)")
    parser.add_argument("--size", type=int, help=f"side of the crops, pixels (default: {Config().data.size})")
    parser.add_argument(
        "--context", default=f"{DEFAULT_CONTEXT.share:g}", metavar="SHARE[,JITTER]",
        help="surroundings on every side of an object's box, as a share of its longer side, and by how much the crop "
        "is moved at random (default: %(default)s); a sample's crop is always the same",
    )  # fmt: skip
    add_feature_options(parser)
    parser.add_argument(
        "--no-features", action="store_true", help="write shards without features, which slotscops features adds later"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="objects in one tar (default: %(default)s)")
    for split in SPLITS:
        share = BOX_SHARE[split]
        parser.add_argument(
            f"--min-box-{split}", type=float, metavar="SHARE",
            help=f"smallest share of the image that the box of a {split} object must exceed (default: {share})",
        )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="processes that read and crop photos (default: all cores)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any file was damaged or passed over")
    parser.add_argument("--toy-train", type=int, default=600, help="toy photos to train on (default: 600)")
    parser.add_argument("--toy-val", type=int, default=150, help="toy photos to score on (default: 150)")
    parser.add_argument("--toy-seed", type=int, default=0, help="seed of the toy photos (default: %(default)s)")
    return parser


def _show(outcome: Outcome, out: Path) -> None:
    """A table of what was written, and what was left out and why."""
    if not console.is_main():
        return
    dataset = outcome.dataset
    rows = []
    for split in SPLITS:
        counts = count_split(dataset, split)
        for name in [name for name in dataset.class_names if counts["objects", name]]:
            megabytes = counts["bytes", name] / 1e6
            cells = [f"{counts[what, name]:,}" for what in ("images", "objects", "parts")]
            rows.append((name, split, *cells, f"{megabytes:.2f}"))
    console.show_table(str(out), ("class", "split", "images", "objects", "parts", "MB"), rows, 2)
    reasons = Counter((item.kind, item.class_name or "-", item.split or "-") for item in outcome.left_out)
    if reasons:
        left = [(kind, name, split, f"{count:,}") for (kind, name, split), count in sorted(reasons.items())]
        console.show_table("left out", ("reason", "class", "split", "objects or files"), left, 3)
        console.say(f"each with its reason: {out / 'index' / 'left_out.json'}")
    damaged = [item for item in outcome.left_out if item.damaged]
    for item in damaged[:_LISTED]:
        console.warn(f"left out {item.image}: {item.reason}")
    if len(damaged) > _LISTED:
        console.warn(f"left out {len(damaged) - _LISTED} more damaged files")


if __name__ == "__main__":
    console.run_command(main)
