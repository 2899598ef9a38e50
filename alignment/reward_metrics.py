"""How well scores predict people: pure numpy. Letters: P pairs, U thumbs, C answers, M members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from alignment.intervals import Estimate, Floats, wilson, wilson_by_group
from alignment.preferences import Pair, Thumb

FEWEST_PAIRS_A_BIN = 20
MOST_BINS = 10
TEMPERATURES = np.geomspace(0.05, 20.0, 241)


def held_out_metrics(
    members: Floats,
    pairs: Sequence[Pair],
    *,
    seen_raters: set[str] | None,
    longer_wins: bool,
    plain_members: Floats | None = None,
) -> dict[str, float]:
    """Return the figures of the report, all under `reward/`.

    Args:
        members: (P, 2, M) scores of chosen and rejected.
        pairs: the P held-out pairs with a winner.
        seen_raters: raters of the training pairs; None: everybody, as one fit ranked them, and nobody is new.
        longer_wins: the side that length alone would bet on, from the training pairs.
        plain_members: (P, 2, M) scores before length was taken out of them; None when it was not.
    """
    scores = members.mean(axis=2)  # (P, 2)
    leads = scores[:, 0] - scores[:, 1]
    lengths = np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs], dtype=np.float64).reshape(
        -1, 2
    )
    accuracy = pair_accuracy(leads, pairs)
    length_lead = (lengths[:, 0] - lengths[:, 1]) * (1 if longer_wins else -1)
    plain = members if plain_members is None else plain_members
    result = {
        "pairs": float(len(pairs)),
        "independent_pairs": float(accuracy.n),
        **_interval("accuracy", accuracy),
        "temperature": fit_temperature(leads),
        "calibration_error": crossed_calibration_error(leads, prompt_halves(pairs)),
        "calibration_error_before": calibration_error(leads, temperature=1.0),
        "length_only_accuracy": float(_right(length_lead).mean()) if len(pairs) else 0.5,
        "score_length_correlation": _correlation(scores.ravel(), lengths.ravel()),
        "score_length_correlation_before": _correlation(plain.mean(axis=2).ravel(), lengths.ravel()),
        "within_prompt_spread": float(np.abs(leads).mean() / 2) if len(pairs) else 0.0,
        "member_correlation": member_correlation(members),
        "member_error_correlation": member_error_correlation(members),
    }
    if seen_raters is not None:
        new = [i for i, pair in enumerate(pairs) if pair.rater not in seen_raters]
        result["unseen_rater_pairs"] = float(len(new))
        if new:
            result |= _interval("unseen_rater_accuracy", pair_accuracy(leads[new], [pairs[i] for i in new]))
    return {f"reward/{name}": value for name, value in result.items()}


def pair_accuracy(leads: Floats, pairs: Sequence[Pair]) -> Estimate:
    """Return the share of pairs whose winner leads, (P,) leads. Those of a prompt hang together: people compare
    one answer with several, and thumbs of the rarer kind are in several pairs."""
    return share_right(leads, [pair.prompt_key for pair in pairs])


def share_right(leads: Floats, groups: Sequence[str]) -> Estimate:
    """Return the share of leads (N,) above 0, those of exactly 0 half, where labels of a group, N names, hang together."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return wilson_by_group(_right(leads), np.array([numbers[name] for name in groups], dtype=np.int64))


def thumb_metrics(scores: Floats, thumbs: Sequence[Thumb]) -> dict[str, float]:
    """Return how often an answer with a thumb up scores above one with a thumb down of the same rater, `reward/thumb_...`.

    Raters are compared with themselves only, so leniency does not count. The interval is Wilson's for as many
    observations as separate couples can be formed: the mean over all couples varies no more than over those (Hoeffding
    1948). Couples are separate when they share no prompt, whose answers may all be scored alike, and a rater counts by
    their number; where raters judged the same prompts, those couples are one observation. Thumbs of raters with one kind
    alone say nothing here.

    Args:
        scores: (U,) of the thumbs' answers.
        thumbs: the U held-out thumbs.
    """
    wins, separate = 0.0, 0
    prompts: tuple[set[str], set[str]] = (set(), set())
    by_rater: dict[str, list[tuple[float, Thumb]]] = defaultdict(list)
    for score, thumb in zip(scores, thumbs, strict=True):
        by_rater[thumb.rater].append((score, thumb))
    for _, own in sorted(by_rater.items()):
        ups, downs = (np.array([score for score, thumb in own if thumb.up == up]) for up in (True, False))
        if not len(ups) or not len(downs):
            continue
        asked = [{thumb.prompt_key for _, thumb in own if thumb.up == up} for up in (True, False)]
        couples = min(map(len, asked))
        wins += couples * share_above(ups, downs)
        separate += couples
        for everyones, one in zip(prompts, asked, strict=True):
            everyones.update(one)
    worth = min(separate, *map(len, prompts))
    accuracy = wilson(wins / max(1, separate) * worth, worth)
    found = {"thumbs": float(len(thumbs)), "thumb_couples": float(worth)}
    found |= _interval("thumb_accuracy", accuracy)
    return {f"reward/{name}": value for name, value in found.items()}


