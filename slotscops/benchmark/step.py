"""Compares a whole training step with the encoder's alone, and with the recipe without cache and exact loss."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slotscops.benchmark.loss import materialised
from slotscops.benchmark.measure import peak_extra_memory_bytes, take_turns
from slotscops.config import Config
from slotscops.core import console
from slotscops.core.records import Batch
from slotscops.features.teacher import Teacher
from slotscops.losses.semantic import semantic_consistency
from slotscops.train.build import build_model, build_optimizer
from slotscops.train.loop import Trainer
from slotscops.train.run.writer import CheckpointWriter

_STEPS_AFTER_CHECKPOINT = 20
_CHECKPOINTS = 3


def compare(config: Config, accelerator: Accelerator, rounds: int) -> dict[str, Any]:
    """Medians of (a) the encoder's own step, (b) a step from the loader to the updated weights, (c) the recipe.

    (a) and (b) run in the precision of the settings, (c) in float32 with VGG19 in every step and both upsampled
    512-channel tensors built.
    """
    trainer = Trainer(config, accelerator)
    trainer.open_run()
    batches = trainer.open_batches(2 * rounds + 4 + _CHECKPOINTS * _STEPS_AFTER_CHECKPOINT)
    batch = next(batches)
    waits: list[float] = []

    def whole_step() -> None:
        trainer.stopwatch.restart()
        trainer.take_step(batches)
        waits.append(trainer.stopwatch.waited_s)

    contestants = {
        "encoder alone": _encoder_step(config, accelerator, batch, trainer.cache.shape[0]),
        "whole step": whole_step,
        "recipe": _recipe_step(config, accelerator, batch, trainer.cache.shape[0]),
    }
    times = take_turns(contestants, rounds, accelerator.device)
    medians = {name: result.median for name, result in times.items()}
    logging_share = _time_logging(trainer) / (config.train.log_every_steps * medians["whole step"])
    wait_s, cost_s = _time_checkpoints(trainer, whole_step, medians["whole step"])
    waits = waits[1 : rounds + 1]  # of the counted turns
    waited_s = sum(waits)
    memory = peak_extra_memory_bytes(contestants["whole step"], accelerator.device)
    loss_memory = peak_extra_memory_bytes(_loss_alone(config, batch), accelerator.device)
    flops = _count_flops(contestants["encoder alone"])
    rows = [
        (name, f"{1e3 * result.median:.1f}", result.spread, f"{config.train.batch_size / result.median:.1f}")
        for name, result in times.items()
    ]
    precision = accelerator.mixed_precision
    title = f"{config.encoder.name}, {config.data.size} px, batch {config.train.batch_size}, precision {precision}"
    console.show_table(title, ("", "ms", "fastest to slowest", "images/s"), rows)
    figures = {
        "batch_size": config.train.batch_size,
        "precision": precision,
        "step_over_encoder": medians["whole step"] / medians["encoder alone"],
        "recipe_over_step": medians["recipe"] / medians["whole step"],
        "images_per_second": config.train.batch_size / medians["whole step"],
        "step_memory_bytes": memory,
        "loss_memory_bytes": loss_memory,
        "encoder_flops_per_image": flops / config.train.batch_size,
        "flops_per_second": flops / medians["whole step"],
        "data_wait": waited_s / sum(times["whole step"].seconds),
        "logging_share": logging_share,
        "checkpoint_wait": wait_s / 60,
        "checkpoint_share": cost_s / 60,
        "setting": title,
    }
    if accelerator.device.type == "cuda":
        figures["mfu"] = flops / medians["whole step"] / _matrix_rate(accelerator)
    return figures


def _time_logging(trainer: Trainer) -> float:
    """Seconds that logging one step takes, the median of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        trainer.log(torch.zeros((), device=trainer.accelerator.device), torch.zeros(()))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _time_checkpoints(trainer: Trainer, step: Callable[[], None], step_s: float) -> tuple[float, float]:
    """Seconds, medians of three, that a checkpoint costs.

    Returns:
        The time that the loop waits for the copy to host memory; and the total cost, which is that wait plus the
        extra time of the steps during which the checkpoint was written.
    """
    waits, costs = [], []
    with CheckpointWriter(trainer.folder.checkpoints, keep=1) as writer:
        for _ in range(_CHECKPOINTS):
            start = time.perf_counter()
            trainer.save(writer)
            waits.append(time.perf_counter() - start)
            steps = 0
            while steps < _STEPS_AFTER_CHECKPOINT and (steps == 0 or writer.is_writing):
                step()
                steps += 1
            costs.append(max(0.0, time.perf_counter() - start - steps * step_s))
    return statistics.median(waits), statistics.median(costs)


def _matrix_rate(accelerator: Accelerator) -> float:
    """FLOP/s of a large matrix product in the precision of the run: the most that the card achieves."""
    size = 8192
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=accelerator.device, dtype=dtype) for _ in range(2))
    times = take_turns({"product": lambda: left @ right}, rounds=10, device=accelerator.device, warmup=3)
    return 2 * size**3 / times["product"].median


def _encoder_step(config: Config, accelerator: Accelerator, batch: Batch, channels: int) -> Callable[[], None]:
    """Forward, backward and optimizer of the encoder, from a batch that is already there."""
    network = build_model(config, channels).to(accelerator.device)
    if config.train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config, network)
    gradients: list[Tensor] = []

    def run() -> None:
        with accelerator.autocast():
            encoded = network.encoder(batch.images)
        if not gradients:
            gradients.append(torch.randn_like(encoded) * 1e-3)
        encoded.backward(gradients[0])
        optimizer.step()
        optimizer.zero_grad()

    return run


def _recipe_step(config: Config, accelerator: Accelerator, batch: Batch, channels: int) -> Callable[[], None]:
    network = build_model(config, channels).to(accelerator.device)
    teacher = Teacher(config.teacher.layer, "random:0", config.teacher.network).to(accelerator.device)
    optimizer = build_optimizer(config, network)
    size = (config.data.size, config.data.size)

    def run() -> None:
        output = network(batch.images)
        materialised(output.logits, teacher(batch.images), output.basis, size).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _loss_alone(config: Config, batch: Batch) -> Callable[[], None]:
    """Forward and backward of the exact loss on the batch's features."""
    features = batch.features
    assert features is not None
    slots, device = config.slots.num_parts + 1, features.device
    logits = torch.randn(len(batch), slots, *features.shape[2:], device=device, requires_grad=True)
    basis = torch.rand(slots - 1, features.shape[1], device=device, requires_grad=True)
    size = (config.data.size, config.data.size)
    return lambda: semantic_consistency(logits, features, basis, size).backward()


def _count_flops(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
