"""How right each rater is, from others' votes and a model's opinion, and what becomes of those who are not."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from alignment.rater_weights import (
    LOWEST_WEIGHT,
    OUTLIER_SHARE,
    PRIOR_VOTES,
    Vote,
    calibration,
    cap_factors,
    contrary,
    rater_cap,
    rater_warnings,
    reliabilities,
    reliability_weights,
)

SURE = 30.0
"""Log-odds beyond doubt."""


def votes_of(rater: str, count: int, *, right: float, lead: float = SURE, seed: int = 0) -> list[Vote]:
    """Return votes on items of their own, `right` of them on the side that the lead favours."""
    rng = random.Random(f"{rater}{seed}")
    wrong = set(rng.sample(range(count), round(count * (1 - right))))
    return [Vote(rater, (rater, at), -1 if at in wrong else 1, lead) for at in range(count)]


def told(votes: list[Vote]) -> tuple[dict[str, float], list[str]]:
    """Return the raters' weights and the warnings about them."""
    known = reliabilities(votes)
    weights = reliability_weights(sorted({vote.rater for vote in votes}), known)
    return weights, rater_warnings(known.raters, weights, {})


def test_where_the_truth_is_known_reliability_is_a_posterior_of_two_betas() -> None:
    """Beta(8u, 8(1 - u)) of people like all others and Beta(1, 1) of outliers, in closed form."""
    known = reliabilities(votes_of("a", 40, right=0.9) + votes_of("b", 20, right=0.4))
    found, usual = known.raters, known.usual
    assert usual == pytest.approx((36 + 8) / 60, abs=1e-6)
    for name, right, count in (("a", 36, 40), ("b", 8, 20)):
        parts = []
        for share, ups, downs in (
            (1 - OUTLIER_SHARE, PRIOR_VOTES * usual, PRIOR_VOTES * (1 - usual)),
            (OUTLIER_SHARE, 1.0, 1.0),
        ):
            a, b = ups + right, downs + count - right
            parts.append((share * math.exp(log_beta(a, b) - log_beta(ups, downs)), a, b))
        total = sum(mass for mass, _, _ in parts)
        mean = sum(mass * a / (a + b) for mass, a, b in parts) / total
        square = sum(mass * a * (a + 1) / (a + b) / (a + b + 1) for mass, a, b in parts) / total
        one = found[name]
        assert one.value == pytest.approx(mean, abs=2e-3)
        assert one.high - one.low == pytest.approx(2 * 1.96 * (square - mean**2) ** 0.5, rel=0.07)
        assert one.n == count


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def test_eighteen_turned_labels_are_enough_among_people_who_are_nearly_always_right() -> None:
    honest = [vote for name in "abcdefghi" for vote in votes_of(name, 25, right=0.96, lead=4.0)]
    weights, warnings = told(honest + votes_of("mallory", 18, right=0.0, lead=4.0))
    assert weights["mallory"] == 0.0
    assert len(warnings) == 1


def test_honest_raters_of_few_labels_are_not_accused() -> None:
    """100 teams of ten who are right 7 times in 10 or more, by leads that are wrong as often as they say."""
    rng, accused = random.Random(7), 0
    for _ in range(100):
        right, count = rng.choice([0.7, 0.85, 0.97]), rng.choice([4, 8, 16, 32])
        votes = [honest_vote(f"rater-{name}", at, right, rng) for name in range(10) for at in range(count)]
        accused += len(contrary(reliabilities(votes).raters))
    assert accused <= 5  # of 1,000; a 97.5% bound on each could be wrong of 25


def honest_vote(rater: str, at: int, right: float, rng: random.Random) -> Vote:
    """A vote on an item whose lead is right as often as its log-odds say."""
    lead = abs(rng.gauss(0, 3))
    truth = 1 if rng.random() < 1 / (1 + math.exp(-lead)) else -1
    return Vote(rater, (rater, at), truth if rng.random() < right else -truth, lead)


def test_a_model_s_opinion_finds_who_flips_though_nobody_judged_the_same() -> None:
    votes = [vote for name in "abcdefghi" for vote in votes_of(name, 40, right=0.85, lead=1.5)]
    weights, warnings = told(votes + votes_of("mallory", 40, right=0.1, lead=1.5))
    assert weights["mallory"] == 0.0
    assert min(weights[name] for name in "abcdefghi") > 0.7
    (warning,) = warnings
    assert warning.startswith("Rater mallory disagrees with everyone else: ")
    assert "agreement on 40 labels (" in warning
    assert warning.endswith("their labels were left out. Talk to them.")


def test_others_votes_on_the_same_items_find_them_without_any_model() -> None:
    votes = [Vote(name, item, -1 if name == "d" else 1) for name in "abcd" for item in range(40)]
    weights, warnings = told(votes)
    assert weights["d"] == 0.0
    assert weights["a"] >= 1.0
    assert len(warnings) == 1


def test_a_model_that_knows_nothing_and_no_common_item_leave_everybody_equal() -> None:
    weights, warnings = told([vote for name in "abc" for vote in votes_of(name, 30, right=0.5, lead=0.0)])
    assert weights == pytest.approx(dict.fromkeys("abc", 1.0), abs=0.01)
    assert warnings == []
    assert reliability_weights(["new"], reliabilities([])) == {"new": 1.0}


