"""Numbers with their uncertainty: what every figure of an evaluation is reported as.

Pure numpy, no torch. Letters: P prompts, N answers of one side (P times the samples of a prompt), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95% interval and the number of independent observations behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: float) -> Estimate:
    """Return the share `successes / n` with Wilson's score interval (Wilson 1927); n = 0 gives [0, 1].

    Args:
        n: may be an effective number, which the estimate then states rounded down.
    """
    if n == 0:
        return Estimate(value=0.5, low=0.0, high=1.0, n=0)
    share, z = successes / n, Z_95
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return Estimate(value=share, low=low, high=high, n=int(n))


def wilson_by_group(right: Floats, groups: NDArray[np.int64]) -> Estimate:
    """Return the mean of `right` (N,), each 0 to 1, with Wilson's interval for what the N are worth when those of a group
    hang together.

    Their effective number is p (1 - p) over the variance of the mean between groups (Kish 1965, the design effect), as far
    as so many groups can tell it: a group's part as the mean without it sees it (the jackknife; Bell & McCaffrey 2002),
    Student's quantile, and p pulled to a half, so that a few groups that agree are no proof. It is at least what they are
    worth when all of a group are alike, (sum n)^2 / sum n^2, and at most N; with groups of one it is N.

    Args:
        groups: (N,) number of the group, from 0.
    """
    count = len(right)
    if count == 0:
        return wilson(0, 0)
    sizes = np.bincount(groups).astype(np.float64)
    fewest = count**2 / float((sizes * sizes).sum())
    share = float(right.mean())
    pulled = (fewest * share + Z_95**2 / 2) / (fewest + Z_95**2)
    others = np.maximum(1 - sizes / count, 1e-9)
    apart = (
        np.bincount(groups, weights=right - pulled) / others
    )  # what each group adds to the variance of the sum
    between = max(float((apart * apart).sum()), 1e-9)  # 0 where each is exactly a half
    worth = pulled * (1 - pulled) * count**2 / between
    worth *= (Z_95 / _student_95(fewest - 1)) ** 2
    worth = max(fewest, min(float(count), worth))
    return wilson(share * worth, worth)


def _student_95(freedom: float) -> float:
    """Return Student's two-sided 95% quantile (Abramowitz & Stegun 26.7.5); below 1 degree of freedom that of 1."""
    z, v = Z_95, max(1.0, freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, start=1))


def mean_of(shares: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent shares; its interval adds up the squares of theirs (Newcombe 1998,
    Statistics in Medicine 17:873, method 10, for a mean in place of a difference)."""
    value = math.fsum(one.value for one in shares) / len(shares)
    low, high = (
        math.sqrt(math.fsum((one.value - end) ** 2 for one, end in zip(shares, ends, strict=True)))
        / len(shares)
        for ends in ([one.low for one in shares], [one.high for one in shares])
    )
    return Estimate(value=value, low=value - low, high=value + high, n=sum(one.n for one in shares))


def mean_with_error(values: Floats) -> Estimate:
    """Return the mean of `values` with value ± 1.96 standard errors (n = 1 has no error: infinite width)."""
    n = len(values)
    if n == 0:
        return Estimate(value=0.0, low=-math.inf, high=math.inf, n=0)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    value = float(np.mean(values))
    return Estimate(value=value, low=value - Z_95 * error, high=value + Z_95 * error, n=n)


def bootstrap_weights(prompts: int, *, resamples: int, seed: int) -> Floats:
    """Return how often each resample draws each prompt, (R, P): one draw for every figure keeps them paired."""
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return draws.astype(np.float64)


def paired_bootstrap(per_prompt: Floats, weights: Floats) -> Estimate:
    """Return the mean of `per_prompt` (P,) with the percentile interval over the resamples `weights` (R, P)."""
    means = weights @ per_prompt / weights.sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(np.mean(per_prompt)), low=float(low), high=float(high), n=len(per_prompt))


def ratio_bootstrap(top: Floats, bottom: Floats, weights: Floats) -> Estimate:
    """Return sum(top) / sum(bottom) of two (P,) arrays with its percentile interval over the resamples."""
    floor = 1e-9
    ratios = (weights @ top) / np.maximum(weights @ bottom, floor)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(top.sum() / max(float(bottom.sum()), floor))
    return Estimate(value=value, low=float(low), high=float(high), n=len(top))
