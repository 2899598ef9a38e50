"""How much each rater's labels count: how often they are right, by a one-coin model, and a cap against poisoning.

One coin a rater (Dawid & Skene 1979, with one number for both kinds of mistakes): a label is right with the rater's
probability a. What is right nobody knows; on an item that several judged the others tell, and everywhere a `lead`, the
opinion of a model that learnt from labels of other prompts (`alignment.reward_raters`). Pure numpy.
Letters: N votes, R raters, I items, G points of a grid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.intervals import Estimate, Floats, wilson
from alignment.repeats import Repeats

PRIOR_VOTES = 8.0
"""A rater's reliability is pulled to everybody's by as much as this many votes: a few unlucky ones change little."""
OUTLIER_SHARE = 0.02
"""Of people, those of whom nothing is known beforehand: they may always be wrong."""
USUAL_BOUNDS = (0.55, 0.98)
"""Everybody's reliability is held in here: better than a coin, and never beyond doubt."""
EM_STEPS = 100
TEMPERATURES = np.geomspace(0.05, 20.0, 121)
FLIP_RATES = np.linspace(0.0, 0.45, 46)
PROFILE_95 = 1.92
"""Half the 95% quantile of chi-squared with one degree of freedom."""
GRID = np.linspace(0.0025, 0.9975, 200)
LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.2, 1.5
FEWEST_RATERS = 3
"""With two, one person's word stands against the other's: nobody is left out."""
LEFT_OUT_SHARE = 1 / 3
"""Most of the labels that those left out may hold together; with more there are two camps, and no saying who is right."""
CAP_SHARE = 0.10
"""Most of the weight that one rater may have: poisoning DPO takes 0.5% of the data (arXiv 2406.12091)."""
RATERS_FOR_CAP = 10
"""With fewer raters somebody must be over the cap; then it is reported, not enforced."""
LABELS_LEFT = 200
"""Average labels that the cap leaves at least, so that none carries over 0.5% of the weight (the same source)."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement of one thing: `value` is -1, 0 or 1; votes on the same `item` can agree or not."""

    rater: str
    item: Hashable
    value: int
    lead: float = 0.0
    """Log-odds that 1 is the right value, from elsewhere than the item's votes; 0 where nothing else is known."""


