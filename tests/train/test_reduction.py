import copy
import os
from pathlib import Path

import pytest
import torch
from commands import PYTHON, assert_same_tensors, metrics, python, train
from forks import ranks
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from slotscops.train.reduction import FixedOrderReducer, choose_kernels

TWO_PROCESSES, FOUR_PROCESSES = ranks(2), ranks(4)
DETERMINISTIC = ("train.reduction=deterministic", "train.microbatches=4")
# A small ResNet: four processes hand each other every gradient of every microbatch.
RESNET = ("encoder.name=timm/test_resnet", "encoder.weights=random:0", "train.total_steps=3")
COMPARED = ("losses.part_contrast=0.1", "losses.presence=0.1")  # terms that compare photos with each other
DRAWN = ("slots.init=shared_gaussian",)  # slots that start from random numbers


FIRST_TENSORS = """
import os
import sys
import torch
import torch.distributed as dist
from slotscops.model.encoder import FrozenBatchNorm
from slotscops.train.reduction import take_first_process_tensors

rank = int(os.fork() == 0)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
torch.manual_seed(rank)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), FrozenBatchNorm(4)).to(memory_format=torch.channels_last)
network[1].running_mean.fill_(rank)
before = network[0].weight.clone()
take_first_process_tensors(network)
everyone = [None, None]
dist.all_gather_object(everyone, [before, network[0].weight.detach(), network[1].running_mean])
first, second = everyone
assert torch.equal(first[0], first[1]) and not torch.equal(second[0], second[1])
assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
dist.destroy_process_group()
if rank == 0:
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_every_process_starts_with_the_tensors_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "first_tensors.py").write_text(FIRST_TENSORS)
    done = python(tmp_path / "first_tensors.py", tmp_path / "meeting")
    assert done.returncode == 0, done.stderr


def test_kernels_are_the_same_in_every_run_or_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_kernels("deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    finally:
        choose_kernels("ddp")
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False


def test_the_mean_is_that_of_the_gradients_added_one_after_the_other() -> None:
    network = nn.Linear(3, 2)
    reducer = FixedOrderReducer(list(network.parameters()))
    gradients = [torch.randn(2, 3) * 10.0**power for power in (0, 6, -6, 3)]
    for gradient in gradients:
        network.weight.grad = gradient.clone()
        reducer.collect()
        assert network.weight.grad is None
    reducer.reduce()
    assert network.weight.grad is not None
    assert torch.equal(network.weight.grad, (((gradients[0] + gradients[1]) + gradients[2]) + gradients[3]) / 4)
    assert network.bias.grad is not None
    assert torch.equal(network.bias.grad, torch.zeros(2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_three_fused_steps_with_one_microbatch_equal_three_steps_with_plain_gradients(channels_last: bool) -> None:
    plain = nn.Conv2d(4, 8, kernel_size=3)
    if channels_last:
        plain = plain.to(memory_format=torch.channels_last)
    reduced = copy.deepcopy(plain)
    reducer = FixedOrderReducer(list(reduced.parameters()))
    optimizers = [AdamW(network.parameters(), lr=0.1, fused=True) for network in (plain, reduced)]
    for _ in range(3):
        images = torch.randn(2, 4, 6, 6)
        for network in (plain, reduced):
            network(images).square().mean().backward()
        reducer.collect()
        reducer.reduce()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(reduced.weight, plain.weight)
        assert torch.equal(reduced.bias, plain.bias)


def test_a_channels_last_parameter_without_a_gradient_gets_zeros() -> None:
    network = nn.Conv2d(4, 8, kernel_size=3).to(memory_format=torch.channels_last)
    reducer = FixedOrderReducer(list(network.parameters()))
    reducer.collect()
    reducer.reduce()
    assert network.weight.grad is not None
    assert torch.equal(network.weight.grad, torch.zeros(8, 4, 3, 3))


def test_one_two_and_four_processes_train_the_very_same_parameters(toy_shards: Path, tmp_path: Path) -> None:
    launchers = {"one": PYTHON, "two": TWO_PROCESSES, "four": FOUR_PROCESSES}
    for name, launcher in launchers.items():
        done = train(launcher, toy_shards, tmp_path / name, *DETERMINISTIC, *RESNET, *COMPARED, *DRAWN)
        assert done.returncode == 0, done.stderr
    models = [load_file(tmp_path / name / "checkpoints" / "step-3" / "model.safetensors") for name in launchers]
    for key, tensor in models[0].items():
        assert torch.equal(tensor, models[1][key]), key
        assert torch.equal(tensor, models[2][key]), key


def test_a_run_goes_on_from_one_to_two_to_four_to_one_process_with_the_same_samples(
    toy_shards: Path, tmp_path: Path
) -> None:
    few = (*DETERMINISTIC, "train.total_steps=8")
    assert train(PYTHON, toy_shards, tmp_path / "whole", *few).returncode == 0
    for launcher in (PYTHON, TWO_PROCESSES, FOUR_PROCESSES, PYTHON):
        done = train(launcher, toy_shards, tmp_path / "parts", *few, "train.stop_after_steps=2")
        assert done.returncode == 0, done.stderr
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [row["batch_digest"] for row in whole] == [row["batch_digest"] for row in parts]
    ends = (tmp_path / name / "checkpoints" / "step-8" for name in ("whole", "parts"))
    assert_same_tensors(*ends, of=("model", "optimizer"))


@pytest.mark.parametrize(
    "settings",
    [
        ("losses.concentration=0.3", "losses.orthonormality=0.2", "losses.entropy=0.4", "losses.part_contrast=0.5",
         "losses.visual_consistency=0.7", "losses.target_mask=object", "losses.mixture=0.8", "losses.background=0.6",
         "losses.presence=0.9", "losses.total_variation=0.8", "losses.visual_consistency_lab=0.7", "basis.kind=free",
         "decoder.places=facing"),
        ("encoder.name=resnet18", "encoder.weights=random:0", "losses.equivariance=1.0",
         "losses.landmark_equivariance=1.0", "train.batch_size=4"),
    ],
    ids=["semantic, mixture and terms of the maps", "semantic and terms of the warp"],
)  # fmt: skip
def test_the_gradient_of_two_processes_is_that_of_one_with_the_whole_batch(
    toy_shards: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    # SGD with step size 1: a difference of the parameters is a difference of the gradients.
    one_step = ("train.optimizer=sgd", "train.momentum=0.0", "train.weight_decay=0.0", "train.clip_norm=0",
                "train.learning_rate=1.0", "train.encoder_learning_rate=1.0", "train.stop_after_steps=1")  # fmt: skip
    for name, launcher in (("one", PYTHON), ("two", TWO_PROCESSES)):
        assert train(launcher, toy_shards, tmp_path / name, *one_step, *settings).returncode == 0
    one, two = (load_file(tmp_path / name / "checkpoints" / "step-1" / "model.safetensors") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (("train.microbatches=3",), "train.microbatches is 3"),
        (("train.accumulation_steps=2",), "set train.accumulation_steps=1"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(
    toy_shards: Path, tmp_path: Path, settings: tuple[str, ...], needed: str
) -> None:
    done = train(PYTHON, toy_shards, tmp_path / "run", DETERMINISTIC[0], *settings)
    assert done.returncode == 2
    assert needed in done.stderr
    assert not (tmp_path / "run").exists()
