"""Computes the teacher's features of every crop once, or verifies them.

    python -m slotscops.features --shards SHARDS --config RECIPE [NAME=VALUE ...]
    python -m slotscops.features --shards SHARDS [--teacher vgg19] [--layer relu5_4] [--size 128] [--mirrored]
        [--components 64] [--store int8]

Runs as one process or under a launcher. Started again, it computes only what is missing.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import NamedTuple, get_args

from slotscops.config import Config, FeatureStore, load_config
from slotscops.core import console, recipes
from slotscops.core.address import hide_secrets
from slotscops.core.command_line import command_parser
from slotscops.core.errors import RunError, UserError
from slotscops.features.cache import FeatureCache, find_damage, open_cache, warn_if_random
from slotscops.features.compact import Compact
from slotscops.features.manifest import REMOVE_AND_REBUILD
from slotscops.features.teacher import Teacher
from slotscops.features.writer import build_cache
from slotscops.shard.index import open_dataset
from slotscops.shard.remote import check_local, shards_argument

_DEFAULT = Config().teacher


class Features(NamedTuple):
    """Which features a command computes: those that a training with the same settings reads."""

    network: str
    layer: str
    weights: str
    size: int  # side to which crops are resized for the teacher, pixels
    mirrored: bool
    compact: Compact


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    options.recipe = recipe_of(options)
    dataset = open_dataset(check_local(options.shards))
    asked = features_of(options, dataset.size, options.size)
    if options.verify:
        cache = open_cache(dataset, asked.layer, asked.size, None, asked.network, asked.mirrored, compact=asked.compact)
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
    teacher = Teacher(asked.layer, asked.weights, asked.network)
    show_cache(build_cache(dataset, teacher, asked.size, asked.mirrored, asked.compact))
    show_next_command(options, options.shards, dataset.size, asked)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "features",
        "Compute the teacher's features of every crop once, or verify them.",
        "--shards shards/toy --teacher-weights random:0",
    )
    parser.add_argument("--shards", type=shards_argument, required=True, help="folder written by slotscops shard")
    parser.add_argument(
        "--size", type=int, help="side to which crops are resized for the teacher, pixels (default: that of the crops)"
    )
    add_feature_options(parser)
    parser.add_argument("--verify", action="store_true", help="check every hash instead of computing")
    return parser


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that computes features."""
    recipes.add_config_option(
        parser,
        more=": the settings of the training that will read the features; sizes and teacher are taken from them, "
        "unless the options name others",
    )
    parser.add_argument(
        "--teacher", metavar="NETWORK", help=f"a torchvision network, or timm/NAME (default: {_DEFAULT.network})"
    )
    parser.add_argument("--layer", help=f"layer of the teacher; join several with + (default: {_DEFAULT.layer})")
    parser.add_argument(
        "--teacher-weights",
        help="imagenet, a .safetensors or .pth file, the URL of a .safetensors file, of which only the tensors that "
        "the teacher needs are fetched, or random:SEED (default: imagenet)",
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
        help="int8 stores 8 bits a value, with a lowest value and a step for each channel of each crop "
        f"(default: {_DEFAULT.store})",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="with --config: settings as given to the training"
    )


def recipe_of(options: argparse.Namespace) -> Config:
    """The settings that `--config` and NAME=VALUE name, or the defaults of all settings.

    Raises:
        UserError: settings without `--config`, no such file or recipe, or settings that are wrong.
    """
    if options.config is None and options.overrides:
        raise UserError(
            f"{options.overrides[0]}: settings NAME=VALUE go with --config FILE or RECIPE; give that too, or an option"
        )
    path = None if options.config is None else recipes.find_config(options.config)
    return load_config(path, options.overrides)


def features_of(options: argparse.Namespace, crop_size: int, size: int | None = None) -> Features:
    """The features that the options name. What they leave open, the settings in `options.recipe` say.

    Args:
        crop_size: side of the crops, pixels.
        size: side to which they are resized for the teacher, pixels; None leaves it open.
    """
    recipe: Config = options.recipe
    teacher = recipe.teacher
    components = teacher.components if options.components is None else options.components
    return Features(
        network=options.teacher or teacher.network,
        layer=options.layer or teacher.layer,
        weights=options.teacher_weights or teacher.weights or "imagenet",
        size=size or teacher.size or crop_size,
        mirrored=options.mirrored or recipe.data.mirror,
        compact=Compact(components, options.store or teacher.store),
    )


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


def show_next_command(options: argparse.Namespace, shards: object, crop_size: int, made: Features) -> None:
    """Prints the training command that reads these features, if `--config` says how to train.

    Args:
        shards: folder of the shards.
        crop_size: side of their crops, pixels.
        made: the features.
    """
    if options.config is None:
        return
    recipe: Config = options.recipe
    teacher = recipe.teacher
    needed = [
        ("data.shards", recipe.data.shards, shards),
        ("data.size", recipe.data.size, crop_size),
        ("teacher.network", teacher.network, made.network),
        ("teacher.layer", teacher.layer, made.layer),
        ("teacher.size", teacher.size or crop_size, made.size),
        ("teacher.components", teacher.components, made.compact.components),
        ("teacher.store", teacher.store, made.compact.store),
    ]
    settings = [f"{name}={value}" for name, theirs, value in needed if str(value) != str(theirs)]
    given = [setting for setting in options.overrides if not setting.startswith("data.shards=")]
    words = ["accelerate", "launch", "-m", "slotscops.train", "--config", options.config, *given, *settings]
    console.say(f"train with: {hide_secrets(shlex.join(words))}")


if __name__ == "__main__":
    console.run_command(main)
