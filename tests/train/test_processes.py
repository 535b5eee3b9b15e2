import gc
import platform
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PYTHON, TWO_PROCESSES, metrics, python, run, train, training
from forks import ranks

from slotscops.config import load_config
from slotscops.core.errors import UserError
from slotscops.core.files import sha256_of_file
from slotscops.train.garbage import SynchronisedGarbage
from slotscops.train.processes import (
    check_same_on_all_ranks,
    on_first_process,
    open_training_data,
    read_on_first_process,
    start_accelerator,
    timeout_of,
    warn_of_small_share,
)
from slotscops.train.run.checkpoint import Checkpoint, State


def test_a_missing_file_is_looked_for_by_one_process_of_a_node_and_refused_by_all(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    config = load_config(None, [f"data.shards={shards}", "data.size=64"])
    with monkeypatch.context() as patched:
        for module in ("slotscops.shard.index", "slotscops.features.cache"):
            patched.setattr(f"{module}.size_of_file", None)
        data = open_training_data(config)  # looks at no file of them
    check_same_on_all_ranks(config, *data)
    next(shards.glob("train-*.tar")).unlink()
    with pytest.raises(UserError, match=r"tar: is missing"):
        check_same_on_all_ranks(config, *data)
    done = train(ranks(2), shards, tmp_path / "run")
    assert done.returncode == 1  # the launcher's own
    assert done.stderr.count("tar: is missing") == 1


def test_only_the_first_process_clusters_features_and_the_others_take_its_basis(
    toy_shards: Path, tmp_path: Path
) -> None:
    script = tmp_path / "first_only.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path('launch').resolve())!r})\n"
        "import train\n"
        "from slotscops.core import console\n"
        "from slotscops.train import loop\n"
        "plain = loop.start_from_features\n"
        "def first_only(*arguments):\n"
        "    assert os.environ.get('RANK', '0') == '0'\n"
        "    plain(*arguments)\n"
        "loop.start_from_features = first_only\n"
        "console.run_command(train.main)\n"
    )
    few = ("basis.init=kmeans", "train.reduction=deterministic", "train.total_steps=1")
    for name, launcher in (("one", PYTHON), ("two", TWO_PROCESSES)):
        done = run(training(launcher, toy_shards, tmp_path / name, *few, script=script))
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "one")[0]["loss"] == metrics(tmp_path / "two")[0]["loss"]


def test_a_checkpoint_is_read_by_one_process_and_the_others_go_on_from_what_it_read(
    toy_shards: Path, tmp_path: Path
) -> None:
    script = tmp_path / "reader.py"
    script.write_text(
        "import hashlib, os, sys\n"
        f"sys.path.insert(0, {str(Path('launch').resolve())!r})\n"
        "import train\n"
        "from slotscops.core import console\n"
        "from slotscops.train import fit\n"
        "plain = fit.read_on_first_process\n"
        "def read(*arguments):\n"
        "    found = plain(*arguments)\n"
        "    groups = (found.model, found.optimizer, found.rng, found.ema)\n"
        "    content = b''.join(tensor.numpy().tobytes() for group in groups for tensor in group.values())\n"
        "    with open(os.environ['OPENED'] + os.environ['RANK'], 'w') as file:\n"
        "        file.write(hashlib.sha256(content).hexdigest())\n"
        "    return found\n"
        "fit.read_on_first_process = read\n"
        "def note(event, arguments):\n"
        "    name = str(arguments[0]) if event == 'open' else ''\n"
        "    if name.endswith('.safetensors') and 'checkpoints/step-' in name:\n"
        "        with open(os.environ['OPENED'], 'a') as file:\n"
        "            file.write(os.environ['RANK'] + ' ' + os.path.basename(name) + '\\n')\n"
        "sys.addaudithook(note)\n"
        "console.run_command(train.main)\n"
    )
    few = ("train.ema_decay=0.5", "train.total_steps=2", "train.log_every_steps=1")
    whole, stopped, opened = tmp_path / "whole", tmp_path / "stopped", tmp_path / "opened.txt"
    for arguments in ([whole, *few], [stopped, *few, "train.stop_after_steps=1"]):
        assert train(ranks(2), toy_shards, *arguments).returncode == 0
    done = run(training(TWO_PROCESSES, toy_shards, stopped, *few, script=script), OPENED=str(opened))
    assert done.returncode == 0, done.stderr
    assert sorted(opened.read_text().splitlines()) == [
        f"0 {name}.safetensors" for name in ("ema", "model", "optimizer", "rng")
    ]
    assert (tmp_path / "opened.txt0").read_text() == (tmp_path / "opened.txt1").read_text()
    assert metrics(stopped)[-1]["loss"] == metrics(whole)[-1]["loss"]
    for name in ("model", "optimizer", "ema"):
        file = f"checkpoints/step-2/{name}.safetensors"
        assert sha256_of_file(stopped / file) == sha256_of_file(whole / file)


