"""Computes the teacher's features of every crop once, or verifies them.

    python -m slotscops.features --shards SHARDS [--teacher vgg19] [--layer relu5_4] [--size 128] [--mirrored]

Runs as one process or under a launcher. Started again, it computes only what is missing.
"""

import argparse

from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import RunError
from slotscops.features.cache import FeatureCache, find_damage, open_cache, warn_if_random
from slotscops.features.manifest import REMOVE_AND_REBUILD
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.shard.index import open_dataset
from slotscops.shard.remote import check_local, shards_argument


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(
        "features",
        "Compute the teacher's features of every crop once, or verify them.",
        "--shards shards/toy --teacher-weights random:0",
    )
    parser.add_argument("--shards", type=shards_argument, required=True, help="folder written by slotscops shard")
    parser.add_argument(
        "--size", type=int, help="side to which crops are resized for the teacher, pixels (default: that of the shards)"
    )
    add_teacher_options(parser)
    parser.add_argument("--verify", action="store_true", help="check every hash instead of computing")
    options = parser.parse_args(arguments)
    dataset = open_dataset(check_local(options.shards))
    size = options.size or dataset.size
    if options.verify:
        cache = open_cache(dataset, options.layer, size, None, options.teacher, options.mirrored)
        caches = [cache] if cache.mirrored is None else [cache, cache.mirrored]
        entries = [entry for split in dataset.splits.values() for entry in split]
        damaged: dict[str, bool] = {}
        for one in caches:
            for entry in entries:
                for line in find_damage(one, entry):
                    console.say(line)
                    damaged[entry.name] = True
        if damaged:
            raise RunError(f"damaged feature files: {', '.join(damaged)}; {REMOVE_AND_REBUILD}")
        console.say("every feature file matches its manifest")
        return 0
    teacher = Teacher(options.layer, options.teacher_weights, options.teacher)
    show_cache(build_cache(dataset, teacher, size, options.mirrored))
    return 0


def add_teacher_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that computes features."""
    parser.add_argument(
        "--teacher", default="vgg19", metavar="NETWORK", help="a torchvision network (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", default="relu5_4", help="layer of the teacher; join several with + (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-weights",
        default="imagenet",
        help="imagenet, a .safetensors or .pth file, or random:SEED (default: %(default)s)",
    )
    parser.add_argument(
        "--mirrored", action="store_true", help="compute features of the mirrored crops too, for data.mirror"
    )


def show_cache(cache: FeatureCache) -> None:
    """Prints what the cache holds and what it was made with."""
    for one in [cache] if cache.mirrored is None else [cache, cache.mirrored]:
        files, manifest = one.manifest["files"], one.manifest
        console.say(
            f"features {one.folder}: {len(files)} shards, {sum(row['bytes'] for row in files.values()) / 1e6:.1f} MB, "
            f"{manifest['network']} weights {manifest['weights']} (sha256 {manifest['weights_sha256'][:12]})"
        )
    if any(row["negative"] for row in cache.manifest["files"].values()):
        console.warn(
            f"{cache.folder}: has negative values, which a non-negative part basis cannot rebuild; "
            "choose a layer after a ReLU"
        )
    warn_if_random(cache)


if __name__ == "__main__":
    console.run_command(main)
