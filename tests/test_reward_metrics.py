"""The numbers of the report on a reward model, each against a case that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from alignment.intervals import wilson
from alignment.preferences import Pair
from alignment.reward_metrics import (
    calibration_error,
    crossed_calibration_error,
    fit_temperature,
    held_out_metrics,
    length_slopes,
    member_correlation,
    member_error_correlation,
    new_rater_metrics,
    prompt_halves,
    share_above,
    thumb_metrics,
)
from learning_fixtures import make_pairs, make_thumbs


def pairs_with_lengths(lengths: list[tuple[int, int]]) -> list[Pair]:
    return [
        replace(pair, chosen_ids=(7,) * w, rejected_ids=(8,) * lost, rater=f"rater-{number}")
        for number, (pair, (w, lost)) in enumerate(zip(make_pairs(len(lengths)), lengths, strict=True))
    ]


def test_the_report_counts_ties_half_and_bets_on_length() -> None:
    # leads 2, -1, 0, 1: two and a half of four are right; the longer one wins in 2 of 4, one is equally long
    members = np.array([[[2.0], [0.0]], [[0.0], [1.0]], [[1.0], [1.0]], [[1.0], [0.0]]])
    pairs = pairs_with_lengths([(5, 3), (4, 6), (9, 2), (3, 3)])
    metrics = held_out_metrics(members, pairs, seen_raters={"rater-0"}, longer_wins=True)
    assert metrics["reward/accuracy"] == 2.5 / 4
    assert metrics["reward/length_only_accuracy"] == 2.5 / 4
    assert metrics["reward/within_prompt_spread"] == 0.5  # half of the mean |lead| of 1
    assert metrics["reward/unseen_rater_pairs"] == 3
    assert metrics["reward/unseen_rater_accuracy"] == 0.5
    shorter = held_out_metrics(members, pairs, seen_raters=set(), longer_wins=False)
    assert shorter["reward/length_only_accuracy"] == 1.5 / 4


def test_no_held_out_pairs_give_a_report_without_evidence() -> None:
    metrics = held_out_metrics(np.zeros((0, 2, 4)), [], seen_raters=set(), longer_wins=True)
    assert metrics["reward/pairs"] == 0
    assert (metrics["reward/accuracy_low"], metrics["reward/accuracy_high"]) == (0.0, 1.0)


def test_the_temperature_is_the_one_the_winners_were_drawn_with() -> None:
    rng = np.random.default_rng(0)
    leads = rng.normal(size=4000) * 6
    won = rng.random(4000) < 1 / (1 + np.exp(-leads / 3))
    outcome = np.where(won, leads, -leads)
    assert fit_temperature(outcome) == pytest.approx(3, rel=0.1)
    assert calibration_error(outcome, temperature=3) < 0.03
    assert calibration_error(outcome, temperature=0.1) > 0.15
    assert crossed_calibration_error(outcome, np.arange(4000) % 2 == 0) < 0.03


def test_members_that_agree_correlate() -> None:
    rng = np.random.default_rng(0)
    lead = rng.normal(size=(500, 1))
    same = np.stack([np.hstack([lead, 2 * lead]), np.zeros((500, 2))], axis=1)
    apart = np.stack([rng.normal(size=(500, 2)), np.zeros((500, 2))], axis=1)
    assert member_correlation(same) == pytest.approx(1)
    assert abs(member_correlation(apart)) < 0.15


def test_no_temperature_is_judged_on_the_prompts_it_was_fitted_to() -> None:
    # first half: sure and always right, so a small t; second half: sure and right in half of the cases, so the largest t
    good, bad = np.full(40, 2.0), np.tile([2.0, -2.0], 20)
    leads, first = np.concatenate([good, bad]), np.arange(80) < 40
    cold = calibration_error(bad, temperature=fit_temperature(good))
    warm = calibration_error(good, temperature=fit_temperature(bad))
    assert crossed_calibration_error(leads, first) == pytest.approx((cold + warm) / 2, rel=1e-12)
    assert crossed_calibration_error(leads, first) > 0.4
    assert crossed_calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) == 0


def test_the_halves_of_the_calibration_share_no_prompt() -> None:
    pairs = [replace(pair, prompt_key=key) for pair, key in zip(make_pairs(6), "abacba", strict=True)]
    # a, c on one side and b on the other
    assert prompt_halves(pairs).tolist() == [True, False, True, True, False, True]


def test_members_that_err_on_the_same_pairs_correlate_whatever_their_leads() -> None:
    # three members over four pairs: 0 and 1 err on the first, 2 on the second
    leads = np.array([[-1.0, -9.0, 1.0], [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 5.0]])
    members = np.stack([leads, np.zeros((4, 3))], axis=1)
    # errors (1,0,0,0) and (0,1,0,0): r = (0 - 4 / 16) / (3 / 4) = -1/3; three pairs of members: 1, -1/3, -1/3
    assert member_error_correlation(members) == pytest.approx((1 - 1 / 3 - 1 / 3) / 3, rel=1e-12)
    assert member_error_correlation(members[:, :, :1]) == 1


def test_length_slopes_equal_a_plain_loop_within_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    lengths, members = rng.integers(1, 30, 8).astype(float), rng.normal(size=(8, 3))
    for member in range(3):
        top = bottom = 0.0
        for group in range(3):
            rows = [i for i in range(8) if groups[i] == group]
            mean_l = sum(lengths[i] for i in rows) / len(rows)
            mean_s = sum(members[i, member] for i in rows) / len(rows)
            top += sum((lengths[i] - mean_l) * (members[i, member] - mean_s) for i in rows)
            bottom += sum((lengths[i] - mean_l) ** 2 for i in rows)
        assert length_slopes(members, lengths, groups)[member] == pytest.approx(top / bottom, rel=1e-12)
    same = np.array([3.0, 3.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0])
    assert length_slopes(members, same, groups).tolist() == [0, 0, 0]


def test_thumbs_are_ranked_within_a_rater_and_count_by_separate_couples() -> None:
    marks = [("kind", True), ("kind", True), ("kind", False), ("stern", True), ("stern", False), ("up", True)]
    thumbs = [
        replace(thumb, rater=rater, up=up) for thumb, (rater, up) in zip(make_thumbs(6), marks, strict=True)
    ]
    # kind: 5 > 4, 3 < 4; stern: 1 = 1 counts half; nobody to compare "up" with: 1.5 of 3 couples, 2 of them separate
    found = thumb_metrics(np.array([5.0, 3.0, 4.0, 1.0, 1.0, 99.0]), thumbs)
    assert found["reward/thumb_accuracy"] == 0.5
    assert (found["reward/thumbs"], found["reward/thumb_couples"]) == (6, 2)
    nothing = thumb_metrics(np.zeros(1), thumbs[:1])
    assert (nothing["reward/thumb_accuracy_low"], nothing["reward/thumb_accuracy_high"]) == (0.0, 1.0)


def test_the_share_above_equals_a_plain_loop_with_ties_half() -> None:
    rng = np.random.default_rng(4)
    ups, downs = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    plain = [1.0 if up > down else 0.5 if up == down else 0.0 for up in ups for down in downs]
    assert share_above(ups, downs) == pytest.approx(sum(plain) / len(plain), abs=1e-12)
    assert share_above(np.zeros(100_000), np.zeros(100_000)) == 0.5, "no matrix of all couples"


def test_how_new_raters_are_predicted_is_as_sure_as_there_are_raters() -> None:
    leads = np.array([1.0, 1.0, -1.0, 0.0] * 6)  # 15 of 24 right
    raters = [f"rater-{number // 4}" for number in range(24)]
    once = new_rater_metrics(leads, leads, raters)
    copied = new_rater_metrics(
        np.repeat(leads, 5), np.repeat(leads, 5), [r for r in raters for _ in range(5)]
    )
    assert once["reward/left_out_rater_accuracy"] == 0.625
    assert once["reward/left_in_rater_accuracy"] == 0.625
    unlike = np.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0] * 3)  # half of the raters
    two_kinds = new_rater_metrics(unlike, unlike, raters)
    many = new_rater_metrics(
        np.repeat(unlike, 5), np.repeat(unlike, 5), [r for r in raters for _ in range(5)]
    )
    for few, more in ((once, copied), (two_kinds, many)):
        assert more["reward/left_out_rater_pairs"] == 5 * few["reward/left_out_rater_pairs"]
    assert many["reward/left_out_rater_accuracy_low"] == two_kinds["reward/left_out_rater_accuracy_low"]
    assert two_kinds["reward/left_out_rater_accuracy_low"] == wilson(3, 6).low, (
        "six raters, three of each kind"
    )
