from typing import Any

import pytest
import torch

from slotscops.config import load_config
from slotscops.core.seeding import seeded
from slotscops.model.encoder import FeatureEncoder
from slotscops.model.network import build_network
from slotscops.train.build import build_model


@pytest.fixture
def seeds_of_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every seed that all GPUs were given, as they are without a GPU too: torch keeps it for later."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    return seeds


def test_seeded_numbers_are_those_of_manual_seed_and_the_caller_draws_on(seeds_of_gpus: list[int]) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    seeds_of_gpus.clear()
    state = torch.get_rng_state()
    for device in (None, torch.device("cpu")):
        with seeded(5, device):
            assert torch.equal(torch.rand(3), wanted)
        assert torch.equal(torch.get_rng_state(), state)
    assert seeds_of_gpus == []


def test_a_gpu_on_which_numbers_are_drawn_is_seeded_and_no_other(
    seeds_of_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            calls.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            calls.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "manual_seed", calls.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device.index}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(state))
    with seeded(5, torch.device("cuda", 1)):
        calls.append("inside")
    assert calls == [1, 5, "left", "inside", "state of 1"]
    assert seeds_of_gpus == []


def test_a_network_is_built_from_its_seed_without_reseeding_gpus(seeds_of_gpus: list[int]) -> None:
    config = load_config(None, ["encoder.name=features", "seed=3"])
    tensors = build_model(config, 16).state_dict()
    assert seeds_of_gpus == []
    torch.manual_seed(3)
    wanted = build_network(FeatureEncoder(16), config, 16, None).state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
