"""How much each rater's labels count: from agreement with others and with themselves, capped against poisoning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

PRIOR_VOTES = 8.0
"""A rater's agreement is pulled to everybody's by as much as this many meetings: a few unlucky ones change little."""
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.2, 1.5
CAP_SHARE = 0.10
"""Most of the weight that one rater may have: poisoning DPO takes 0.5% of the data (arXiv 2406.12091)."""
RATERS_FOR_CAP = 10
"""With fewer raters somebody must be over the cap; then it is reported, not enforced."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement of one thing: `value` is -1, 0 or 1; votes on the same `item` can agree or not."""

    rater: str
    item: Hashable
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How often votes on the same item agree (a tie against a choice counts half)."""

    mean: float | None
    """Over all meetings of two votes; None when no item was judged twice."""
    meetings: int
    by_rater: Mapping[str, tuple[float, int]]
    """Each rater's mean and meetings, repeats of their own included."""


def agreement(votes: Sequence[Vote]) -> Agreement:
    """Compare all votes on the same item pairwise."""
    items: dict[Hashable, list[Vote]] = defaultdict(list)
    for vote in votes:
        items[vote.item].append(vote)
    met: dict[str, list[float]] = defaultdict(list)
    everything: list[float] = []
    for group in items.values():
        for one, other in combinations(group, 2):
            alike = 1.0 - abs(one.value - other.value) / 2.0
            everything.append(alike)
            for rater in {one.rater, other.rater}:
                met[rater].append(alike)
    return Agreement(
        mean=sum(everything) / len(everything) if everything else None,
        meetings=len(everything),
        by_rater={rater: (sum(values) / len(values), len(values)) for rater, values in met.items()},
    )


def reliability_weights(raters: Sequence[str], found: Agreement) -> dict[str, float]:
    """Return a weight a rater: (2p - 1) of their shrunk agreement p against everybody's; 1 where nothing is known.

    2p - 1 is 0 for a coin and 1 for somebody who always agrees.
    """
    if found.mean is None:
        return dict.fromkeys(raters, 1.0)
    usual = max(2 * found.mean - 1, 0.1)
    weights = {}
    for rater in raters:
        mean, meetings = found.by_rater.get(rater, (found.mean, 0))
        shrunk = (mean * meetings + found.mean * PRIOR_VOTES) / (meetings + PRIOR_VOTES)
        relative = 1.0 if meetings == 0 else (2 * shrunk - 1) / usual
        weights[rater] = min(max(relative, LOWEST_WEIGHT), HIGHEST_WEIGHT)
    return weights


def cap_factors(totals: Mapping[str, float], *, cap: float = CAP_SHARE) -> dict[str, float]:
    """Return the factor on each rater's labels so that nobody has more than `cap` of what remains.

    With fewer than 1 / cap raters that is impossible and every factor is 1.
    """
    if len(totals) < max(RATERS_FOR_CAP, 1 / cap):
        return dict.fromkeys(totals, 1.0)
    capped: set[str] = set()
    limit = float("inf")
    while True:
        free = sum(total for rater, total in totals.items() if rater not in capped)
        room = 1 - cap * len(capped)
        limit = cap * free / room
        over = {rater for rater, total in totals.items() if total > limit * (1 + 1e-9)} - capped
        if not over:
            return {rater: limit / totals[rater] if rater in capped else 1.0 for rater in totals}
        capped |= over
