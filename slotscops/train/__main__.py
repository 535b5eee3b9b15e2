"""The command line of training: `slotscops train --config toy`, or `accelerate launch -m slotscops.train --config toy`.

Each loader worker imports the script that started the training again. If that script is `launch/train.py`, it imports
this file too. The training loop is therefore imported only inside `main`, so that workers start without it.
"""

import argparse
import json
from collections.abc import Sequence

from pydantic import TypeAdapter

from slotscops.config import Config, load_config, to_yaml
from slotscops.core import console, recipes
from slotscops.core.command_line import command_parser

_MORE = """\
For several processes: accelerate launch -m slotscops.train --config toy ...
Editors complete and check a YAML file of settings after `--print-schema > settings.schema.json` if its first line is:
  # yaml-language-server: $schema=settings.schema.json"""


def main(arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Trains, or prints settings or their schema. `prog` is the program's name in the help, if a script calls this."""
    options = _parse(arguments, prog)
    if options.print_schema:
        console.print_text(json.dumps(TypeAdapter(Config).json_schema(), indent=2))
        return 0
    config = load_config(recipes.find_config(options.config), options.overrides)
    if options.print_config:
        console.print_text(to_yaml(config).rstrip())
        return 0
    from slotscops.train.fit import fit

    return fit(config, options.resume, options.dry_run, options.tracker)


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    example = "--config toy run_dir=runs/first train.total_steps=500"
    parser = command_parser("train", "Train a model, alone or under accelerate launch.", example, _MORE, prog)
    recipes.add_config_option(parser, default=recipes.DEFAULT)
    parser.add_argument(
        "--resume", default="auto", metavar="auto|PATH|none",
        help="auto continues from the newest checkpoint in run_dir, PATH from that run or checkpoint, none refuses to "
        "continue (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of all settings and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="take a few steps, write nothing, say what the whole run would cost"
    )
    parser.add_argument(
        "--tracker", action="append", default=[], metavar="NAME",
        help="log here besides TensorBoard: wandb, mlflow, trackio or another tracker that Accelerate knows; may be "
        "given several times",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings, such as train.total_steps=500")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    console.run_command(main)
