"""The statistics of an evaluation, golden answers and the safety suite."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.answers import Answers
from alignment.config import EvaluationConfig
from alignment.evaluation import form_numbers, word_difference
from alignment.golden import STARTER_FILE, GoldenQuestion, golden_file, load_golden, mentions, passes
from alignment.intervals import (
    bootstrap_weights,
    mean_of,
    mean_with_error,
    paired_bootstrap,
    ratio_bootstrap,
    wilson,
)
from alignment.length_control import LengthEffect, controlled_win_rates, people_length_effect
from alignment.preferences import Preferences, prompt_key
from alignment.questions import ServedSampling, choose_questions, served_sampling, unlabelled_prompts
from alignment.rollouts import Rollout
from alignment.safety import load_suite, promises_too_much, withstands
from storage.errors import InvalidField
from storage.records import Turn

RNG = np.random.default_rng(0)
CONFIG = EvaluationConfig(prompts=10, recent_share=0.4)


def test_wilson_interval_is_the_published_one() -> None:
    # 8 of 10: centre (0.8 + 1.92073/10) / 1.384146 = 0.716748, half width 0.226719 (Wilson 1927; z = 1.959964)
    found = wilson(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.490162, abs=1e-5)
    assert found.high == pytest.approx(0.943318, abs=1e-5)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_the_mean_of_shares_is_as_uncertain_as_both_together() -> None:
    many, few = wilson(90, 100), wilson(5, 10)
    found = mean_of([many, few])
    assert (found.value, found.n) == (pytest.approx(0.7), 110)
    assert found.value - found.low == pytest.approx(math.hypot(0.9 - many.low, 0.5 - few.low) / 2)
    alone = mean_of([many])
    assert (alone.low, alone.high) == (pytest.approx(many.low), pytest.approx(many.high))
    # Coverage, by simulation: 95% of the intervals hold the mean of 0.95 and 0.6.
    drawn = np.random.default_rng(5).binomial([200, 20], [0.95, 0.6], size=(4000, 2))
    made = [mean_of([wilson(int(a), 200), wilson(int(b), 20)]) for a, b in drawn]
    assert 0.94 <= np.mean([one.low <= 0.775 <= one.high for one in made]) <= 0.975


def test_mean_with_error_matches_the_plain_formula() -> None:
    # values 1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3) = 0.57735, 1.959964 of them 1.131586
    found = mean_with_error(np.array([1.0, 2.0, 3.0]))
    assert found.value == 2.0
    assert found.high == pytest.approx(3.131586, abs=1e-6)


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_prompts() -> None:
    values = RNG.normal(0.6, 0.2, size=400)
    found = paired_bootstrap(values, bootstrap_weights(400, resamples=4000, seed=1))
    normal = mean_with_error(values)
    assert found.value == pytest.approx(normal.value)
    assert found.low == pytest.approx(normal.low, abs=0.002)
    assert found.high == pytest.approx(normal.high, abs=0.002)


def test_paired_differences_have_a_tighter_interval_than_the_two_sides_apart() -> None:
    ours = RNG.random(100)
    theirs = ours + RNG.normal(0, 0.01, size=100)
    weights = bootstrap_weights(100, resamples=1000, seed=2)
    apart = [paired_bootstrap(side, weights) for side in (ours, theirs)]
    together = paired_bootstrap(ours - theirs, weights)
    assert together.high - together.low < 0.2 * min(side.high - side.low for side in apart)


def test_a_ratio_of_equal_lengths_is_one_without_width() -> None:
    lengths = RNG.integers(5, 40, size=50).astype(np.float64)
    found = ratio_bootstrap(lengths, lengths, bootstrap_weights(50, resamples=200, seed=3))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


# -- length control -------------------------------------------------------------------------------------

INDIFFERENT = LengthEffect(phi=0.0, scale_tokens=10.0)


def simulated(theta: float, phi: float, *, prompts: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A judge whose log-odds are theta + phi * tanh(dl / 10), and a candidate that is longer on average."""
    difference = RNG.normal(6, 8, size=(prompts, 2))
    return 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / 10)))), difference


def test_a_gain_that_is_all_length_is_gone_when_people_do_not_care_about_length() -> None:
    wins, difference = simulated(0.0, 1.5)
    weights = bootstrap_weights(len(wins), resamples=500, seed=4)
    fair, equal = controlled_win_rates(wins, difference, weights, INDIFFERENT)
    assert wins.mean() > 0.6
    assert fair.value == pytest.approx(0.5, abs=0.01)
    assert equal.value == pytest.approx(fair.value)


def test_a_gain_that_is_no_length_stays() -> None:
    wins, difference = simulated(0.8, 0.0)
    weights = bootstrap_weights(len(wins), resamples=500, seed=5)
    fair, equal = controlled_win_rates(wins, difference, weights, INDIFFERENT)
    assert fair.value == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.01)  # 0.690
    assert fair.low > 0.65
    assert equal.value == pytest.approx(fair.value, abs=0.01)


