"""The package imports and trains without any optional package, and asks for none of them."""

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from commands import ROOT, metrics, python, training

# Hides the modules named in the first argument, then trains. Prints which of them our own code asked for.
_TRAIN_WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

hidden, package = set(sys.argv[1].split(",")), str(Path("slotscops").resolve())
asked = set()

class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(package):
                asked.add(name)
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hide())
from slotscops.train.__main__ import main
code = main(sys.argv[2:])
print("asked for:", *sorted(asked))
sys.exit(code)
"""


def optional_modules() -> set[str]:
    """The top-level modules of all optional packages, and of those that pyproject.toml lists only for the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [
        {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", line)[0].lower()) for line in lines}
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
    ]
    optional = set().union(*names[1:]) - names[0] - {"slotscops"}
    modules = {name.replace("-", "_") for name in optional}  # of those that are not installed
    for module, distributions in packages_distributions().items():
        owners = {re.sub(r"[-_.]+", "-", name.lower()) for name in distributions}
        if owners <= optional:
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
