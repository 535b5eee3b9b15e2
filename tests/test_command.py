import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
import yaml
from commands import ROOT, python
from setuptools import find_packages

import slotscops
from slotscops import __main__ as command
from slotscops.config import setting_names
from slotscops.core.command_line import module_name
from slotscops.core.errors import UserError
from slotscops.core.recipes import find_config, recipe_names
from slotscops.train import __main__ as training

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
INTRODUCED = list(command.COMMANDS)


def module_of(name: str) -> ModuleType:
    is_file = name in ("app", "export", "report")
    return import_module(module_name(name) if is_file else f"{module_name(name)}.__main__")


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter has imported after it ran the code."""
    done = python("-c", f"{code}\nimport sys\nprint('modules:', *sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("modules:", 1)[1].split())


def test_help_lists_every_command_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for name, sentence in command.COMMANDS.items():
        assert sentence.count(".") == 1
        assert any(line.split(maxsplit=1) == [name, sentence] for line in printed.splitlines())


@pytest.mark.parametrize("name", INTRODUCED)
def test_help_of_a_command_opens_with_an_example_and_the_installed_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/slotscops", name, "--help"])
    with pytest.raises(SystemExit):
        command.main()
    usage, example, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: slotscops {name} ")
    assert example.startswith(f"Example: slotscops {name} ")


@pytest.mark.parametrize("name", INTRODUCED)
def test_a_command_started_as_a_module_shows_that_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(name)
    monkeypatch.setattr(sys, "argv", [str(module.__file__), "--help"])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    usage, example, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: python -m {module_name(name)} ")
    assert example.startswith(f"Example: python -m {module_name(name)} ")


def test_without_a_command_the_list_is_printed_and_the_exit_code_is_that_of_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["slotscops"])
    assert command.main() == 2
    assert "benchmark" in capsys.readouterr().err


def test_a_misspelt_command_names_the_closest_one() -> None:
    with pytest.raises(UserError, match="unknown command 'trian'; did you mean 'train'"):
        command.main(["trian"])
    with pytest.raises(UserError, match="known are shard, features, choose-k, train"):
        command.main(["xyz"])


def test_a_command_runs_as_python_m_slotscops() -> None:
    done = python("-m", "slotscops", "train", "--print-config", "seed=7")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["seed"] == 7
    mistaken = python("-m", "slotscops", "train", "--config", "tpy")
    assert mistaken.returncode == 2
    assert mistaken.stderr.count("\n") == 1


def test_the_command_imports_nothing_of_the_commands_that_were_not_asked_for() -> None:
    code = "from slotscops.__main__ import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    loaded = modules_after(code)
    assert "slotscops.__main__" in loaded
    assert not loaded & {"torch", "pydantic", *map(module_name, command.COMMANDS)}
    loaded = modules_after("from slotscops.__main__ import main\nmain(['train', '--print-config'])")
    assert "slotscops.train.__main__" in loaded
    assert not loaded & {"torch", "slotscops.shard", "slotscops.features", "slotscops.segment", "slotscops.train.fit"}


def test_crops_are_scored_without_the_segmenter_and_the_library_of_the_hub() -> None:
    loaded = modules_after("import slotscops.evaluate.__main__")
    assert "slotscops.evaluate.scoreboard" in loaded
    assert not loaded & {"huggingface_hub", "slotscops.segment", "slotscops.evaluate.whole_photos"}


def test_a_loader_worker_starts_without_the_networks_and_their_libraries() -> None:
    networks = {"torchvision", "sklearn", "accelerate", "slotscops.model", "slotscops.train.loop"}
    loaded = modules_after("import slotscops.loader.batches")
    assert "torch.utils.data" in loaded
    assert not loaded & {*networks, "slotscops.train"}
    # A worker imports the script that started the training once more, under this name.
    script = str(ROOT / "launch" / "train.py")
    loaded = modules_after(f"import runpy\nrunpy.run_path({script!r}, run_name='__mp_main__')")
    assert "slotscops.train.__main__" in loaded
    assert not loaded & networks


def test_a_recipe_is_found_by_its_name_and_a_file_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == sorted(path.stem for path in RECIPES)
    assert find_config("toy") == ROOT / "configs" / "toy.yaml"
    (tmp_path / "toy").touch()
    assert find_config("toy") == ROOT / "configs" / "toy.yaml"
    assert find_config("./toy") == Path("toy")
    (tmp_path / "mine").touch()
    assert find_config("mine") == Path("mine")
    assert find_config("nowhere.yaml") == Path("nowhere.yaml")


def test_an_unknown_recipe_is_one_line_that_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="--config tpy: no such file and no recipe of that name") as caught:
        find_config("tpy")
    message = str(caught.value)
    assert "\n" not in message
    assert all(path.stem in message for path in RECIPES)


def test_training_without_a_config_takes_the_toy_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == "runs/toy"


def printed_schema(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert training.main(["--print-schema"]) == 0
    schema: dict[str, object] = json.loads(capsys.readouterr().out)
    return schema


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_config_fits_the_printed_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = printed_schema(capsys)
    settings = yaml.safe_load(path.read_text())
    jsonschema.validate(settings, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(settings | {"sedd": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(settings | {"train": {"total_steps": "many"}}, schema)


def test_the_schema_knows_every_setting_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    schema = printed_schema(capsys)
    for name in setting_names():
        *sections, leaf = name.split(".")
        value: object = {leaf: {"no such": "value"}}
        for section in reversed(sections):
            value = {section: value}
        with pytest.raises(jsonschema.ValidationError) as caught:
            jsonschema.validate(value, schema)
        assert list(caught.value.absolute_path)[: len(sections) + 1] == [*sections, leaf], name


def test_the_list_of_packages_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted([*find_packages(str(ROOT), include=["slotscops*"]), "slotscops.configs"])


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(slotscops.__file__).with_name("py.typed").is_file()
