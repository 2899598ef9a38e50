"""A person's repeats are one vote: neither ten labels, nor people who agree, nor a contradiction where one was a slip."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from alignment.intervals import wilson
from alignment.labels import Pair, Thumb
from alignment.preferences import Preferences, weighted
from alignment.rater_weights import Vote, agreement, reliabilities
from alignment.repeats import (
    SAID_OTHERWISE,
    SAID_TWICE,
    Repeats,
    beside_comparisons,
    one_vote_each,
    repeats_alike,
    together,
)
from learning_fixtures import make_pairs, make_thumbs

(PAIR,) = make_pairs(1)
(THUMB,) = make_thumbs(1)
SIDES = {"left": (PAIR.chosen_ids, PAIR.rejected_ids), "right": (PAIR.rejected_ids, PAIR.chosen_ids)}


def compared(*choices: str, rater: str = "aya") -> list[Pair]:
    """Return the rater's comparisons of the same two answers, in this order."""
    found = []
    for number, choice in enumerate(choices):
        chosen, rejected = SIDES["left" if choice == "tie" else choice]
        found.append(
            replace(
                PAIR,
                id=f"{rater}-{number}",
                chosen_ids=chosen,
                rejected_ids=rejected,
                tie=choice == "tie",
                rater=rater,
            )
        )
    return found


def rated(*ups: bool, rater: str = "aya") -> list[Thumb]:
    return [replace(THUMB, id=f"{rater}-{number}", up=up, rater=rater) for number, up in enumerate(ups)]


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        (["left"] * 9 + ["right"], 0),
        (["right"] + ["left"] * 9, 1),
        (["tie", "left"], 1),
        (["tie", "right"], 1),
        (["right", "tie"], 1),
        (["left", "right"], 1),
        (["right", "left"], 1),
        (["left", "right", "left"], 0),
    ],
)
def test_what_a_person_said_most_often_stands_and_of_equals_the_later(said: list[str], stands: int) -> None:
    (kept,), _ = one_vote_each(compared(*said), Counter())
    assert kept.id == f"aya-{stands}"


def test_repeats_are_counted_by_how_they_went() -> None:
    dropped: Counter[str] = Counter()
    labels = compared("left", "left", "right", "left") + compared("right", rater="ken")
    kept, repeats = one_vote_each(labels, dropped)
    assert [pair.id for pair in kept] == ["aya-0", "ken-0"]
    assert repeats == {"aya": Repeats(alike=1, unlike=2)}
    assert dropped == {SAID_TWICE: 2, SAID_OTHERWISE: 1}


def test_ten_thumbs_of_one_person_on_one_answer_are_one() -> None:
    dropped: Counter[str] = Counter()
    kept, repeats = one_vote_each(rated(*[True] * 9, False) + rated(False, rater="ken"), dropped)
    assert [(thumb.rater, thumb.up) for thumb in kept] == [("aya", True), ("ken", False)]
    assert repeats["aya"] == Repeats(alike=8, unlike=1)


def test_thumbs_make_no_pair_of_two_answers_that_the_person_compared() -> None:
    dropped: Counter[str] = Counter()
    of_thumbs = [replace(pair, source="ratings") for pair in compared("right", "right", rater="ken")]
    assert beside_comparisons(of_thumbs, compared("left"), dropped) == of_thumbs[:1]
    assert beside_comparisons(of_thumbs, compared("left", rater="ken"), dropped) == []


def test_labels_without_repeats_are_kept_as_they_are() -> None:
    pairs, dropped = make_pairs(20), Counter()
    assert one_vote_each(pairs, dropped) == (pairs, {})
    assert not +dropped


def test_agreement_is_between_people_and_counts_each_thing_once() -> None:
    votes = [Vote("a", 1, 1), Vote("b", 1, 1), Vote("c", 1, 0), Vote("a", 3, 1)]
    # item 1: ab 1, ac 0.5, bc 0.5; item 3: nobody met
    assert agreement(votes) == wilson(2 / 3, 1)
    assert agreement([Vote("a", 1, 1)] * 10) is None, "one person's ten clicks"
    crowd = agreement([Vote(f"rater-{number}", "one thing", 1) for number in range(30)])
    assert crowd is not None
    assert crowd.n == 1
    opposed = [Vote(name, item, said) for name, said in (("a", 1), ("b", -1)) for item in range(20)]
    found = agreement(opposed + [Vote("a", "again", 1)] * 10)
    assert found is not None
    assert (found.value, found.n) == (0.0, 20)


def test_the_statistics_keep_repeats_apart_from_agreement() -> None:
    kept, repeats = one_vote_each(rated(*[True] * 10), Counter())
    notes = weighted(Preferences(pairs=(), thumbs=tuple(kept), notes={"repeats": repeats})).notes
    assert notes["agreement"] is None
    assert (notes["repeats_alike"].value, notes["repeats_alike"].n) == (1.0, 1), "all of one person"
    assert repeats_alike({}) is None
    assert together(repeats, {"aya": Repeats(unlike=1)}) == {"aya": Repeats(alike=9, unlike=1)}


def test_who_contradicts_themselves_counts_less_and_nobody_counts_more_for_clicking_again() -> None:
    votes = [
        Vote(name, (name, item), 1 if item < 36 else -1, 30.0)
        for name in ("aya", "ken")
        for item in range(40)
    ]
    plain = reliabilities(votes).raters["aya"].value

    def with_repeats(**counts: int) -> float:
        return reliabilities(votes, {"aya": Repeats(**counts)}).raters["aya"].value

    assert with_repeats(alike=500) == plain
    assert with_repeats(alike=10, unlike=10) < plain - 0.05
    assert with_repeats(alike=500, unlike=5) == pytest.approx(plain, abs=0.02)