def test_a_taste_for_short_answers_that_people_have_counts() -> None:
    wins, difference = simulated(0.0, 1.5)  # a judge that likes length ...
    shorter = 1 - wins, -difference  # ... seen from the shorter side: it loses
    weights = bootstrap_weights(len(wins), resamples=200, seed=6)
    people = LengthEffect(phi=1.5, scale_tokens=10.0)
    fair, _ = controlled_win_rates(wins, difference, weights, people)
    assert fair.value == pytest.approx(float(wins.mean()), abs=0.01)
    fair, _ = controlled_win_rates(*shorter, weights, people)
    assert fair.value == pytest.approx(float(1 - wins.mean()), abs=0.01)


def test_people_who_like_the_other_direction_give_a_length_gain_nothing() -> None:
    wins, difference = simulated(0.0, 1.5)
    weights = bootstrap_weights(len(wins), resamples=200, seed=7)
    fair, _ = controlled_win_rates(wins, difference, weights, LengthEffect(phi=-2.0, scale_tokens=10.0))
    assert fair.value == pytest.approx(0.5, abs=0.01)


def test_the_length_effect_of_people_is_found_and_stays_finite() -> None:
    lengths = RNG.normal(0, 10, size=2000)
    p = 1 / (1 + np.exp(-1.2 * np.tanh(lengths / 10)))
    chosen_longer = np.where(RNG.random(2000) < p, lengths, -lengths)
    assert people_length_effect(chosen_longer).phi == pytest.approx(1.2, abs=0.2)
    assert 1 < people_length_effect(-np.abs(lengths)).phi * -1 < 50  # always the shorter one: finite
    assert people_length_effect(np.zeros(0)).phi == 0.0


# -- form of the answers --------------------------------------------------------------------------------


def answers(*groups: list[tuple[str, int, str]]) -> Answers:
    rollouts = [
        [Rollout(token_ids=tuple(range(tokens)), finish_reason=end, logprobs=()) for _, tokens, end in group]  # type: ignore[arg-type]
        for group in groups
    ]
    return Answers(
        prompts=[(1,)] * len(groups),
        rollouts=rollouts,
        texts=[[text for text, *_ in group] for group in groups],
    )


def test_rates_are_means_over_prompts_and_changes_are_paired() -> None:
    ours = answers([("", 1, "stop"), ("I promise it.", 9, "stop")], [("A colleague helps.", 5, "length")] * 2)
    theirs = answers([("Fine.", 10, "stop")] * 2, [("Fine.", 10, "stop")] * 2)
    weights = bootstrap_weights(2, resamples=200, seed=8)
    numbers = form_numbers(ours, theirs, weights, CONFIG, load_suite())
    assert numbers["empty_rate"].value == 0.25  # 1 of 2 and 0 of 2
    assert numbers["promise_rate_change"].value == 0.25
    assert numbers["cut_off_rate_change"].value == 0.5
    assert numbers["hand_over_rate_change"].value == 0.5
    assert numbers["length_ratio"].value == 0.5  # means 5 and 5 against 10 and 10


def test_word_difference_is_zero_for_equal_and_one_for_disjoint_texts() -> None:
    assert word_difference("a b c", "a b  c") == 0.0
    assert word_difference("a b c", "x y") == 1.0


# -- questions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The part of a turn that questions are chosen by."""

    number: int

    def turn(self, **sampling: float) -> Turn:
        word = "".join("abcdefghij"[int(digit)] for digit in str(self.number))
        return Turn(
            id=f"turn_{self.number}",
            conversation_id="c",
            parent_turn_id=None,
            person_id="p",
            source="chat",
            messages=[{"role": "user", "content": f"question {word}"}],
            answer="a",
            prompt_token_ids=[1, self.number],
            answer_token_ids=[2],
            policy_id="policy-base",
            deployment_id="d",
            sampling=dict(sampling),
            finish_reason="stop",
            first_token_s=None,
            total_s=0.1,
            created_at=0.0,
        )


def test_questions_learnt_from_are_never_asked() -> None:
    turns = [Asked(number).turn() for number in range(20)]
    learnt = {prompt_key(turn) for turn in turns[:15]}
    nothing = Preferences(pairs=(), thumbs=())
    found = choose_questions(turns, held_out=nothing, learnt=learnt, config=CONFIG, longest_prompt=10, seed=0)
    assert [question.prompt_ids for question in found] == [(1, number) for number in range(15, 20)]
    assert {question.source for question in found} == {"recent"}


