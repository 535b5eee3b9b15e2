import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from slotscops.config import load_config, to_mapping
from slotscops.core.errors import UserError
from slotscops.core.files import writer_name
from slotscops.train.run import checkpoint
from slotscops.train.run.checkpoint import State, list_checkpoints, load_checkpoint, save_checkpoint
from slotscops.train.run.folder import RunFolder, check_same_run, load_newest, resolve_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def saved(folder: Path, step: int = 1, keep: int = 3) -> Path:
    model = small_model()
    optimizer = AdamW(model.parameters())
    train_a_step(model, optimizer)
    return save_checkpoint(
        folder / "checkpoints",
        {
            "model": model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(optimizer, names(model)),
            "rng": checkpoint.rng_tensors(0),
        },
        State(step, step * 4, {"seed": 0}, "shards", "features", "random:0", ""),
        keep,
    )


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_restored_optimizer_takes_the_very_same_next_step(tmp_path: Path, kind: type) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if kind is SGD else {"lr": 0.1}
    model = small_model()
    optimizer = kind(model.parameters(), **options)
    train_a_step(model, optimizer)
    path = save_checkpoint(
        tmp_path,
        {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer, names(model)), "rng": {}},
        State(1, 4, {}, "", "", "random:0", ""),
        keep=1,
    )
    train_a_step(model, optimizer)

    other = small_model()
    resumed = kind(other.parameters(), **options)
    content = load_checkpoint(path)
    checkpoint.restore_model(other, content.model, path)
    checkpoint.restore_optimizer(resumed, names(other), content.optimizer, path)
    train_a_step(other, resumed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    states = checkpoint.rng_tensors(rank=0)
    expected = torch.rand(3)
    assert not checkpoint.restore_rng(states, 1, tmp_path)
    assert checkpoint.restore_rng(states, 0, tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_of_a_checkpoint_have_the_mode_that_the_umask_gives_to_other_files(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        path = saved(tmp_path)
    finally:
        os.umask(before)
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == dict.fromkeys(FILES, mode)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_found(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|missing") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_checkpoint(path)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        saved(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-10", "step-100"]


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / "model.safetensors").write_bytes(b"cut")
    found = RunFolder(tmp_path).find_checkpoint("auto")
    assert found is not None
    assert found.path.name == "step-1"
    assert "step-2" in capsys.readouterr().err


def test_a_run_without_any_whole_checkpoint_is_never_started_over_silently(tmp_path: Path) -> None:
    (saved(tmp_path, 1) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        RunFolder(tmp_path).find_checkpoint("auto")


def test_each_file_of_the_checkpoint_to_go_on_from_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    read = Counter[str]()
    plain = Path.open

    def count(path: Path, *arguments: Any, **named: Any) -> Any:
        read[path.name] += 1
        return plain(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", count)
    assert RunFolder(tmp_path).find_checkpoint("auto") is not None
    assert read == dict.fromkeys(FILES, 1)


def test_starting_afresh_over_a_run_is_refused(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).find_checkpoint("none") is None
    saved(tmp_path)
    with pytest.raises(UserError, match="--resume auto"):
        RunFolder(tmp_path).find_checkpoint("none")


def test_a_run_and_a_checkpoint_both_lead_to_the_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert resolve_checkpoint(tmp_path) == path
    assert resolve_checkpoint(path) == path
    with pytest.raises(UserError, match="no such run"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        resolve_checkpoint(tmp_path / "empty")


def test_what_a_crash_left_half_written_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path)
    shutil.copytree(path, path.parent / ".step-7.partial")
    assert list_checkpoints(path.parent) == [path]


def test_tensors_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    content = load_checkpoint(saved(tmp_path))
    with pytest.raises(UserError, match=r"0\.weight has shape \(4, 3\), needed \(9, 3\)"):
        checkpoint.restore_model(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), content.model, tmp_path)
    with pytest.raises(UserError, match=r"1\.bias"):
        checkpoint.restore_model(nn.Sequential(nn.Linear(3, 4)), content.model, tmp_path)


def test_a_run_of_an_earlier_version_with_another_order_of_samples_is_refused_in_one_line() -> None:
    config = load_config(None)
    row = asdict(State(4, 16, to_mapping(config)))
    del row["order"]  # as earlier versions wrote it
    nothing: Any = None
    with pytest.raises(
        UserError, match=r"order of rule 1, this version knows rule 2; .* new run with run_dir=DIR"
    ) as e:
        check_same_run(State.from_json(json.dumps(row)), config, nothing, nothing, Path("runs/old/checkpoints/step-4"))
    assert len(str(e.value).splitlines()) == 1


def test_state_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = json.loads((path / "state.json").read_text()) | {"format": 99}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = checkpoint._describe(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)


def test_the_step_that_earlier_versions_kept_among_the_scores_is_no_score() -> None:
    kept = asdict(State(step=4, samples_seen=16, config={}, scores={"step": 4, "val_nmi": 0.5}))
    assert State.from_json(json.dumps(kept)).scores == {"val_nmi": 0.5}


def test_a_checkpoint_is_written_where_links_cannot_be_made_or_best_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 1).parent
    (folder / "best").mkdir()
    (folder / "best" / "model.safetensors").write_bytes(b"a copy")
    state = State(2, 8, {}, "", "", "random:0", "")
    save_checkpoint(folder, {"model": {}, "optimizer": {}, "rng": {}}, state, keep=3, best_step=1)
    assert checkpoint.best_checkpoint(folder) == folder / "step-1"
    shutil.rmtree(folder / "best")

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", no_links)
        save_checkpoint(folder, {"model": {}, "optimizer": {}, "rng": {}}, state, keep=3, best_step=2)
    assert checkpoint.best_checkpoint(folder) == folder / "step-2"
    save_checkpoint(folder, {"model": {}, "optimizer": {}, "rng": {}}, state, keep=3, best_step=1)
    assert (folder / "best").resolve() == folder / "step-1"
    assert checkpoint.best_checkpoint(folder) is None


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda tensors, key: tensors.pop(key), "the optimizer's state of"),
        (lambda tensors, key: tensors.clear(), "the optimizer's state of"),
        (lambda tensors, key: tensors.update({key: torch.zeros(1)}), "of shape"),
        (lambda tensors, key: tensors.update({key: tensors[key].half()}), "needed torch.float32"),
        (lambda tensors, key: tensors.update({"other/exp_avg": torch.zeros(1)}), "the foreign parameter other"),
        (lambda tensors, key: tensors.update({f"{key}_more": torch.zeros(1)}), "the optimizer's state of"),
    ],
    ids=["missing", "empty", "shape", "type", "foreign", "more"],
)
def test_optimizer_tensors_that_do_not_fit_are_refused_by_name_before_they_are_used(
    tmp_path: Path, kind: type, change: object, wanted: str
) -> None:
    model = small_model()
    optimizer = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is SGD else {}))
    train_a_step(model, optimizer)
    tensors = checkpoint.optimizer_tensors(optimizer, names(model))
    quantity = "momentum_buffer" if kind is SGD else "exp_avg"
    change(tensors, next(key for key in tensors if key.endswith(f"/{quantity}")))  # type: ignore[operator]
    with pytest.raises(UserError, match=wanted) as raised:
        checkpoint.restore_optimizer(optimizer, names(model), tensors, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ")


def test_random_numbers_and_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the random numbers cpu/0 are torch\.float32"):
        checkpoint.restore_rng({"cpu/0": torch.zeros(3)}, 0, tmp_path)
    model = small_model()
    tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"has type torch\.float64, needed torch\.float32"):
        checkpoint.restore_model(model, tensors, tmp_path)