def agreement(votes: Sequence[Vote]) -> Estimate | None:
    """Return how often two people agree on what both judged (a tie against a choice counts half); None when nobody did.

    Every item is one observation, the mean over its meetings of two people: thirty people on one item are one question,
    not 435, and what a person says twice is no agreement.
    """
    items: dict[Hashable, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for vote in votes:
        items[vote.item][vote.rater][vote.value] += 1
    means = []
    for raters in items.values():
        if len(raters) > 1:
            alike, meetings = _meetings(sum(raters.values(), Counter()))
            own = [_meetings(counts) for counts in raters.values()]
            means.append((alike - sum(a for a, _ in own)) / (meetings - sum(n for _, n in own)))
    return wilson(sum(means), len(means)) if means else None


def _meetings(counts: Mapping[int, int]) -> tuple[float, int]:
    """Return how many of all couples of so many votes of each value agree, and how many couples there are."""
    total = sum(counts.values())
    ties = counts.get(0, 0)
    alike = sum(count * (count - 1) / 2 for count in counts.values()) + ties * (total - ties) / 2
    return alike, total * (total - 1) // 2


@dataclass(frozen=True, slots=True)
class _Votes:
    """Votes with a winner as arrays."""

    raters: list[str]
    rater: NDArray[np.int64]  # (N,) row of `raters`
    item: NDArray[np.int64]  # (N,)
    value: Floats  # (N,) -1 or 1
    prior: Floats  # (I,) log-odds that 1 is right, without any vote

    def evidence(self, reliable: Floats) -> Floats:
        """Return (I,) log-odds that 1 is right, from the prior and every vote."""
        said = self.value * np.log(reliable / (1 - reliable))[self.rater]
        return self.prior + np.bincount(self.item, weights=said, minlength=len(self.prior))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How right the raters are."""

    raters: Mapping[str, Estimate]
    """How often each is right, with a 95% credible interval; who gave no label with a winner is absent."""
    usual: float
    """How often they are right as a whole."""


def reliabilities(votes: Sequence[Vote], repeats: Mapping[str, Repeats] | None = None) -> Reliability:
    """Return how right the raters are.

    EM: the chance that each vote is right given every rater's reliability, then each rater's mean of those chances. The
    interval is the posterior's over a grid, given what all others and the leads say about the rater's items, and how the
    rater's own repeats went.

    Args:
        repeats: by rater.
    """
    table = _table([vote for vote in votes if vote.value])
    reliable = np.full(len(table.raters), 0.8)
    counts = np.bincount(table.rater, minlength=len(table.raters)).astype(np.float64)
    usual = 0.8
    for _ in range(EM_STEPS):
        right = sigmoid(table.value * table.evidence(reliable)[table.item])  # (N,)
        usual = float(np.clip(right.mean(), *USUAL_BOUNDS)) if len(right) else usual
        sums = np.bincount(table.rater, weights=right, minlength=len(table.raters))
        reliable = (sums + PRIOR_VOTES * usual) / (counts + PRIOR_VOTES)
    again = repeats or {}
    found = {
        name: _posterior(table, row, reliable, usual, again.get(name, Repeats()))
        for row, name in enumerate(table.raters)
    }
    return Reliability(raters=found, usual=usual)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What labels say about the log-odds that a model gave them."""

    factor: float
    """On the log-odds, so that they are neither too sure nor too soft."""
    turned: Estimate
    """Share of the labels that were turned round, with its 95% profile-likelihood interval."""
    fits: float
    """Log-likelihood of the labels at the likeliest share and factor, in nats: of two models the better one has more."""


def calibration(leads: Floats) -> Calibration:
    """Return the factor on `leads` (N,) that makes e + (1 - 2e) sigmoid(lead) fit best; e is the share of labels turned.

    Where even the surest leads are contradicted, labels are wrong, and softer leads would hide it. A model that knows
    little looks alike from afar, so the factor's e is the smallest that the labels do not rule out.

    Args:
        leads: log-odds of each label by a model that did not see it.
    """
    if not len(leads):
        return Calibration(1.0, Estimate(value=0.0, low=0.0, high=float(FLIP_RATES[-1]), n=0), 0.0)
    chance = sigmoid(leads[None, :] / TEMPERATURES[:, None])  # (T, N)
    fits = np.stack([np.log(e + (1 - 2 * e) * chance).sum(axis=1) for e in FLIP_RATES])  # (E, T)
    best = fits.max(axis=1)
    likely = np.flatnonzero(best >= best.max() - PROFILE_95)
    least, most, value = (float(FLIP_RATES[at]) for at in (likely[0], likely[-1], best.argmax()))
    factor = 1.0 / float(TEMPERATURES[int(fits[likely[0]].argmax())])
    return Calibration(factor, Estimate(value=value, low=least, high=most, n=len(leads)), float(best.max()))


def _table(votes: Sequence[Vote]) -> _Votes:
    raters = sorted({vote.rater for vote in votes})
    rows = {name: row for row, name in enumerate(raters)}
    items = {item: row for row, item in enumerate(dict.fromkeys(vote.item for vote in votes))}
    item = np.array([items[vote.item] for vote in votes], dtype=np.int64)
    leads = np.bincount(item, weights=[vote.lead for vote in votes], minlength=len(items))
    return _Votes(
        raters=raters,
        rater=np.array([rows[vote.rater] for vote in votes], dtype=np.int64),
        item=item,
        value=np.array([vote.value for vote in votes], dtype=np.float64),
        prior=leads / np.maximum(np.bincount(item, minlength=len(items)), 1),
    )


def _posterior(table: _Votes, row: int, reliable: Floats, usual: float, repeats: Repeats) -> Estimate:
    """Return the mean and the 2.5% and 97.5% quantiles of one rater's reliability."""
    mine = table.rater == row
    silent = np.where(np.arange(len(reliable)) == row, 0.5, reliable)  # a coin says nothing
    chance = sigmoid(
        table.value[mine] * table.evidence(silent)[table.item[mine]]
    )  # (n,) that a vote is right
    logs = np.log(np.outer(GRID, chance) + np.outer(1 - GRID, 1 - chance)).sum(axis=1)  # (G,)
    logs += _logs_of_repeats(repeats, usual)
    mass = np.exp(logs - logs.max()) * _prior(usual)
    mass /= mass.sum()
    low, high = GRID[np.searchsorted(np.cumsum(mass), [0.025, 0.975])]
    return Estimate(value=float(mass @ GRID), low=float(low), high=float(high), n=int(mine.sum()))


def _logs_of_repeats(repeats: Repeats, usual: float) -> Floats:
    """Return (G,) log-likelihoods of a rater's repeats: both judgements are right or both wrong, or one of them is wrong.

    To say the same again shows habit as well as care, and costs a click: it counts only beside repeats that went the other
    way, as often as everybody would be alike, so that repeats can make nobody more reliable than that.
    """
    by_chance = usual**2 + (1 - usual) ** 2
    alike = min(float(repeats.alike), repeats.unlike * by_chance / (1 - by_chance))
    result: Floats = repeats.unlike * np.log(2 * GRID * (1 - GRID)) + alike * np.log(
        GRID**2 + (1 - GRID) ** 2
    )
    return result


def _prior(usual: float) -> Floats:
    """Return (G,): like everybody, by `PRIOR_VOTES`, but for `OUTLIER_SHARE` of people, who may be anything.

    Without them eight votes at a usual 97% leave nothing for who is always wrong, and 18 labels would not show it.
    """
    like_all = (PRIOR_VOTES * usual - 1) * np.log(GRID) + (PRIOR_VOTES * (1 - usual) - 1) * np.log(1 - GRID)
    mass = np.exp(like_all - like_all.max())
    result: Floats = (1 - OUTLIER_SHARE) * mass / mass.sum() + OUTLIER_SHARE / len(GRID)
    return result


def sigmoid(x: Floats) -> Floats:
    """Return 1 / (1 + e^-x), within 1e-13 of 0 and 1."""
    result: Floats = 1 / (1 + np.exp(-np.clip(x, -30, 30)))
    return result


def reliability_weights(raters: Sequence[str], known: Reliability) -> dict[str, float]:
    """Return a weight a rater: (2a - 1) of their reliability a against everybody's, 1 where nothing is known.

    2a - 1 is 0 for a coin and 1 for somebody who is always right. Who is credibly worse than a coin gets 0, unless there
    are too few raters, or too many labels of such raters, to say who is wrong.
    """
    found, usual, weights = known.raters, known.usual, {}
    for rater in raters:
        unknown = (1 - OUTLIER_SHARE) * (2 * usual - 1)  # 2a - 1 of somebody without a label
        relative = (2 * found[rater].value - 1) / unknown if rater in found else 1.0
        weights[rater] = min(max(relative, LOWEST_WEIGHT), HIGHEST_WEIGHT)
    wrong = contrary(found)
    share = sum(found[rater].n for rater in wrong) / max(1, sum(one.n for one in found.values()))
    if len(found) >= FEWEST_RATERS and share <= LEFT_OUT_SHARE:
        weights |= dict.fromkeys(wrong, 0.0)
    return weights


def contrary(found: Mapping[str, Estimate]) -> list[str]:
    """Return the raters whose whole interval lies below chance."""
    return [rater for rater, one in found.items() if one.high < 0.5]


def rater_warnings(
    found: Mapping[str, Estimate], weights: Mapping[str, float], names: Mapping[str, str]
) -> list[str]:
    """Return what an operator should hear about raters who contradict the others, a sentence each."""
    told = []
    for rater in contrary(found):
        one = found[rater]
        done = (
            "their labels were left out"
            if weights[rater] == 0
            else "nobody was left out: the raters are split"
        )
        told.append(
            f"Rater {names.get(rater, rater)} disagrees with everyone else: {one.value:.0%} agreement on {one.n} labels "
            f"({one.low:.0%} to {one.high:.0%}); {done}. Talk to them."
        )
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterShare:
    """How the weight of pairs or of thumbs is shared out among their raters."""

    raters: int
    largest: float
    """Share of the rater with the most, after the cap."""
    cap: float
    """Most that one was to have."""
    cap_enforced: bool
    """Whether anybody's labels weigh less for it."""


def rater_cap(weights: Mapping[str, float]) -> float:
    """Return the most of the weight that one rater may have: 10%, or an equal part among those who can be relied on.

    Ten raters at 10% each weigh all the same; where some of them are hardly to be relied on, that would lift them up to
    the others.
    """
    return max(CAP_SHARE, max(weights.values(), default=1.0) / max(sum(weights.values()), 1e-9))


def cap_factors(totals: Mapping[str, float], *, cap: float = CAP_SHARE, labels: int) -> dict[str, float]:
    """Return the factor on each rater's labels so that nobody has more than `cap` of what remains, as far as sense allows.

    With fewer than ten raters that is impossible and every factor is 1. Where ten or more have very unlike numbers of
    labels, it would leave the many next to nothing, and the few labels of a newcomer a tenth of the weight: the poison
    that it is against. So what remains is worth `LABELS_LEFT` average labels, or half of them all, whatever the shares.

    Args:
        totals: weight of each rater's labels.
        labels: how many those are together.
    """
    given = {rater: total for rater, total in totals.items() if total > 0}
    if len(given) < RATERS_FOR_CAP:
        return dict.fromkeys(totals, 1.0)
    worth = sum(given.values()) / max(1, labels) * min(LABELS_LEFT, labels / 2)
    most = max(_most_within(given, cap), _most_that_leaves(given, worth))
    return {rater: min(1.0, most / total) if total > 0 else 1.0 for rater, total in totals.items()}


def _most_within(totals: Mapping[str, float], cap: float) -> float:
    """Return the most that one rater may hold so that nobody has more than `cap` of the rest of it."""
    capped: set[str] = set()
    while True:
        free = sum(total for rater, total in totals.items() if rater not in capped)
        most = cap * free / (1 - cap * len(capped))
        over = {rater for rater, total in totals.items() if total > most * (1 + 1e-9)} - capped
        if not over:
            return most
        capped |= over


def _most_that_leaves(totals: Mapping[str, float], worth: float) -> float:
    """Return the least that the largest must be cut to so that `worth` is left of all."""
    left, ordered = worth, sorted(totals.values())
    for number, total in enumerate(ordered):
        if total * (len(ordered) - number) >= left:
            return left / (len(ordered) - number)
        left -= total
    return ordered[-1]
