"""How well scores predict people: pure numpy on held-out pairs. Letters: P pairs, M members."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from alignment.intervals import Floats, wilson
from alignment.preferences import Pair

FEWEST_PAIRS_A_BIN = 20
MOST_BINS = 10
TEMPERATURES = np.geomspace(0.05, 20.0, 241)


def held_out_metrics(
    members: Floats, pairs: Sequence[Pair], *, seen_raters: set[str], longer_wins: bool
) -> dict[str, float]:
    """Return the figures of the report, all under `reward/`.

    Args:
        members: (P, 2, M) scores of chosen and rejected.
        pairs: the P held-out pairs with a winner.
        seen_raters: raters of the training pairs.
        longer_wins: the side that length alone would bet on, from the training pairs.
    """
    scores = members.mean(axis=2)  # (P, 2)
    leads = scores[:, 0] - scores[:, 1]
    lengths = np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs], dtype=np.float64).reshape(
        -1, 2
    )
    right = _right(leads)
    accuracy = wilson(float(right.sum()), len(pairs))
    length_lead = (lengths[:, 0] - lengths[:, 1]) * (1 if longer_wins else -1)
    new = [i for i, pair in enumerate(pairs) if pair.rater not in seen_raters]
    result = {
        "pairs": float(len(pairs)),
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "temperature": fit_temperature(leads),
        "calibration_error": crossed_calibration_error(leads),
        "length_only_accuracy": float(_right(length_lead).mean()) if len(pairs) else 0.5,
        "score_length_correlation": _correlation(scores.ravel(), lengths.ravel()),
        "within_prompt_spread": float(np.abs(leads).mean() / 2) if len(pairs) else 0.0,
        "member_correlation": member_correlation(members),
        "unseen_rater_pairs": float(len(new)),
    }
    if new:
        result["unseen_rater_accuracy"] = float(right[new].mean())
    return {f"reward/{name}": value for name, value in result.items()}


def _right(leads: Floats) -> Floats:
    """1 where the winner leads, 0.5 where nobody does."""
    return np.where(leads == 0, 0.5, (leads > 0).astype(np.float64))


def fit_temperature(leads: Floats) -> float:
    """Return the t that makes sigmoid(lead / t) fit best; the leads are winner minus loser, (P,)."""
    if not len(leads):
        return 1.0
    costs = np.logaddexp(0.0, -leads[:, None] / TEMPERATURES[None, :]).mean(axis=0)
    return float(TEMPERATURES[int(costs.argmin())])


def calibration_error(leads: Floats, *, temperature: float) -> float:
    """Return the expected calibration error of sigmoid(|lead| / t) as the chance to be right, equal-mass bins.

    Bins hold 20 pairs or more: with fewer the noise alone looks like an error.
    """
    if not len(leads):
        return 0.0
    confidence = 1 / (1 + np.exp(-np.abs(leads) / temperature))
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, max(1, min(MOST_BINS, len(leads) // FEWEST_PAIRS_A_BIN)))
    right = _right(leads)
    gaps = [len(part) * abs(right[part].mean() - confidence[part].mean()) for part in bins]
    return float(sum(gaps) / len(leads))


def crossed_calibration_error(leads: Floats) -> float:
    """Return the mean of both halves' error, each at the temperature fitted on the other half."""
    even, odd = leads[::2], leads[1::2]
    one = calibration_error(even, temperature=fit_temperature(odd))
    other = calibration_error(odd, temperature=fit_temperature(even))
    return (len(even) * one + len(odd) * other) / max(1, len(leads))


def member_correlation(members: Floats) -> float:
    """Return the mean correlation of two members' leads: near 1 their spread says little about errors."""
    leads = members[:, 0] - members[:, 1]  # (P, M)
    pairs = list(combinations(range(leads.shape[1]), 2))
    return float(np.mean([_correlation(leads[:, i], leads[:, j]) for i, j in pairs])) if pairs else 1.0


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson's r; 0 when one of them does not vary."""
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else 0.0