def share_above(ups: Floats, downs: Floats) -> float:
    """Return the share of all couples of one of `ups` (U,) and one of `downs` (D,) in which the former is the greater, equal
    ones half: the area under the curve (Mann & Whitney 1947), by sorting."""
    ordered = np.sort(downs)
    below = np.searchsorted(ordered, ups, side="left") + np.searchsorted(ordered, ups, side="right")
    return float(below.sum()) / (2 * len(ups) * len(downs))


def new_rater_metrics(new_raters: Floats, all_raters: Floats, raters: Sequence[str]) -> dict[str, float]:
    """Return the accuracy on raters that were left out, beside that of the same quick fit with everybody in it.

    The interval is about new raters, so pairs of one rater hang together: three of them say little, however many pairs.

    Args:
        new_raters: (P,) leads of held-out pairs whose raters gave none of the training labels.
        all_raters: (P,) leads of the same pairs when every rater's training labels were used.
        raters: of the P pairs.
    """
    found = share_right(new_raters, raters)
    result = {"left_out_rater_pairs": float(len(new_raters)), **_interval("left_out_rater_accuracy", found)}
    result["left_in_rater_accuracy"] = share_right(all_raters, raters).value
    return {f"reward/{name}": value for name, value in result.items()}


def _interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def prompt_halves(pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Return (P,) bool: every second prompt's pairs, so that the pairs of a prompt are on one side."""
    order = {key: number for number, key in enumerate(dict.fromkeys(pair.prompt_key for pair in pairs))}
    return np.array([order[pair.prompt_key] % 2 == 0 for pair in pairs], dtype=bool)


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


def crossed_calibration_error(leads: Floats, first_half: NDArray[np.bool_]) -> float:
    """Return the mean of both halves' error, each at the temperature fitted on the other half.

    So no temperature is judged on what it was fitted to.
    """
    one, other = leads[first_half], leads[~first_half]
    errors = (
        len(part) * calibration_error(part, temperature=fit_temperature(rest))
        for part, rest in ((one, other), (other, one))
    )
    return sum(errors) / max(1, len(leads))


def member_correlation(members: Floats) -> float:
    """Return the mean correlation of two members' leads: near 1 their spread says little about errors."""
    leads = members[:, 0] - members[:, 1]  # (P, M)
    pairs = list(combinations(range(leads.shape[1]), 2))
    return float(np.mean([_correlation(leads[:, i], leads[:, j]) for i, j in pairs])) if pairs else 1.0


def member_error_correlation(members: Floats) -> float:
    """Return the mean correlation of two members' mistakes: near 1 they fail on the same pairs and a mean hides it.

    A mistake is 1, a lead 0, a draw 0.5. Members that make none, or nothing but mistakes, count as uncorrelated.
    """
    wrong = 1 - _right(members[:, 0] - members[:, 1])  # (P, M)
    pairs = list(combinations(range(wrong.shape[1]), 2))
    return float(np.mean([_correlation(wrong[:, i], wrong[:, j]) for i, j in pairs])) if pairs else 1.0


def length_slopes(members: Floats, lengths: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return (M,) how much each member's score grows a token, within groups: sum(l s) / sum(l^2) of centred l and s.

    Args:
        members: (C, M) scores of answers.
        lengths: (C,) tokens.
        groups: (C,) number of the group an answer is compared in: the two of a pair, or all thumbs together.
    """
    counts = np.bincount(groups).astype(np.float64)
    mean_length = np.bincount(groups, weights=lengths) / np.maximum(counts, 1)
    means = [np.bincount(groups, weights=column) / np.maximum(counts, 1) for column in members.T]
    apart = lengths - mean_length[groups]
    total = float((apart * apart).sum())
    if total == 0:
        return np.zeros(members.shape[1])
    centred = members - np.stack([mean[groups] for mean in means], axis=1)
    slopes: Floats = apart @ centred / total
    return slopes


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson's r; 0 when one of them does not vary."""
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else 0.0
