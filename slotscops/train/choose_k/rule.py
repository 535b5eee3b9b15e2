"""The rule by which a number of parts is recommended, as a pure function of what the short trainings measured.

Numbers of parts that the data support are found again by another training on other photos. Lange et al. (Neural
Computation 16(6), 2004) and Ben-Hur et al. (Pacific Symposium on Biocomputing, 2002) choose the number of clusters by
this stability, which they measure on pairs of disjoint halves or of subsamples. Of several numbers whose stabilities
cannot be told apart, we take the largest one, because more parts say more, as Ben-Hur et al. and Tibshirani and Walther
(JCGS 14(3), 2005) take the largest number that is still stable. "Cannot be told apart" is the one-standard-error rule
of Breiman et al. (Classification and Regression Trees, 1984). Unlike prediction strength, it needs no threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULE = (
    "the largest number of parts whose stability is within one standard error of the best, among those at which no "
    "part died in most trainings"
)


@dataclass(frozen=True)
class Measured:
    """What the short trainings of one number of parts K measured. Without a label of a part."""

    num_parts: int  # K
    stabilities: list[float]  # of each pair of trainings: see `metrics.stability.stability_of`
    likelihoods: list[float]  # of each training: see `metrics.without_labels`; NaN if no loss explains features
    dead_parts: list[int]  # of each training: number of parts that win less than 0.1 % of the held-out pixels
    seconds: float  # that all trainings of this number took

    @property
    def stability(self) -> float:
        """Mean over the pairs; NaN if a training collapsed or is not finite."""
        return float(np.mean(self.stabilities))

    @property
    def likelihood(self) -> float:
        """Mean over the trainings, in the units of the losses."""
        return float(np.mean(self.likelihoods))

    @property
    def dead_share(self) -> float:
        """Share of the parts that are dead, mean over the trainings."""
        return float(np.mean(self.dead_parts)) / self.num_parts

    @property
    def keeps_its_parts(self) -> bool:
        """Whether in most trainings no part died."""
        return 2 * sum(number > 0 for number in self.dead_parts) < len(self.dead_parts)


@dataclass(frozen=True)
class Recommendation:
    """The outcome of the rule."""

    num_parts: int | None  # None if parts died at every number
    best: int | None  # the number of the best stability
    standard_error: float  # of a mean stability
    least: float  # the stability that a number needs to be taken; NaN if there is no best


def recommend(measured: Sequence[Measured]) -> Recommendation:
    """Applies `RULE`.

    The standard error is that of the mean of n pairs, with the variance over pairs pooled over all numbers of parts,
    because the few pairs of a single number tell it badly:

        e = sqrt(mean over K of var_K / n)

    Args:
        measured: at least one number of parts, each with the same number n >= 2 of pairs.
    """
    finite = [one for one in measured if math.isfinite(one.stability)]
    allowed = [one for one in finite if one.keeps_its_parts]
    variances = [float(np.var(one.stabilities, ddof=1)) / len(one.stabilities) for one in finite]
    error = math.sqrt(np.mean(variances)) if variances else math.nan
    if not allowed:
        return Recommendation(None, None, error, math.nan)
    best = max(allowed, key=lambda one: (one.stability, one.num_parts))
    least = best.stability - error
    taken = max(one.num_parts for one in allowed if one.stability >= least)
    return Recommendation(taken, best.num_parts, error, least)
