"""The rules that choose a method from the data, and the words they find for what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignment.choose import DataStatistics, choose_method, statistics_of
from alignment.config import ChoiceConfig, DataConfig
from alignment.intervals import wilson
from alignment.preferences import Pair, Preferences
from alignment.training_data import divide, prompts_of

RULES = ChoiceConfig()
GOOD = DataStatistics(
    pairs=600,
    effective_pairs=600.0,
    prompts=500,
    thumbs=40,
    corrections=12,
    raters=4,
    largest_rater_share=0.3,
    agreement=wilson(160, 200),
    on_policy_share=0.9,
    dropped={},
)


def test_enough_pairs_of_the_served_policy_by_raters_who_agree_give_dpo() -> None:
    choice = choose_method(GOOD, RULES, wanted="auto")
    assert (choice.method, choice.rule) == ("dpo", "2: pairs of the served policy")


def test_four_hundred_comparisons_of_one_person_train_with_warnings() -> None:
    small = replace(GOOD, pairs=400, effective_pairs=400.0, raters=1, largest_rater_share=1.0, agreement=None)
    choice = choose_method(small, RULES, wanted="auto")
    assert choice.method == "dpo"
    assert any("400 pairs, fewer than the 500" in warning for warning in choice.warnings)
    assert any(warning.startswith("Agreement is unknown") for warning in choice.warnings)
    assert choice.noisy_labels is False


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"pairs": 199}, "0: not enough data", "collect 1 more comparisons or corrections"),
        ({"effective_pairs": 99.0}, "0: not enough data", "from more people"),
        ({"prompts": 29}, "0: not enough data", "different questions"),
        ({"agreement": wilson(110, 200)}, "0: raters disagree", "settle the rubric"),
        ({"agreement": wilson(5900, 10000)}, "0: raters disagree", "Raters agree on 59%"),
        ({"raters": 12, "largest_rater_share": 0.2}, "0: raters disagree", "holds 20% of the weight"),
        ({"on_policy_share": 0.49}, "4: shifted data", "fresh A/B answers"),
    ],
)
def test_data_that_do_not_allow_training_say_what_to_collect(
    changes: dict[str, object], rule: str, words: str
) -> None:
    choice = choose_method(replace(GOOD, **changes), RULES, wanted="auto")  # type: ignore[arg-type]
    assert choice.method is None
    assert choice.rule == rule
    assert words in choice.reason


def test_the_cap_on_one_rater_holds_only_from_ten_raters_on() -> None:
    nine = replace(GOOD, raters=9, largest_rater_share=0.5)
    assert choose_method(nine, RULES, wanted="auto").method == "dpo"


def test_agreement_over_few_double_ratings_counts_as_unknown() -> None:
    few = replace(GOOD, agreement=wilson(9, 19))
    choice = choose_method(few, RULES, wanted="auto")
    assert choice.method == "dpo"
    assert any("19 double ratings" in warning for warning in choice.warnings)


def test_a_wanted_method_trains_on_doubtful_data_with_a_warning_but_not_on_too_little() -> None:
    doubtful = replace(GOOD, agreement=wilson(110, 200), on_policy_share=0.1)
    choice = choose_method(doubtful, RULES, wanted="dpo")
    assert (choice.method, choice.rule) == ("dpo", "asked for")
    assert sum(warning.startswith("Trained although") for warning in choice.warnings) == 2
    assert choose_method(replace(GOOD, pairs=150), RULES, wanted="dpo").method is None


def test_flip_rate_follows_from_agreement() -> None:
    # two raters who each flip with e = 0.2 agree with (1 - e)^2 + e^2 = 0.64 + 0.04 = 0.68
    assert replace(GOOD, agreement=wilson(680, 1000)).flip_rate == pytest.approx(0.2, abs=1e-12)
    assert replace(GOOD, agreement=wilson(400, 1000)).flip_rate == 0.5
    assert replace(GOOD, agreement=None).flip_rate == 0.0


def test_labels_that_flip_often_ask_for_a_loss_that_allows_for_it() -> None:
    noisy = replace(GOOD, agreement=wilson(680, 1000))
    assert choose_method(noisy, RULES, wanted="auto").noisy_labels
    clean = replace(GOOD, agreement=wilson(950, 1000))
    assert not choose_method(clean, RULES, wanted="auto").noisy_labels


def pair(number: int, *, weight: float = 1.0, tie: bool = False, key: str | None = None) -> Pair:
    return Pair(
        id=f"comparison-{number}",
        prompt_ids=(1, number),
        chosen_ids=(2,),
        rejected_ids=(3,),
        weight=weight,
        margin=0.0,
        source="comparison",
        prompt_key=key or f"key-{number}",
        rater="aya",
        tie=tie,
    )


NOTES = {"agreement_meetings": 0, "agreement": None, "raters": 1, "largest_rater_share": 1.0, "dropped": {}}


def test_ties_are_no_pairs_and_unequal_weights_are_worth_less() -> None:
    # weights 3 and 1: (3 + 1)^2 / (9 + 1) = 1.6 effective pairs
    data = Preferences(pairs=(pair(1, weight=3.0), pair(2), pair(3, tie=True)), thumbs=(), notes=NOTES)
    found = statistics_of(data, corrections=0, on_policy_share=1.0)
    assert (found.pairs, found.prompts) == (2, 2)
    assert found.effective_pairs == pytest.approx(1.6)
    assert found.agreement is None


def test_the_three_parts_share_no_prompt_and_lose_none() -> None:
    data = Preferences(pairs=tuple(pair(n, key=f"key-{n % 50}") for n in range(400)), thumbs=(), notes=NOTES)
    parts = divide(data, DataConfig(), seed=3)
    keys = [prompts_of(part) for part in (parts.policy, parts.judge, parts.held_out)]
    assert keys[0] | keys[1] | keys[2] == prompts_of(data)
    assert not (keys[0] & keys[1])
    assert not (keys[0] & keys[2])
    assert not (keys[1] & keys[2])
    assert [len(part) for part in keys] == [20, 20, 10]  # 20% of 50 held out, the rest in halves
