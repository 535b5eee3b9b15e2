from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import publish, save_resnet_run

from slotscops.config import write_config
from slotscops.model.part_logits import HeadLogits
from slotscops.segment.names import SHARED, PartNames, write_names
from slotscops.train.build import load_model
from slotscops.train.run.checkpoint import save_checkpoint


@pytest.fixture(scope="session")
def varied_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained network that finds all of its five parts. Not to be changed."""
    return save_resnet_run(tmp_path_factory.mktemp("varied") / "run", "decoder.maps=head_only")


@pytest.fixture(scope="session")
def run_with_dead(varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose part 3 wins nothing anywhere, and says so. Its parts have names. Not to be changed."""
    trained = load_model(varied_run)
    head = trained.network.part_logits
    assert isinstance(head, HeadLogits)
    with torch.no_grad():
        head.head.branches[0].get_parameter("bias")[3] -= 100
    state = replace(trained.state, slot_pixels={"horse": [500, 300, 200, 0, 100, 400]})
    folder = tmp_path_factory.mktemp("dead") / "run"
    tensors = {"model": trained.network.state_dict(), "optimizer": {}, "rng": {}}
    checkpoint = save_checkpoint(folder / "checkpoints", tensors, state, keep=1)
    write_config(trained.config, folder / "config.yaml")
    write_names(checkpoint, PartNames({SHARED: ["head", "leg", "ghost", "tail", None]}, 0.5, 3))
    return folder


@pytest.fixture(scope="session")
def published(run_with_dead: Path) -> Path:
    """That run, published: a pruned model, which has parts 1, 2, 4 and 5. Not to be changed."""
    return publish(run_with_dead)
