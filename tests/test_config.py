import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import slotscops
from slotscops.config import BestScore, Config, config_from_mapping, load_config, setting_names, to_mapping, to_yaml
from slotscops.core.claims import differences
from slotscops.core.errors import UserError
from slotscops.core.records import Batch
from slotscops.metrics.protocols import Prediction, ProtocolScores


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_without_a_file_every_setting_has_its_default() -> None:
    assert load_config(None) == Config()


def test_the_printed_settings_read_back_as_the_same_settings(tmp_path: Path) -> None:
    config = load_config(None, ["train.learning_rate=3e-3", "slots.init=shared_gaussian", "teacher.size=256"])
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "train: {total_steps: 7, batch_size: 4}"), ["train.total_steps=9"])
    assert (config.train.total_steps, config.train.batch_size) == (9, 4)


def test_a_folder_called_like_a_number_stays_text() -> None:
    assert load_config(None, ["run_dir=2020"]).run_dir == "2020"


def test_a_bare_no_in_yaml_means_no_mixed_precision(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "train: {mixed_precision: no}")).train.mixed_precision == "no"
    assert load_config(None, ["train.mixed_precision=no"]).train.mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("train: {learning_rate: 2e-4}", "write 2.0e-4"),
        ("train: {learning_rat: 2.0e-4}", "did you mean 'train.learning_rate'"),
        ("learning_rate: 0.1", "did you mean 'train.learning_rate'"),
        ("sedd: 1", "did you mean 'seed'"),
        ("train: {total_steps: 1.5}", "valid integer"),
        ('train: {total_steps: "5"}', "without quotes"),
        ("train: {total_steps: 0}", "greater than 0"),
        ("train: {clip_norm: .inf}", "finite"),
        ("train: {clip_norm: .nan}", "finite"),
        ("train: {mixed_precision: fp16}", "'no' or 'bf16'"),
        ("slots: 3", "section of settings"),
        ("slots: {init: random}", "'learned', 'shared_gaussian' or 'image_conditioned'"),
        ("[1, 2]", "needed settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistaken_file_is_one_line_that_names_file_and_remedy(tmp_path: Path, text: str, needed: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert needed in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("override", ["train.total_steps", "=3", "train.total_step=3", "seed.x=1", "train.seed=two"])
def test_a_mistaken_override_is_refused(override: str) -> None:
    with pytest.raises(UserError):
        load_config(None, [override])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(Path("nowhere.yaml"))


@given(st.sampled_from([name for name in setting_names() if "." in name]), st.characters(categories=["Ll"]))
def test_a_misspelt_setting_is_always_refused_by_name(name: str, letter: str) -> None:
    section, leaf = name.split(".")
    with pytest.raises(UserError, match="unknown setting"):
        config_from_mapping({section: {f"{leaf}_{letter}": 1}}, "test")


def test_differences_names_what_differs() -> None:
    first, second = to_mapping(Config()), to_mapping(load_config(None, ["slots.num_parts=3", "seed=4"]))
    assert differences(first, second) == ["seed", "slots.num_parts"]


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_config_can_be_read_and_opens_with_its_command(path: Path) -> None:
    load_config(path)
    opening = path.read_text().split("\n\n")[0]
    assert "accelerate launch launch/train.py --config configs/" + path.name in opening
    assert "Score" in opening
    assert yaml.safe_load(path.read_text())


def test_each_choice_of_words_is_written_in_config_alone() -> None:
    package = Path(slotscops.__file__).parent
    elsewhere = [path for path in package.rglob("*.py") if "Literal[" in path.read_text()]
    assert elsewhere == [package / "config.py"]


def test_aliases_which_can_stand_for_gigabytes_are_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 8)]
    for text in ("\n".join(levels), "train: &train\n  total_steps: *train\n", "seed: &seed 1\ndata: {size: *seed}\n"):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bomb\.yaml: is not YAML: alias \*\w+: settings take no aliases"):
            load_config(tmp_path / "bomb.yaml")


def test_deep_nesting_and_huge_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        load_config(tmp_path / "deep.yaml")
    (tmp_path / "large.yaml").write_text("#" * 2_000_000)
    with pytest.raises(UserError, match="which no settings need"):
        load_config(tmp_path / "large.yaml")
    with pytest.raises(UserError, match=r"command line: (settings are nested too deeply|unknown setting)"):
        load_config(None, [".".join(["a"] * 5000) + "=1"])


def test_a_yaml_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.yaml").write_text("seed: 7\n", encoding="utf-8-sig")
    assert load_config(tmp_path / "marked.yaml").seed == 7


@pytest.mark.parametrize(
    "override",
    [
        "slots.iterations=1000000000", "slots.dim=1000000000", "data.size=100000", "seed=4294967296",
        "decoder.grid=9999",
        "train.timeout_minutes=1.0e30", "train.best_score=bogus", "data.num_workers=100000",
        "train.batch_size=100000000", "warp.points=100000", "train.total_steps=99999999999",
    ],
)  # fmt: skip
def test_values_that_no_machine_can_serve_are_refused_at_the_start(override: str) -> None:
    with pytest.raises(UserError, match=f"command line: {re.escape(override.split('=')[0])} is .*must be"):
        load_config(None, [override])


def test_every_score_that_may_choose_the_best_checkpoint_is_computed() -> None:
    scores = ProtocolScores({"horse": ["head"]}, 3)
    label = torch.ones(1, 2, 2, dtype=torch.uint8)
    batch = Batch(torch.zeros(1, 3, 2, 2), None, label, label > 0, torch.zeros(1, dtype=torch.int64), ["a"], label)
    scores.update(Prediction(label.long(), label.long()), batch)
    assert scores.pooled().keys() == {*get_args(BestScore)}
