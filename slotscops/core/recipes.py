"""The recipes that come with the package: the YAML files of `configs/`, named without `.yaml`."""

import argparse
from pathlib import Path

from slotscops.core.errors import UserError

DEFAULT = "toy"


def recipe_names() -> list[str]:
    """Names of all shipped recipes, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def add_config_option(parser: argparse.ArgumentParser, more: str = "", default: str | None = None) -> None:
    """Adds `--config`, whose value `find_config` takes.

    Args:
        more: of the help, after the recipes.
        default: the recipe of a command that needs one.
    """
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(
        "--config",
        metavar="FILE|RECIPE",
        default=default,
        help=f"a YAML file, or one of {', '.join(recipe_names())}{more}{shown}",
    )


def find_config(name_or_path: str) -> Path:
    """The YAML file behind `--config`, which takes a path or the name of a recipe.

    Raises:
        UserError: there is neither such a file nor a recipe of that name.
    """
    path = Path(name_or_path)
    names = recipe_names()
    if name_or_path in names:
        return _folder() / f"{name_or_path}.yaml"
    # If it is clearly meant as a path, the reader of settings reports why it cannot be read.
    if path.is_file() or path.suffix or path.name != name_or_path:
        return path
    raise UserError(
        f"--config {name_or_path}: no such file and no recipe of that name; the recipes are {', '.join(names)}"
    )


def _folder() -> Path:
    """`slotscops/configs` of an installed wheel, or `configs` of the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