def test_messages_before_the_training_wait_as_long_as_the_settings_say(
    toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [f"data.shards={toy_shards}", "data.size=64", "train.timeout_minutes=7"])
    data = open_training_data(config)
    found = Checkpoint(Path(), {"tensor": torch.zeros(2)}, {}, {}, None, State(1, 4, {}))
    timeouts = []

    def new_group(backend: str, timeout: timedelta | None = None) -> None:
        timeouts.append((backend, timeout))

    def all_gather_object(everyone: list[Any], mine: Any, group: None) -> None:
        everyone[:] = [mine] * len(everyone)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for replacement in (new_group, all_gather_object):
        monkeypatch.setattr(torch.distributed, replacement.__name__, replacement)
    for name in ("destroy_process_group", "broadcast_object_list", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *arguments, **options: None)
    check_same_on_all_ranks(config, *data)
    assert on_first_process(lambda: "result", timeout_of(config)) == "result"
    assert read_on_first_process(lambda: found, timeout_of(config)) is not None
    assert timeouts == [("gloo", timedelta(minutes=7))] * 4


def test_garbage_is_collected_at_every_hundredth_step_and_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    with SynchronisedGarbage() as garbage:
        assert not gc.isenabled()
        monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
        for step in range(1, 301):
            garbage.collect_if_due(step)
    assert collected == [100, 200, 300]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


SCRIPT = """
import resource
import torch
from slotscops.core.machine import keep_freed_memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(64_000_000, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
faults()  # the first one is still handed out by the system
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_large_tensors_take_the_memory_of_those_before_them(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(SCRIPT)
    done = python(tmp_path / "faults.py")
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 200
    assert kept < given_back / 20


def test_a_gpu_with_few_images_at_a_time_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    few = load_config(None, ["train.batch_size=64"])
    for settings, device, processes in (
        ([], "cuda", 1),
        ([], "cpu", 8),
        (["train.compile=true"], "cuda", 8),
        (["encoder.name=features"], "cuda", 8),
    ):
        warn_of_small_share(load_config(None, ["train.batch_size=64", *settings]), torch.device(device), processes)
    assert capsys.readouterr().err == ""
    warn_of_small_share(few, torch.device("cuda"), 8)
    said = " ".join(capsys.readouterr().err.split())
    assert "each GPU takes 8 images at a time" in said
    assert "train.compile=true, train.batch_size=512, or fewer processes" in said


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_a_precision_from_the_launcher_that_training_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(
        UserError, match=rf"asks for {asked}, needed one of no, bf16; launch with --mixed_precision bf16"
    ):
        start_accelerator(load_config(None))


def test_weights_of_another_number_of_layers_are_refused(toy_shards: Path) -> None:
    config = load_config(None, [f"data.shards={toy_shards}", "data.size=64", "teacher.layer_weights=[0.33,1]"])
    with pytest.raises(UserError, match=r"has 2 number\(s\), but teacher\.layer joins 1, relu5_4"):
        open_training_data(config)


def test_weights_of_layers_are_refused_where_components_mix_the_layers(toy_shards: Path) -> None:
    settings = ["teacher.layer=relu5_3+relu5_4", "teacher.layer_weights=[0.33,1]", "teacher.components=8"]
    config = load_config(None, [f"data.shards={toy_shards}", "data.size=64", *settings])
    with pytest.raises(UserError, match=r"layer_weights .* but each of the 8 teacher\.components mixes .* to null"):
        open_training_data(config)
