"""The learning rate as a pure function of the step."""

import math


def learning_rate_factor(
    step: int, total_steps: int, kind: str = "poly", warmup_steps: int = 0, power: float = 0.9
) -> float:
    """The factor by which the peak learning rate is multiplied in a step.

        warmup    (s + 1) / (w + 1)                 for s < w
        poly      (1 - t)^power                     with t = (s - w) / (n - w), at most 1, for s >= w
        cosine    (1 + cos(pi t)) / 2
        constant  1

    Args:
        step: s, steps done before this one; 0 in the first.
        total_steps: n, steps of the whole run.
        kind: poly, cosine or constant.
        warmup_steps: w, steps over which the factor grows linearly; step w is the first at the peak.
        power: exponent of poly.

    Returns:
        In [0, 1]. Only poly and cosine reach 0, and only after the last step, at s = n.

    Raises:
        ValueError: an unknown kind or a number of steps out of range.

    Source: poly with power 0.9 and no warmup is SCOPS' (arXiv:1905.01298).
    """
    if kind not in ("poly", "cosine", "constant"):
        raise ValueError(f"schedule {kind!r}: needed poly, cosine or constant")
    if step < 0 or total_steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"step {step} of {total_steps} with {warmup_steps} of warmup: needed a step and a warmup of at least 0 and "
            f"at least 1 step in total"
        )
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    # A run may be shorter than its warmup.
    passed = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if kind == "cosine":
        return (1 + math.cos(math.pi * passed)) / 2
    return float((1 - passed) ** power)
