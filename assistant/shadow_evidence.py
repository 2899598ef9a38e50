"""The shadow beside the served policy, on the same questions: shares, differences and ratios with 95% intervals.

Pure functions. The questions of one conversation are alike, so an interval takes conversations, not questions, as what was
drawn: each number is a ratio of two sums, and its variance comes from what each conversation adds to them beyond that
ratio (the linearised ratio estimator over clusters; Cochran, Sampling Techniques, 1977, chapters 6 and 9A). Made-up
observations keep an interval honest where nothing or everything happened: two of each outcome for a share (Agresti and Coull
1998), one in each direction for a paired difference (Bonett and Price 2012). Deliberately absent: a verdict. Nobody has
judged these answers, and unlike the canary's evidence the intervals hold for one look, not for all looks together.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Z = 1.96
"""Standard errors on each side of a 95% interval."""
Observation = tuple[str, float, float]
"""Conversation, and what it adds to the sum above and to the sum below."""
OF_SHARE = ((1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (0.0, 1.0))
OF_DIFFERENCE = ((1.0, 1.0), (-1.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One question to both. Times in seconds, lengths in tokens."""

    conversation_id: str
    failed: bool
    """The shadow broke off or did not begin: of its answer only this counts."""
    empty: bool
    handed_over: bool
    tokens: int
    total_s: float
    served_empty: bool
    served_handed_over: bool
    served_tokens: int
    served_total_s: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95% interval; None where there is too little to say."""

    value: float | None
    low: float | None
    high: float | None


Numbers = Callable[[Pair], tuple[float, float]]
ANSWERED: dict[str, tuple[Numbers, tuple[tuple[float, float], ...]]] = {
    "empty": (lambda p: (p.empty, 1), OF_SHARE),
    "served_empty": (lambda p: (p.served_empty, 1), OF_SHARE),
    "empty_difference": (lambda p: (p.empty - p.served_empty, 1), OF_DIFFERENCE),
    "hand_over": (lambda p: (p.handed_over, 1), OF_SHARE),
    "served_hand_over": (lambda p: (p.served_handed_over, 1), OF_SHARE),
    "hand_over_difference": (lambda p: (p.handed_over - p.served_handed_over, 1), OF_DIFFERENCE),
    "length_ratio": (lambda p: (p.tokens, p.served_tokens), ()),
    "latency_ratio": (lambda p: (p.total_s, p.served_total_s), ()),
    "agreement": (lambda p: (p.agreement, 1), OF_SHARE),
}
"""What is measured on the questions that both answered, and the made-up observations of its interval."""


def estimates(pairs: Sequence[Pair]) -> dict[str, Estimate]:
    """Return every measure by name."""
    failed = [(pair.conversation_id, float(pair.failed), 1.0) for pair in pairs]
    answered = [pair for pair in pairs if not pair.failed]
    found = {"failed": ratio(failed, OF_SHARE)}
    for name, (numbers, made_up) in ANSWERED.items():
        found[name] = ratio([(pair.conversation_id, *numbers(pair)) for pair in answered], made_up)
    return found


def ratio(observations: Sequence[Observation], made_up: Sequence[tuple[float, float]] = ()) -> Estimate:
    """Return sum above / sum below, with an interval over conversations, two of which are needed for it."""
    below = sum(one[2] for one in observations)
    if below <= 0:
        return Estimate(value=None, low=None, high=None)
    value = sum(one[1] for one in observations) / below
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    extra = [(f"\0{number}", *one) for number, one in enumerate(made_up)]
    for conversation_id, above_it, below_it in (*observations, *extra):
        sums[conversation_id][0] += above_it
        sums[conversation_id][1] += below_it
    k, total = len(sums), sum(one[1] for one in sums.values())
    if k < 2:
        return Estimate(value=value, low=None, high=None)
    centre = sum(one[0] for one in sums.values()) / total
    squares = sum((one[0] - centre * one[1]) ** 2 for one in sums.values())
    half = Z * math.sqrt(k / (k - 1) * squares) / total
    least, most = (-1.0, 1.0) if made_up == OF_DIFFERENCE else (0.0, 1.0 if made_up else math.inf)
    return Estimate(value=value, low=max(least, centre - half), high=min(most, centre + half))


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Return how much two answers share, 0 to 1: the F1 of their token ids in any order (Rajpurkar et al. 2016)."""
    if not one and not other:
        return 1.0
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))