def test_random_numbers_that_no_generator_can_have_or_that_are_missing_are_refused(tmp_path: Path) -> None:
    states = checkpoint.rng_tensors(0)
    with pytest.raises(UserError, match="lacks the random numbers cpu/0"):
        checkpoint.restore_rng({}, 0, tmp_path)
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoint.restore_rng(states | {"cpu/0": torch.zeros_like(states["cpu/0"])}, 0, tmp_path)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).parent
    machine, process = writer_name().split("-")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"{machine}-{ended.pid}.x.partial", f"{machine}-{process}.x.partial", "x.removed", "x.replaced"):
        (folder / f".step-7.{name}").mkdir()
    saved(tmp_path, 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        f".step-7.{machine}-{process}.x.partial", "step-1", "step-2",
    ]  # fmt: skip


def test_a_model_is_loaded_at_any_moment_of_a_run_that_removes_its_older_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    ends = threading.Event()

    def train() -> None:
        for step in range(2, 1000):
            saved(tmp_path, step, keep=1)
            if ends.is_set():
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        steps = [load_newest(tmp_path).state.step]
        while len(steps) < 100 or (steps[-1] == steps[0] and thread.is_alive()):  # a busy disk writes slowly
            steps.append(load_newest(tmp_path).state.step)
    finally:
        ends.set()
        thread.join()
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


def test_the_next_newest_is_read_if_the_newest_disappears_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 1)
    newest = saved(tmp_path, 2)
    plain = checkpoint._read_manifest

    def removed_meanwhile(path: Path) -> dict[str, tuple[str, int]]:
        manifest = plain(path)
        shutil.rmtree(newest, ignore_errors=True)
        return manifest

    monkeypatch.setattr(checkpoint, "_read_manifest", removed_meanwhile)
    assert load_newest(tmp_path).state.step == 1
    assert "passed over" not in capsys.readouterr().err
    with pytest.raises(UserError, match="step-2: no such run or checkpoint"):
        load_newest(newest)


def test_a_file_of_a_checkpoint_that_cannot_even_be_asked_for_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    plain = Path.is_file

    def fail(path: Path) -> bool:
        if path == newest / "rng.safetensors":
            raise OSError(5, "Input/output error")
        return plain(path)

    monkeypatch.setattr(Path, "is_file", fail)
    assert resolve_checkpoint(tmp_path) == older
    assert "cannot be read (Input/output error)" in capsys.readouterr().err


def test_a_checkpoint_that_the_disk_refuses_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    plain = checkpoint.sha256_of_file

    def fail(path: Path) -> str:
        if path.is_relative_to(newest):
            raise OSError(5, "Input/output error")
        return plain(path)

    monkeypatch.setattr(checkpoint, "sha256_of_file", fail)
    assert resolve_checkpoint(tmp_path) == older
    assert "cannot be read (Input/output error)" in capsys.readouterr().err
