"""Computes the teacher's features of every crop once, or verifies them.

    python -m slotscops.features --shards SHARDS [--teacher vgg19] [--layer relu5_4] [--size 128] [--mirrored]
        [--components 64] [--store int8]

Runs as one process or under a launcher. Started again, it computes only what is missing.
"""

import argparse
from typing import get_args

from slotscops.config import FeatureStore
from slotscops.core import console
from slotscops.core.command_line import command_parser
from slotscops.core.errors import RunError
from slotscops.features.cache import FeatureCache, find_damage, open_cache, warn_if_random
from slotscops.features.compact import Compact
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
        form = compact_of(options)
        cache = open_cache(dataset, options.layer, size, None, options.teacher, options.mirrored, compact=form)
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
    show_cache(build_cache(dataset, teacher, size, options.mirrored, compact_of(options)))
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
        help="imagenet, a .safetensors or .pth file, the URL of a .safetensors file, of which only the tensors that "
        "the teacher needs are fetched, or random:SEED (default: %(default)s)",
    )
    parser.add_argument(
        "--mirrored", action="store_true", help="compute features of the mirrored crops too, for data.mirror"
    )
    parser.add_argument(
        "--components",
        type=int,
        metavar="D",
        help="store D principal components of each feature vector instead of all its channels",
    )
    parser.add_argument(
        "--store",
        choices=get_args(FeatureStore),
        default="float16",
        help="int8 stores 8 bits a value, with a lowest value and a step for each channel of each crop "
        "(default: %(default)s)",
    )


def compact_of(options: argparse.Namespace) -> Compact:
    """The form of the cache that the options name."""
    return Compact(options.components, options.store)


def show_cache(cache: FeatureCache) -> None:
    """Prints what the cache holds and what it was made with."""
    for one in [cache] if cache.mirrored is None else [cache, cache.mirrored]:
        files, manifest = one.manifest["files"], one.manifest
        console.say(
            f"features {one.folder}: {len(files)} shards, {sum(row['bytes'] for row in files.values()) / 1e6:.1f} MB, "
            f"{manifest['network']} weights {manifest['weights']} (sha256 {manifest['weights_sha256'][:12]})"
        )
    if cache.compact != Compact():
        kept = ""
        if cache.compact.components is not None:
            kept = f"keep {cache.manifest['explained_variance']:.1%} of the variance; "
        console.say(f"features {cache.folder}: {kept}train with {' '.join(cache.compact.settings())}")
    if cache.has_negative:
        console.say(
            f"features {cache.folder}: hold negative numbers, which parts rebuild with basis.kind=free, under the "
            "semantic and the mixture loss"
        )
    warn_if_random(cache)


if __name__ == "__main__":
    console.run_command(main)
