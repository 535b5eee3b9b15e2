"""A step of training on the meta device, which stands for a GPU: see `idle_gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idle_gpu import GPU, DeviceError, OrderError, WaitError, on_idle_gpu, watched
from torch.nn import functional

from slotscops.config import Config, config_from_mapping
from slotscops.core.records import Batch
from slotscops.loader.batches import move_ahead
from slotscops.model.encoder import FrozenBatchNorm
from slotscops.train.loop import Trainer
from slotscops.train.processes import start_accelerator

BATCH_SIZE = 4
FEATURES = {"encoder": {"name": "features"}}
RESNET = {"encoder": {"name": "resnet18", "weights": "random:0"}}
TERMS = (
    "concentration", "orthonormality", "entropy", "presence", "total_variation", "part_contrast", "visual_consistency",
    "visual_consistency_lab",
)  # fmt: skip
WARPED = ("equivariance", "landmark_equivariance")
CHOICES: list[dict[str, Any]] = [
    {},
    *({"losses": {term: 0.1}} for term in TERMS),
    *({"losses": {term: 0.1}} | RESNET for term in WARPED),
    {"losses": {"target_mask": "object"}, "train": {"ema_decay": 0.9, "accumulation_steps": 2}},
    {"losses": {"semantic": 0.0, "concentration": 1.0, "entropy": 1.0, "entropy_ramp_steps": 10}},
    {"decoder": {"maps": "attention"}, "slots": {"init": "image_conditioned", "gradient": "bilevel"}},
    {"decoder": {"maps": "head_only"}, "teacher": {"transform": "channel_standardised"}},
    {"decoder": {"kind": "mlp_broadcast", "grid": None}, "slots": {"init": "shared_gaussian"}},
    {"decoder": {"kind": "conv"}, "teacher": {"transform": "sqrt_l2"}, "train": {"optimizer": "sgd"}},
    {"decoder": {"mixing": True}, "slots": {"per_class": "own", "token_hidden": 32}, "basis": {"kind": "free"}},
]  # fmt: skip


def small_config(shards: Path, run_dir: Path, choice: dict[str, Any]) -> Config:
    train = {"batch_size": BATCH_SIZE, "mixed_precision": "no", **choice.get("train", {})}
    data = {"shards": str(shards), "size": 64, "num_workers": 0}
    return config_from_mapping(FEATURES | {"run_dir": str(run_dir), "data": data} | choice | {"train": train}, "test")


@contextmanager
def trained_once(config: Config) -> Iterator[tuple[Trainer, Batch]]:
    """A trainer on the idle GPU after its first step, which fills the caches, and a batch in the host's memory."""
    with on_idle_gpu(start_accelerator(config)) as accelerator:
        trainer = Trainer(config, accelerator)
        batch = trainer.split.read(np.arange(BATCH_SIZE // config.train.accumulation_steps))
        with watched(unchecked=True):
            trainer.take_step(on_gpu(batch, config))
        yield trainer, batch


def on_gpu(batch: Batch, config: Config) -> Iterator[Batch]:
    pinned = (batch.pin_memory() for _ in range(config.train.accumulation_steps))
    return move_ahead(pinned, GPU)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_no_step_waits_for_the_gpu_or_leaves_a_tensor_on_the_host(
    toy_shards: Path, tmp_path: Path, choice: dict[str, Any]
) -> None:
    config = small_config(toy_shards, tmp_path, choice)
    with trained_once(config) as (trainer, batch), watched() as watch:
        trainer.take_step(on_gpu(batch, config))
    assert watch.launches
    assert watch.library_calls


def test_a_logged_step_waits(toy_shards: Path, tmp_path: Path) -> None:
    config = small_config(toy_shards, tmp_path, {})
    with trained_once(config) as (trainer, batch), watched(), pytest.raises(WaitError):
        trainer._make_row(*trainer.take_step(on_gpu(batch, config)))


def test_a_step_of_resnet50_launches_at_most_500_kernels_forward_and_backward(toy_shards: Path, tmp_path: Path) -> None:
    choice = {"encoder": {"name": "resnet50", "weights": "random:0"}}
    with trained_once(small_config(toy_shards, tmp_path, choice)) as (trainer, batch):
        with watched() as watch:
            trainer._loss(next(on_gpu(batch, trainer.config))).backward()
        assert watch.launches.total() <= 420  # 444 as CUDA counts, which splits some of these operators in two
        assert watch.library_calls.total() <= 255
        norm = next(module for module in trainer.network.modules() if isinstance(module, FrozenBatchNorm))
        with watched() as watch, torch.no_grad():
            norm(torch.ones(1, norm.scale.shape[0], 4, 4, device=GPU, dtype=torch.bfloat16))
        assert watch.launches == {"aten.addcmul": 1, "aten.ones": 1}


@pytest.fixture
def _fixed_order() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fixed_order")
@pytest.mark.parametrize("choice", CHOICES[:13] + CHOICES[-1:], ids=str)
def test_a_deterministic_step_adds_in_a_fixed_order(toy_shards: Path, tmp_path: Path, choice: dict[str, Any]) -> None:
    fixed = {"reduction": "deterministic", "microbatches": 1, "ema_decay": 0.9}
    config = small_config(toy_shards, tmp_path, choice | {"train": fixed})
    with trained_once(config) as (trainer, batch), watched(in_fixed_order=True) as watch:
        trainer.take_step(on_gpu(batch, config))
    assert watch.launches


def test_sparse_features_become_dense_on_the_gpu_without_waiting() -> None:
    shape, images = (2, 3, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    values, places = torch.ones(5, dtype=torch.float16), torch.arange(5, dtype=torch.int32)
    batch = Batch(images, None, None, None, torch.zeros(2, dtype=torch.int64), ["a", "b"], None, values, places, shape)
    with watched() as watch:
        moved = next(move_ahead(iter([batch.pin_memory()]), GPU))
    assert moved.features is not None
    assert moved.features.shape == (2, *shape)
    assert moved.features.device == GPU
    assert watch.launches["aten.scatter_"] == 1


def read_back(tensor: torch.Tensor) -> object:
    return tensor.sum().item()


def choose(tensor: torch.Tensor) -> object:
    return tensor[tensor > 0]


def copy_back(tensor: torch.Tensor) -> object:
    return tensor.cpu()


def copy_unpinned(tensor: torch.Tensor) -> object:
    return tensor + torch.ones(3).to(GPU, non_blocking=True)


def copy_and_wait(tensor: torch.Tensor) -> object:
    return tensor + torch.ones(3).pin_memory().to(GPU)


@pytest.mark.parametrize("wait", [read_back, choose, copy_back, copy_unpinned, copy_and_wait])
def test_the_watch_sees_what_waits(wait: Any) -> None:
    tensor = torch.ones(3, device=GPU)
    with watched(), pytest.raises(WaitError):
        wait(tensor)


def test_the_watch_sees_a_tensor_on_the_host_and_lets_pinned_copies_pass() -> None:
    tensor = torch.ones(3, device=GPU)
    with watched() as watch:
        tensor + torch.ones(3).pin_memory().to(GPU, non_blocking=True)
        tensor * torch.tensor(2.0)  # a number of the host goes along with the launch
        with pytest.raises(DeviceError, match="on the host"):
            torch.mul(tensor, torch.ones(3))
    assert watch.launches == {"aten._to_copy": 1, "aten.add": 1, "aten.mul": 1}


def test_the_watch_sees_an_operator_that_adds_in_a_random_order() -> None:
    maps = torch.ones(1, 1, 4, 4, device=GPU, requires_grad=True)
    with watched(in_fixed_order=True), pytest.raises(OrderError):
        functional.grid_sample(maps, torch.ones(1, 4, 4, 2, device=GPU), align_corners=True).sum().backward()
