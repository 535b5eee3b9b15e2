"""Recommends a number of parts from short trainings, without any part label.

    slotscops choose-k --shards SHARDS --range 3-10 [--config best-cpu] [NAME=VALUE ...]
    accelerate launch -m slotscops.train.choose_k --shards SHARDS --range 3-10 ...

Each loader worker imports this file again, so what trains is imported only inside `main`.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from slotscops.config import load_config
from slotscops.core import console, recipes
from slotscops.core.address import hide_secrets
from slotscops.core.command_line import command_parser
from slotscops.core.errors import UserError

_MOST = 254  # as slots.num_parts


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    numbers = read_range(options.range)
    if options.repeats < 2 or options.steps < 1 or options.held_out < 1:
        raise UserError("--repeats must be 2 or more, --steps and --held-out 1 or more")
    overrides = [f"data.shards={options.shards}", *options.overrides]
    if any(override.startswith("slots.num_parts=") for override in overrides):
        raise UserError("slots.num_parts is what --range tries; leave it out")
    config = load_config(recipes.find_config(options.config), overrides)
    out = options.out or Path(f"{config.run_dir}-choose-k")

    from slotscops.train.choose_k.search import Amount, choose_k
    from slotscops.train.processes import start_accelerator

    amount = Amount(options.steps, options.repeats, options.held_out)
    with_braces = [word.replace("{", "{{").replace("}", "}}") for word in overrides]
    words = ["-m", "slotscops.train", "--config", options.config, *with_braces]
    command = hide_secrets(f"accelerate launch {shlex.join(words)} slots.num_parts={{}}")
    accelerator = start_accelerator(config)
    content = choose_k(config, numbers, amount, out, accelerator, command)
    accelerator.end_training()
    show(content, out)
    return 0


def read_range(text: str) -> list[int]:
    """The numbers of `3-10`.

    Raises:
        UserError: if these are not two rising numbers from 2 to 254.
    """
    found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 2 <= first < last <= _MOST:
        raise UserError(f"--range {text}: give two rising numbers of parts from 2 to {_MOST}, such as 3-10")
    return list(range(first, last + 1))


def show(content: dict, out: Path) -> None:  # type: ignore[type-arg]
    """Prints the table, the recommendation and the command to go on with."""
    from slotscops.train.choose_k.page import PAGE, cells_of, number_text

    rows = [cells_of(row) for row in content["measured"]]
    console.show_table("numbers of parts", ("parts", "stability", "likelihood", "dead", "seconds"), rows)
    if content["recommended"] is None:
        console.say("no recommendation: parts died, or trainings collapsed, at every number; try smaller numbers")
    else:
        console.say(
            f"recommended: {content['recommended']} parts, {content['rule']} "
            f"({number_text(content['least_stability'], '.3f')} or more). {content['note']}"
        )
        console.say(f"train with: {content['next_command']}")
    console.say(f"{out / PAGE}: the plot")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "choose-k",
        "Recommend a number of parts from short trainings, without any part label.",
        "--shards shards/toy --range 2-6",
        "Each number is trained in pairs on disjoint halves of the photos. A number is good if both halves of a pair\n"
        "find the same parts in held-out photos. Started again, it keeps the numbers that it has finished.",
    )
    parser.add_argument("--shards", required=True, help="folder written by slotscops shard, with features")
    parser.add_argument("--range", required=True, metavar="A-B", help="numbers of parts to try, such as 3-10")
    recipes.add_config_option(parser, default=recipes.DEFAULT)
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each training, the first of the recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="pairs of trainings for each number of parts (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=256, metavar="PHOTOS",
        help="training photos on which the networks are compared, at most a quarter of them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for choose_k.json and choose_k.html (default: run_dir of the recipe + -choose-k)",
    )
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings, such as train.batch_size=32")
    return parser


if __name__ == "__main__":
    console.run_command(main)
