"""The package imports and trains without any optional package, and asks for none of them."""

import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from commands import ROOT, metrics, python, training
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Hides the modules named in the first argument, then trains. Prints which of them our own code asked for.
_TRAIN_WITHOUT = """
import sys
from pathlib import Path

hidden, package = set(sys.argv[1].split(",")), str(Path("slotscops").resolve())
asked = set()

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(package):
            asked.add(name)
        return None

sys.meta_path[:] = map(Without, sys.meta_path)
from slotscops.train.__main__ import main
code = main(sys.argv[2:])
print("asked for:", *sorted(asked))
sys.exit(code)
"""


def names(lines: list[str]) -> set[str]:
    """The distributions that requirements name, but for those of extras and of other systems."""
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }


def with_all_they_need(distributions: set[str]) -> set[str]:
    found, new = set(distributions), set(distributions)
    while new:
        needed = set()
        for distribution in new:
            with suppress(PackageNotFoundError):
                needed |= names(requires(distribution) or [])
        new = needed - found
        found |= new
    return found


def optional_modules() -> set[str]:
    """The top-level modules of all packages that only extras need, those of the tests included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = set().union(*map(names, project["optional-dependencies"].values())) - {"slotscops"}
    optional -= with_all_they_need(names(project["dependencies"]))
    modules = {name.replace("-", "_") for name in optional}  # of those that are not installed
    for module, owners in packages_distributions().items():
        if {canonicalize_name(owner) for owner in owners} <= optional:
            modules.add(module)
    return modules


def test_a_training_needs_and_asks_for_no_optional_package(toy_shards: Path, tmp_path: Path) -> None:
    modules = optional_modules()
    assert {"timm", "wandb", "mlflow", "datasets", "onnx", "aiohttp", "pillow_heif"} <= modules
    assert not {"torch", "accelerate", "PIL", "yaml"} & modules
    small = training([], toy_shards, tmp_path, "train.total_steps=2", "train.eval_every_steps=2")[1:]
    done = python("-c", _TRAIN_WITHOUT, ",".join(sorted(modules)), *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "asked for:"
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