def test_a_single_label_neither_damns_nor_is_trusted_blindly() -> None:
    votes = [vote for name in "abc" for vote in votes_of(name, 40, right=0.9)]
    for right in (0.0, 1.0):
        known = reliabilities(votes + votes_of("once", 1, right=right))
        assert abs(known.raters["once"].value - known.usual) < 0.15
        assert contrary(known.raters) == []


def test_a_careless_rater_counts_less_and_is_not_accused() -> None:
    votes = [vote for name in "abc" for vote in votes_of(name, 40, right=0.95)]
    weights, warnings = told(votes + votes_of("careless", 40, right=0.6))
    assert weights["careless"] < 0.5 * weights["a"]
    assert warnings == []


@pytest.mark.parametrize(("honest", "others"), [("a", "b"), ("ab", "cd")])
def test_nobody_is_left_out_when_it_is_word_against_word(honest: str, others: str) -> None:
    votes = [vote for name in honest for vote in votes_of(name, 40, right=1.0)]
    weights, warnings = told(votes + [vote for name in others for vote in votes_of(name, 40, right=0.0)])
    assert {weights[name] for name in others} == {LOWEST_WEIGHT}
    assert len(warnings) == len(others)
    assert "nobody was left out: the raters are split" in warnings[0]


def test_the_cap_does_not_lift_the_unreliable_among_ten() -> None:
    weights = {f"rater-{number}": 1.0 for number in range(8)} | {"poor": 0.2, "worse": 0.2}
    assert rater_cap(weights) == pytest.approx(1 / 8.4)
    assert set(cap_factors(weights, cap=rater_cap(weights), labels=84).values()) == {1.0}
    loud = {**weights, "rater-0": 5.0}  # many labels
    factors = cap_factors(loud, cap=rater_cap(weights), labels=134)
    kept = {rater: loud[rater] * factors[rater] for rater in loud}
    assert max(kept.values()) / sum(kept.values()) <= 1 / 8.4 + 1e-9
    assert rater_cap(dict.fromkeys("abcdefghijkl", 1.0)) == 0.1


def test_turned_labels_are_told_from_a_model_that_knows_little() -> None:
    rng = np.random.default_rng(1)
    sure = rng.normal(0, 4, 2000)
    truth = np.where(rng.random(2000) < 1 / (1 + np.exp(-sure)), 1.0, -1.0)  # what a label of its own says
    clean, noisy = (
        calibration(sure * truth),
        calibration(sure * np.where(rng.random(2000) < 0.3, -truth, truth)),
    )
    assert clean.factor == pytest.approx(1.0, rel=0.15)
    assert clean.turned.high < 0.05
    assert 0.6 < noisy.factor < 1.0  # on the careful side; taken at their word they make it 0.2
    assert noisy.turned.low < 0.3 < noisy.turned.high
    assert noisy.turned.value == pytest.approx(0.3, abs=0.05)
    blind = calibration(rng.normal(0, 4, 2000))
    assert blind.factor < 0.1  # it knows nothing: softened to nothing
    assert blind.turned.high == 0.45  # and nothing is ruled out
    nothing = calibration(np.zeros(0))
    assert (nothing.factor, nothing.turned.n) == (1.0, 0)


def labels_of(totals: dict[str, float]) -> tuple[dict[str, float], float]:
    """Return what a label of each weighs after the cap, 1 before, and what all are worth together."""
    factors = cap_factors(totals, labels=int(sum(totals.values())))
    return factors, sum(totals[rater] * factors[rater] for rater in totals)


@pytest.mark.parametrize("newcomers", [1, 2, 3])
def test_a_newcomers_label_does_not_weigh_as_much_as_a_raters_hundred(newcomers: int) -> None:
    crowd = {f"rater-{number}": 100.0 for number in range(9)}
    factors, whole = labels_of(crowd | {f"new-{number}": 1.0 for number in range(newcomers)})
    assert factors["new-0"] / whole <= 0.005 + 1e-9  # as the cap would have it: 10%
    assert factors["rater-0"] == pytest.approx((200 - newcomers) / 900)


def test_five_who_give_nearly_everything_are_still_learnt_from() -> None:
    factors, whole = labels_of(
        {f"rater-{number}": 1000.0 for number in range(5)} | {f"guest-{n}": 1.0 for n in range(10)}
    )
    assert whole == pytest.approx(200)
    assert factors["guest-0"] == 1.0


@pytest.mark.parametrize(("loud", "label_count"), [(1, 1000), (1, 20_000), (2, 1000)])
def test_accounts_that_give_most_labels_get_no_more_than_the_cap(loud: int, label_count: int) -> None:
    totals = {f"rater-{number}": 20.0 for number in range(12)}
    totals |= {f"loud-{number}": float(label_count) for number in range(loud)}
    factors, whole = labels_of(totals)
    assert label_count * factors["loud-0"] / whole == pytest.approx(0.1)
