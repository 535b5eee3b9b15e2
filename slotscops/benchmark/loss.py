"""The exact low-rank loss against the same loss with its upsampled tensors built."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slotscops import console
from slotscops.benchmark.measure import peak_extra_memory_bytes, take_turns
from slotscops.losses import semantic_consistency

_NUM_SLOTS, _NUM_CHANNELS = 6, 512
_MAX_BYTES = 12e9  # a materialised form beyond that is left out
# batch, feature grid, pixels
CASES = [(1, 8, 128), (8, 8, 128), (8, 14, 224), (8, 16, 256), (16, 8, 128), (64, 8, 128), (256, 8, 128)]
_REFERENCE = (8, 8, 128)


def materialised(logits: Tensor, features: Tensor, basis: Tensor, size: tuple[int, int]) -> Tensor:
    """The semantic consistency loss as SCOPS writes it: both (B, C, H, W) tensors are built."""
    maps = functional.interpolate(logits, size, mode="bilinear", align_corners=True).softmax(dim=1)[:, 1:]
    rebuilt = torch.einsum("bkhw,kc->bchw", maps, basis)
    target = functional.interpolate(features, size, mode="bilinear", align_corners=True)
    return functional.mse_loss(rebuilt, target)


def compare(rounds: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """Times and peak memory of forward and backward for each case; ratios for batch 8 at 128 px."""
    rows, results = [], {}
    for case in [_REFERENCE] if quick else CASES:
        batch, grid, pixels = case
        if 4 * 4 * batch * _NUM_CHANNELS * pixels**2 > _MAX_BYTES:
            rows.append((batch, f"{grid} x {grid}", pixels, *measure_exact(case, rounds, device), "-", "-", "-", "-"))
            continue
        result = measure_case(case, rounds, device)
        results[case] = result
        rows.append(
            (
                batch, f"{grid} x {grid}", pixels,
                f"{1e3 * result['exact_s']:.2f}", f"{result['exact_bytes'] / 1e6:.1f}",
                f"{1e3 * result['materialised_s']:.1f}", f"{result['materialised_bytes'] / 1e6:.0f}",
                f"{result['speedup']:.0f}", f"{result['memory_ratio']:.0f}",
            )
        )  # fmt: skip
    columns = ("batch", "features", "pixels", "exact ms", "MB", "built ms", "MB", "times faster", "times smaller")
    console.show_table("semantic consistency loss, forward and backward", columns, rows)
    batch, grid, pixels = _REFERENCE
    setting = f"batch {batch}, {grid} x {grid} features, {pixels} px"
    return {
        "setting": setting,
        "loss_speedup": results[_REFERENCE]["speedup"],
        "loss_memory_ratio": results[_REFERENCE]["memory_ratio"],
    }


def measure_case(case: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, float]:
    logits, features, basis = _make_inputs(case, device)
    size = (case[2], case[2])

    def run(loss: Any) -> None:
        logits.grad = basis.grad = None
        loss(logits, features, basis, size).backward()

    contestants = {"exact": lambda: run(semantic_consistency), "materialised": lambda: run(materialised)}
    times = take_turns(contestants, rounds, device)
    memory = {name: peak_extra_memory_bytes(contestant, device) for name, contestant in contestants.items()}
    return {
        "exact_s": times["exact"].median,
        "materialised_s": times["materialised"].median,
        "speedup": times["materialised"].median / times["exact"].median,
        "exact_bytes": memory["exact"],
        "materialised_bytes": memory["materialised"],
        "memory_ratio": memory["materialised"] / memory["exact"],
    }


def measure_exact(case: tuple[int, int, int], rounds: int, device: torch.device) -> tuple[str, str]:
    logits, features, basis = _make_inputs(case, device)

    def run() -> None:
        logits.grad = basis.grad = None
        semantic_consistency(logits, features, basis, (case[2], case[2])).backward()

    times = take_turns({"exact": run}, rounds, device)
    return f"{1e3 * times['exact'].median:.2f}", f"{peak_extra_memory_bytes(run, device) / 1e6:.1f}"


def _make_inputs(case: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    batch, grid, _ = case
    logits = torch.randn(batch, _NUM_SLOTS, grid, grid, device=device, requires_grad=True)
    features = torch.randn(batch, _NUM_CHANNELS, grid, grid, device=device).relu()
    basis = torch.rand(_NUM_SLOTS - 1, _NUM_CHANNELS, device=device, requires_grad=True)
    return logits, features, basis
