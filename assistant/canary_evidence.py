"""Is the canary worse than stable? Evidence that may be looked at after every conversation: e-values and bounds.

Each conversation is drawn into the canary with a known probability, its share. So a conversation multiplies the evidence by
a likelihood ratio p*(outcome | arm) / p°(outcome | arm), where (s*, c*) are rates outside the null hypothesis and (s°, c°)
is the point of the null nearest to them in Kullback-Leibler divergence, the arms weighted by their shares. The rates that
a linear null `c <= ratio * s + offset` allows are a convex set, so the ratio is an e-variable against all of it (Grünwald,
de Heide and Koolen 2024, theorem 1; for two Bernoulli streams Turner, Ly and Grünwald 2024, doi 10.1016/j.jspi.2023.106116,
and for bounds Turner and Grünwald 2023, arXiv 2203.09785; the share in place of fixed blocks is the model-X setting of
Grünwald, Henzi and Lardy 2023, doi 10.1080/01621459.2023.2205607). The rates may drift from conversation to conversation:
the null need only hold for each given the past. Products and their mixtures are test supermartingales, and by Ville's
inequality one reaches 1/alpha with probability at most alpha, however often it is looked at.

Absent on purpose: rates learnt on the way. A fixed mixture makes the evidence a function of four counts, which a person
can check. Letters: s and c the rates of stable and canary, K the components of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STABLE_RATES = (0.03, 0.1, 0.3)
"""Rates s* of the mixture. Coarse because they hardly matter: an error in s* moves s° along with it."""
EFFECTS = (0.1, 0.2, 0.4, 0.8, 1.6)
EFFECT_WEIGHTS = (1.0, 1.0, 1.0, 4.0, 1.0)
"""Distances of c* from the null in log odds, and their weights: half on about a doubling (0.75 at 5%, 0.81 at 10%, 0.98 at
20%), the effect a rollback has to find soon; the rest so that small and large ones are found too."""
BISECTIONS = 60
DIFFERENCES = tuple(round(-0.25 + 0.005 * step, 3) for step in range(171))
"""Where the bounds of the difference are looked for: -25 to 60 points in half points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """Concluded conversations while the canary had one share: how many, and how many of them count against."""

    share: float
    canary: int = 0
    canary_bad: int = 0
    stable: int = 0
    stable_bad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """What is to be refuted: c <= ratio * s + offset, or with `above` c >= ratio * s + offset."""

    ratio: float = 1.0
    offset: float = 0.0
    above: bool = False


NOT_WORSE = Null()


@dataclass(frozen=True, slots=True)
class Bets:
    """A mixture of likelihood ratios: `logs` (4, K) for each conversation of canary bad, canary good, stable bad and
    stable good, and the log weight (K,) of each component."""

    logs: Floats
    log_weights: Floats


@lru_cache(maxsize=1024)
def bets(share: float, null: Null) -> Bets:
    """Return the mixture that bets against `null` when the canary gets `share` (above 0, below 1)."""
    stable = np.repeat(STABLE_RATES, len(EFFECTS))
    effects = np.tile(EFFECTS, len(STABLE_RATES)) * (-1 if null.above else 1)
    weights = np.tile(EFFECT_WEIGHTS, len(STABLE_RATES))
    edge = null.ratio * stable + null.offset
    inside = (edge > 0) & (edge < 1)
    stable, effects, weights, edge = stable[inside], effects[inside], weights[inside], edge[inside]
    canary = 1 / (1 + (1 - edge) / edge * np.exp(-effects))
    stable_null, canary_null = nearest(stable, canary, share=share, null=null)
    ratios = (
        canary / canary_null,
        (1 - canary) / (1 - canary_null),
        stable / stable_null,
        (1 - stable) / (1 - stable_null),
    )
    return Bets(np.log(np.stack(ratios)), np.log(weights / weights.sum()) if len(weights) else weights)


def nearest(stable: Floats, canary: Floats, *, share: float, null: Null) -> tuple[Floats, Floats]:
    """Return the rates (K,), (K,) on the null's edge with the least (1 - share) KL(s*, s) + share KL(c*, c).

    That sum is convex along the edge: its derivative is bisected. For ratio 1 and offset 0 both are the weighted mean.
    """
    low = np.full(stable.shape, max(0.0, -null.offset / null.ratio))
    high = np.full(stable.shape, min(1.0, (1 - null.offset) / null.ratio))
    for _ in range(BISECTIONS):
        s = (low + high) / 2
        c = null.ratio * s + null.offset
        slope = (1 - share) * (s - stable) / (s * (1 - s)) + share * null.ratio * (c - canary) / (c * (1 - c))
        low, high = np.where(slope < 0, s, low), np.where(slope < 0, high, s)
    return (low + high) / 2, null.ratio * (low + high) / 2 + null.offset


def log_e_value(stages: Sequence[Arms], null: Null = NOT_WORSE) -> float:
    """Return the log of the evidence against `null`, in nats; 0 is none, log(1 / alpha) refutes it at alpha."""
    totals: Floats | None = None
    log_weights: Floats = np.zeros(0)
    for arms in stages:
        if not 0 < arms.share < 1:
            continue  # nobody was drawn, so nothing was learnt about the difference
        bet = bets(arms.share, null)
        counts = np.array(
            [
                arms.canary_bad,
                arms.canary - arms.canary_bad,
                arms.stable_bad,
                arms.stable - arms.stable_bad,
            ],
            dtype=np.float64,
        )
        gained, log_weights = counts @ bet.logs, bet.log_weights
        totals = gained if totals is None else totals + gained
    return 0.0 if totals is None or not len(totals) else mixed(totals + log_weights)


def mixed(logs: Floats) -> float:
    """Return the log of the sum of exp(logs)."""
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum()))


def difference_bounds(stages: Sequence[Arms], *, low_alpha: float, high_alpha: float) -> tuple[float, float]:
    """Return bounds of c - s that hold at all times, each with probability 1 - its alpha; -1 and 1 when unknown.

    A bound is the first difference, from outside, that its e-value does not refute.
    """
    low = high = -1.0
    for low in DIFFERENCES:
        if log_e_value(stages, Null(offset=low)) < -math.log(low_alpha):
            break
    for high in reversed(DIFFERENCES):
        if log_e_value(stages, Null(offset=high, above=True)) < -math.log(high_alpha):
            break
    return (-1.0 if low == DIFFERENCES[0] else low), (1.0 if high == DIFFERENCES[-1] else high)


def mean_exceeds(
    *,
    mean: tuple[float, float],
    variance: tuple[float, float],
    n: tuple[int, int],
    factor: float,
    alpha: float,
) -> float:
    """Return how far the canary's mean lies surely above `factor` times stable's: the lower bound of the difference.

    The pairs are (canary, stable). An asymptotic confidence sequence: it holds at all later times once both n are large
    enough for the central limit theorem (Waudby-Smith et al. 2024, arXiv 2103.06476, tightest at n = 100).
    """
    squared = variance[0] / n[0] + factor**2 * variance[1] / n[1]
    log_alpha = -2 * math.log(alpha)
    intrinsic = n[0] * (log_alpha + math.log(log_alpha) + 1) / 100
    radius = math.sqrt(squared * (1 + 1 / intrinsic) * (math.log1p(intrinsic) + log_alpha))
    return mean[0] - factor * mean[1] - radius