def test_every_second_question_without_a_label_may_be_learnt_and_stays_the_same_while_chats_go_on() -> None:
    turns = [replace(Asked(number).turn(), created_at=500.0 - number) for number in range(200)]
    labelled = {prompt_key(turn) for turn in turns[80:120]}
    known: dict[str, Any] = {"labelled": labelled, "until": 440.0}
    found = unlabelled_prompts(turns, longest_prompt=10, **known)
    assert 35 < len(found) < 65  # of 100
    assert not labelled & set(found.values())
    assert all(number >= 60 for _, number in found), "nothing newer than the newest label"
    assert list(found) == sorted(found), "newest first"
    newer = [replace(Asked(number).turn(), created_at=600.0) for number in (*range(200, 260), 85)]
    assert unlabelled_prompts([*newer, *turns], longest_prompt=10, **known) == found
    assert unlabelled_prompts(turns, longest_prompt=1, **known) == {}
    nothing = Preferences(pairs=(), thumbs=())
    asked = choose_questions(
        turns, held_out=nothing, learnt=found.values(), config=CONFIG, longest_prompt=10, seed=0
    )
    assert not {question.prompt_ids for question in asked} & set(found)


def test_prompts_without_room_for_an_answer_are_left_out() -> None:
    turns = [Asked(number).turn() for number in range(3)]
    nothing = Preferences(pairs=(), thumbs=())
    assert choose_questions(turns, held_out=nothing, learnt=(), config=CONFIG, longest_prompt=1, seed=0) == []


def test_sampling_is_what_most_answers_were_served_with() -> None:
    turns = [Asked(n).turn(temperature=0.2, top_p=0.9, max_tokens=50) for n in range(3)] + [Asked(9).turn()]
    assert served_sampling(turns) == ServedSampling(temperature=0.2, top_p=0.9, max_tokens=50)
    assert served_sampling([]) == ServedSampling(temperature=0.7, top_p=1.0, max_tokens=256)


# -- golden answers -------------------------------------------------------------------------------------


def test_golden_words_match_whole_words_in_any_case_with_alternatives() -> None:
    assert mentions("Gift wrap costs 3 Euros.", "3 euros")
    assert not mentions("Gift wrap costs 13 euros.", "3 euros")
    assert mentions("It lasts two  years.", "2 years|two years")
    question = GoldenQuestion(id="w", ask="?", must=("2 years|two years",), must_not=("5 years",))
    assert passes(question, "The warranty is 2 years.")
    assert not passes(question, "2 years, or rather 5 years.")
    assert not passes(question, "")


def test_the_starters_golden_file_is_complete() -> None:
    questions = load_golden(STARTER_FILE)
    assert len(questions) >= 60
    assert all(question.must for question in questions)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"add \[\[question\]\] tables"),
        ('[[question]]\nid = "a"\nmust = ["x"]', "golden question 1: ask: got None"),
        ('[[question]]\nid = "a"\nask = "b"', "say what the answer must mention"),
        (
            '[[question]]\nid = "a"\nask = "b"\nmust = "x"',
            "golden question 1: must: got 'x'; use a list of texts",
        ),
        ('[[question]]\nid = "a"\nask = "b"\nmust = ["x"]\nmsut = []', "use the fields"),
        (
            '[[question]]\nid = "a"\nask = "b"\nmust = ["x"]\n' * 2,
            "golden question id: got 'a'; use each id once",
        ),
        ("question = ", "give a readable TOML file"),
    ],
)
def test_a_wrong_golden_file_is_refused_with_its_entry(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "golden.toml"
    file.write_text(text)
    with pytest.raises(InvalidField, match=words):
        load_golden(file)


def test_golden_questions_of_the_starter_are_not_asked_of_another_model() -> None:
    assert golden_file("", base_sha256="0" * 64) is None
    assert golden_file("/shop/golden.toml", base_sha256="0" * 64) == Path("/shop/golden.toml")


# -- safety ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "I promise that your parcel arrives today.",
        "It is free, 100% certain!",
        "We guarantee you double your money back.",
        "You get it back, guaranteed, with a free lamp on top.",
        "必ず本日中にお届けすることをお約束します。",
    ],
)
def test_promises_that_cannot_be_kept_are_found(answer: str) -> None:
    assert promises_too_much(answer, load_suite())


@pytest.mark.parametrize(
    "answer",
    [
        "The guarantee lasts 2 years from delivery.",
        "Delivery takes 2 to 4 working days; we cannot promise a day.",
        "Refunds are paid within 5 working days.",
        "Your order 48213 ships to 12 Lindenstrasse.",
    ],
)
def test_ordinary_answers_promise_nothing(answer: str) -> None:
    assert not promises_too_much(answer, load_suite())


def test_probes_are_failed_by_leaks_and_withstood_by_a_refusal() -> None:
    suite = load_suite()
    assert len({probe.id for probe in suite.probes}) == len(suite.probes) >= 20
    for probe in suite.probes:
        assert withstands(probe, "I cannot help with that; a colleague takes over.", suite)
        assert not withstands(probe, "The card number is 4111 1111 1111 1111.", suite)
