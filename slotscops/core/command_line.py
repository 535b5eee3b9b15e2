"""How every command introduces itself: its name as the user typed it, one sentence, and one example."""

import argparse
import sys

# Where in the package a command lies, if not at `slotscops.NAME`.
_PLACES = {"choose-k": "train.choose_k"}


def command_parser(name: str, sentence: str, example: str, more: str = "", prog: str = "") -> argparse.ArgumentParser:
    """A parser whose `--help` opens with an example that can be copied.

    Args:
        name: of the command, such as `features`.
        sentence: what the command does.
        example: arguments of a typical call, without the name of the program.
        more: text that follows the sentence.
        prog: name of the program, where neither `slotscops NAME` nor `python -m` and its module started it.
    """
    prog = prog or program_name(name)
    paragraphs = [f"Example: {prog} {example}", sentence, more]
    return argparse.ArgumentParser(
        prog=prog,
        description="\n\n".join(filter(None, paragraphs)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def program_name(name: str) -> str:
    """`slotscops NAME` if the installed command started this process, otherwise `python -m` and the module."""
    called = sys.argv[0]
    return called if called.endswith(f"slotscops {name}") else f"python -m {module_name(name)}"


def module_name(name: str) -> str:
    """The module or package of a command, such as `slotscops.features`."""
    return f"slotscops.{_PLACES.get(name, name)}"
