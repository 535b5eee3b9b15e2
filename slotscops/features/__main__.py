"""Computes the teacher's features of every crop once, or checks them.

    python -m slotscops.features --shards SHARDS [--teacher vgg19] [--layer relu5_4] [--size 128] [--mirrored]

Works alone or under a launcher. A start over finished files does nothing twice.
"""

import argparse

from slotscops.core import console
from slotscops.core.errors import RunError
from slotscops.features.cache import FeatureCache, find_damage, open_cache, warn_if_random
from slotscops.features.manifest import REMOVE_AND_REBUILD
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.shard.index import open_dataset
from slotscops.shard.remote import check_local, shards_argument


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slotscops.features", description="Build or verify a feature cache."
    )
    parser.add_argument("--shards", type=shards_argument, required=True)
    parser.add_argument("--size", type=int, help="side of the crops for it, pixels (default: that of the shards)")
    add_teacher_options(parser)
    parser.add_argument("--verify", action="store_true", help="check every hash instead of building")
    options = parser.parse_args(arguments)
    dataset = open_dataset(check_local(options.shards))
    size = options.size or dataset.size
    if options.verify:
        cache = open_cache(dataset, options.layer, size, None, options.teacher, options.mirrored)
        caches = [cache] if cache.mirrored is None else [cache, cache.mirrored]
        entries = [entry for split in dataset.splits.values() for entry in split]
        damaged = [entry.name for one in caches for entry in entries if find_damage(one, entry)]
        if damaged:
            raise RunError(f"damaged feature files: {', '.join(damaged)}; {REMOVE_AND_REBUILD}")
        console.say("every feature file is what the manifest says")
        return 0
    teacher = Teacher(options.layer, options.teacher_weights, options.teacher)
    report(build_cache(dataset, teacher, size, options.mirrored))
    return 0


def add_teacher_options(parser: argparse.ArgumentParser) -> None:
    """What every command that builds features takes."""
    parser.add_argument("--teacher", default="vgg19", metavar="NETWORK", help="of torchvision (default: %(default)s)")
    parser.add_argument("--layer", default="relu5_4", help="of it; join several with + (default: %(default)s)")
    parser.add_argument(
        "--teacher-weights", default="imagenet", help="imagenet, a .safetensors or .pth file, random:SEED"
    )
    parser.add_argument("--mirrored", action="store_true", help="features of the mirrored crops too, for data.mirror")


def report(cache: FeatureCache) -> None:
    """Says what the cache holds and what it was made with."""
    for one in [cache] if cache.mirrored is None else [cache, cache.mirrored]:
        files, manifest = one.manifest["files"], one.manifest
        console.say(
            f"features {one.folder}: {len(files)} shards, {sum(row['bytes'] for row in files.values()) / 1e6:.1f} MB, "
            f"{manifest['network']} weights {manifest['weights']} (sha256 {manifest['weights_sha256'][:12]})"
        )
    if any(row["negative"] for row in cache.manifest["files"].values()):
        console.warn(
            f"{cache.folder}: has negative numbers, which a part basis without any can never rebuild; "
            "take a layer behind a ReLU"
        )
    warn_if_random(cache)


if __name__ == "__main__":
    console.run_command(main)
