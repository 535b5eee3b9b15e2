import gc
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.benchmark import loader, scale, scaling, start, step
from slotscops.benchmark.__main__ import main
from slotscops.benchmark.loss import materialised
from slotscops.benchmark.measure import peak_extra_memory_bytes, take_turns
from slotscops.core.errors import UserError
from slotscops.losses.semantic import semantic_consistency

SMALL = ["encoder.name=resnet18", "train.batch_size=2", "train.log_every_steps=20"]


def test_the_contestants_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = take_turns(contestants, rounds=3, device=torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert [len(result.seconds) for result in times.values()] == [3, 3]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40))
def test_peak_memory_is_that_of_the_tensors_alive_at_once(megabytes: int) -> None:
    def run() -> None:
        for _ in range(3):
            tensor = torch.empty(megabytes * 1_000_000, dtype=torch.uint8)
            del tensor

    assert peak_extra_memory_bytes(run, torch.device("cpu")) == pytest.approx(megabytes * 1e6, rel=0.01)


def test_the_loss_it_is_compared_with_is_the_same_loss() -> None:
    logits, features, basis = torch.randn(2, 6, 8, 8), torch.rand(2, 16, 8, 8), torch.rand(5, 16)
    size = (32, 32)
    torch.testing.assert_close(
        materialised(logits, features, basis, size), semantic_consistency(logits, features, basis, size)
    )


def run_forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Runs what a measurement starts as `subprocess.run` does, but forks it: a new interpreter takes seconds."""
    launcher = ["-m", "torch.distributed.run"]
    return run(["torchrun", *command[3:]] if command[1:3] == launcher else command)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_the_commands_write_the_figures_they_promise(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test's shards hold 5 samples each: a million records would be 200,000 of them.
    monkeypatch.setattr(loader, "_STARTS", (10, 100))
    monkeypatch.setattr(step, "_CHECKPOINTS", 1)
    monkeypatch.setattr(scale, "_JOINED", (2,))
    for module in (scale, scaling, start):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_forked))
    promised = {
        "loss": {"loss_speedup", "loss_memory_ratio"},
        "loader": {"loader_over_webdataset", "loader_over_decode", "features_per_second"},
        "step": {"step_over_encoder", "recipe_over_step", "logging_share", "data_wait", "loss_memory_bytes"},
        "scaling": {"scaling", "deterministic_over_ddp"},
        "scale": {"scale_megabytes", "scale_first_batch_s", "scale_opened_on_resume", "scale_descriptors_of_joined"},
        "sharding": {"shard_tree_s", "shard_archives_s"},
    }
    for what, keys in promised.items():
        more = {
            "loss": ["--quick"], "step": SMALL, "scaling": ["--processes", "1", *SMALL],
            "scale": ["--num-shards", "20", "--samples-per-shard", "5", "--ranks", "2", "--batch", "4"],
            "sharding": ["--root", str(toy_shards / "photos"), "--images", "30"],
        }.get(what, [])  # fmt: skip
        shards = ["--shards", str(toy_shards)]
        arguments = [what, "--rounds", "1", "--json", str(tmp_path / what), *shards, *more]
        assert main(arguments) == 0
        figures = json.loads((tmp_path / what).read_text())
        assert keys <= set(figures)
        assert all(figures[key] for key in keys)
        assert figures["machine"]["torch"] == torch.__version__
    gc.collect()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark: begin -->\nold\n<!-- benchmark: end -->\nafter\n")
    assert main(["report", "--readme", str(readme), *(str(tmp_path / what) for what in promised)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")
    assert "images a second by processes, global batch fixed" in text


def test_a_file_without_figures_and_a_readme_without_the_markers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no markers")
    (tmp_path / "none.json").write_text("{}")
    for arguments in ([], [str(tmp_path / "none.json")]):
        with pytest.raises(UserError):
            main(["report", "--readme", str(tmp_path / "README.md"), *arguments])
    assert (tmp_path / "README.md").read_text() == "no markers"
