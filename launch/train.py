"""Trains: `accelerate launch launch/train.py --config configs/toy.yaml [train.total_steps=500 ...]`."""

import argparse
from pathlib import Path

from slotscops.config import load_config, to_yaml
from slotscops.core import console
from slotscops.train.fit import fit

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "toy.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file (default: configs/toy.yaml)")
    parser.add_argument("--resume", default="auto", metavar="auto|PATH|none", help="default: %(default)s")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--dry-run", action="store_true", help="take a few steps, say what the whole run would cost")
    parser.add_argument("--tracker", action="append", default=[], help="besides TensorBoard: wandb")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings, such as train.total_steps=500")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        console.say(to_yaml(config).rstrip())
        return 0
    return fit(config, arguments.resume, arguments.dry_run, arguments.tracker)


if __name__ == "__main__":
    console.run_command(main)
