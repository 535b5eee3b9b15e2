"""The command `slotscops`: imports and runs the one subcommand that is asked for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from slotscops import __version__
from slotscops.core import console
from slotscops.core.command_line import module_name
from slotscops.core.errors import UserError

# What each command does, in the order in which a project needs them.
COMMANDS = {
    "shard": "Turn annotated photos, or drawn toy photos, into WebDataset shards with an index and features.",
    "features": "Compute the teacher's features of every crop once, or verify them.",
    "choose-k": "Recommend a number of parts from short trainings, without any part label.",
    "train": "Train a model, alone or under accelerate launch.",
    "evaluate": "Score runs and baselines against the true parts.",
    "segment": "Find the parts in photos and make a page that shows them.",
    "app": "Show the parts of photos that are dropped onto a local page.",
    "export": "Write a trained model as ONNX or as PyTorch's exported program.",
    "report": "Write the HTML page of a run again.",
    "benchmark": "Measure speed and memory on this machine.",
}
_SINGLE_FILES = ("app", "export", "report")  # the other commands are packages


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `python -m slotscops` gives the path of this file, the installed command the path of its script.
    prog = "python -m slotscops" if Path(sys.argv[0]).name == "__main__.py" else "slotscops"
    if given and given[0] in COMMANDS:
        name, *rest = given
        # The command's parser takes the name that its help shows from here.
        sys.argv = [f"{prog} {name}", *rest]
        module = module_name(name) if name in _SINGLE_FILES else f"{module_name(name)}.__main__"
        code: int = import_module(module).main(rest)
        return code
    if given and not given[0].startswith("-"):
        from slotscops.core.errors import suggest

        remedy = suggest(given[0], COMMANDS) or f"; known are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{given[0]}'{remedy}")
    parser = _parser(prog)
    parser.parse_args(given)
    parser.print_help(sys.stderr)
    return 2


def _parser(prog: str) -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {sentence}" for name, sentence in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description=f"Example: {prog} shard --toy --out shards/toy\n\n"
        "Discover the parts of objects from photos without part labels.\n\n"
        f"commands:\n{listed}\n\n{prog} COMMAND --help describes one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slotscops {__version__}")
    return parser


def run() -> None:
    """Runs the command line and leaves the process with its exit code."""
    console.run_command(main)


if __name__ == "__main__":
    run()
