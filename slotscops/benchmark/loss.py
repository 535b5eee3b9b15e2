"""Compares the exact low-rank loss with the same loss computed from upsampled tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slotscops.benchmark.measure import peak_extra_memory_bytes, take_turns
from slotscops.core import console
from slotscops.losses.semantic import semantic_consistency

_NUM_SLOTS, _NUM_CHANNELS = 6, 512
_MAX_BYTES = 12e9  # a materialised form beyond that is left out
_LIVE_TENSORS = 4  # (B, C, H, W) tensors that it holds at once
# batch, feature grid, pixels
CASES = [(1, 8, 128), (8, 8, 128), (8, 14, 224), (8, 16, 256), (64, 8, 128), (256, 8, 128), (256, 16, 256)]
_REFERENCE = (8, 8, 128)


def materialised(logits: Tensor, features: Tensor, basis: Tensor, size: tuple[int, int]) -> Tensor:
    """The semantic consistency loss as SCOPS writes it: both (B, C, H, W) tensors are built."""
    maps = functional.interpolate(logits, size, mode="bilinear", align_corners=True).softmax(dim=1)[:, 1:]
    rebuilt = torch.einsum("bkhw,kc->bchw", maps, basis)
    target = functional.interpolate(features, size, mode="bilinear", align_corners=True)
    return functional.mse_loss(rebuilt, target)


def compare(rounds: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """Times and peak memory of forward and backward for each case; ratios for batch 8 at 128 px."""
    cases = [_measure(case, rounds, device) for case in ([_REFERENCE] if quick else CASES)]
    columns = ("batch", "features", "pixels", "exact ms", "MB", "built ms", "MB", "times faster", "times smaller")
    console.show_table("semantic consistency loss, forward and backward", columns, map(_row, cases))
    reference = next(case for case in cases if (case["batch"], case["grid"], case["pixels"]) == _REFERENCE)
    batch, grid, pixels = _REFERENCE
    return {
        "setting": f"batch {batch}, {grid} x {grid} features, {pixels} px",
        "loss_speedup": reference["speedup"],
        "loss_memory_ratio": reference["memory_ratio"],
        "loss_cases": cases,
    }


def _row(case: dict[str, float]) -> tuple[str, ...]:
    def cell(name: str, scale: float, digits: int) -> str:
        return f"{scale * case[name]:.{digits}f}" if name in case else "-"

    return (
        f"{case['batch']}",
        f"{case['grid']} x {case['grid']}",
        f"{case['pixels']}",
        cell("exact_s", 1e3, 2),
        cell("exact_bytes", 1e-6, 1),
        cell("materialised_s", 1e3, 1),
        cell("materialised_bytes", 1e-6, 0),
        cell("speedup", 1, 0),
        cell("memory_ratio", 1, 0),
    )


def _measure(case: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds and bytes of forward and backward; only those of the exact form if the other would not fit."""
    logits, features, basis = _make_inputs(case, device)
    batch, grid, pixels = case
    size = (pixels, pixels)

    def run(loss: Any) -> None:
        logits.grad = basis.grad = None
        loss(logits, features, basis, size).backward()

    contestants = {"exact": lambda: run(semantic_consistency)}
    if _LIVE_TENSORS * 4 * batch * _NUM_CHANNELS * pixels**2 <= _MAX_BYTES:
        contestants["materialised"] = lambda: run(materialised)
    times = take_turns(contestants, rounds, device)
    figures: dict[str, float] = {"batch": batch, "grid": grid, "pixels": pixels}
    for name, contestant in contestants.items():
        figures[f"{name}_s"] = times[name].median
        figures[f"{name}_bytes"] = peak_extra_memory_bytes(contestant, device)
    if "materialised" in contestants:
        figures["speedup"] = figures["materialised_s"] / figures["exact_s"]
        figures["memory_ratio"] = figures["materialised_bytes"] / figures["exact_bytes"]
    return figures


def _make_inputs(case: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    batch, grid, _ = case
    logits = torch.randn(batch, _NUM_SLOTS, grid, grid, device=device, requires_grad=True)
    features = torch.randn(batch, _NUM_CHANNELS, grid, grid, device=device).relu()
    basis = torch.rand(_NUM_SLOTS - 1, _NUM_CHANNELS, device=device, requires_grad=True)
    return logits, features, basis
