"""What a run measures of its data before a method is chosen, and how it divides them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.choose import choose_method, statistics_of
from alignment.config import ChoiceConfig, DataConfig
from alignment.labels import Thumb, pairs_of_thumbs
from alignment.preferences import Pair, Preferences, weighted
from alignment.training_data import (
    answers_by_policy,
    divide,
    effective_sample_share,
    ess_share,
    may_suffice,
    on_policy_share,
    prompts_of,
)
from learning_fixtures import make_thumbs
from storage import conversations, feedback
from storage.records import Comparison, Snapshot
from storage_fixtures import add_candidate, approve, deploy, make_turn, make_world, start_conversation

RULES = ChoiceConfig()


def test_statistics_are_json_with_the_thumbs_and_corrections_in_them() -> None:
    edited = replace(pair(1), source="correction")
    thumbs = tuple(make_thumbs(5))  # up, down, up, down, up
    data = Preferences(pairs=(edited, pair(2)), thumbs=thumbs, notes=NOTES)
    found = statistics_of(data, corrections=1, on_policy_share=1.0, effective_sample_share=0.7)
    assert (found.correction_pairs, found.thumbs_up, found.thumb_prompts) == (1, 3, 5)
    assert found.thumbs_minority_share == 0.4
    assert json.loads(json.dumps(found.as_json()))["effective_sample_share"] == 0.7


def test_the_effective_share_equals_kishs_formula_and_stays_finite() -> None:
    # weights 1, 1, e: (2 + e)^2 / (3 (2 + e^2))
    assert ess_share([0.0, 0.0, 1.0]) == pytest.approx((2 + math.e) ** 2 / (3 * (2 + math.e**2)), rel=1e-14)
    assert ess_share([3.0] * 5) == pytest.approx(1)
    assert ess_share([-5000.0, 5000.0]) == pytest.approx(0.5)
    assert ess_share([]) is None


def test_answers_are_weighed_once_and_the_served_policys_own_weigh_one(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    old = add_candidate(world)
    approve(world, old)
    deployments = (world.deployment, deploy(world, old))
    for deployment, ids in zip(deployments, (([4, 9], [5, 9]), ([6, 9], [7, 9])), strict=True):
        conversation = start_conversation(world)
        by = {"policy_id": deployment.policy_id, "deployment_id": deployment.id}
        left, right = (make_turn(world, conversation, answer_token_ids=answer, **by) for answer in ids)
        for turn in (left, right):
            conversations.record_turn(world.store, turn)
        for person in (world.staff, world.admin):
            feedback.compare(
                world.store,
                left_turn_id=left.id,
                right_turn_id=right.id,
                person_id=person.id,
                choice="left",
                strength=None,
            )
    pairs = tuple(replace(pair(n), id=label.id) for n, label in enumerate(world.store.all(Comparison)))
    preferences = Preferences(pairs=pairs, thumbs=(), notes=NOTES)
    answers = answers_by_policy(world.store, preferences)
    assert [answer for _, answer in answers[old.id]] == [[6, 9], [7, 9]]
    assert len(answers[world.base.id]) == 2
    assert on_policy_share(world.store, preferences, frozenset({world.base.id})) == 0.5
    asked = []

    def log_ratios(policy: str, given: object) -> list[float]:
        asked.append(policy)
        return [0.0, math.log(3)]

    # weights 1, 1, 1, 3: 36 / (4 * 12)
    share = effective_sample_share(answers, served=world.base.id, log_ratios=log_ratios)
    assert share == pytest.approx(0.75)
    assert asked == [old.id]


def test_a_run_without_enough_labels_ends_before_a_model_is_loaded() -> None:
    def suffices(thumbs_train: bool = False, **counts: int) -> bool:
        snapshot = Snapshot(
            id="s", run_id="r", sha256="", cut_off=0.0, item_ids={}, counts=counts, created_at=0.0
        )
        return may_suffice(snapshot, RULES, thumbs_train=thumbs_train)

    assert suffices(comparisons=200)
    assert suffices(corrections=100)
    assert not suffices(comparisons=100, corrections=99)
    assert not suffices(ratings=0)
    assert suffices(comparisons=199, ratings=2, thumbs_train=True)
    strict = replace(RULES, min_pairs=10**6)
    snapshot = Snapshot(
        id="s", run_id="r", sha256="", cut_off=0.0, item_ids={}, counts={"ratings": 400}, created_at=0.0
    )
    assert may_suffice(snapshot, strict, thumbs_train=True)
    assert not may_suffice(snapshot, strict)


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


NOTES = {"agreement": None, "raters": 1, "dropped": {}}


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


def rated(count: int, *, prompts: int, up_of: int = 2, raters: int = 1) -> list[Thumb]:
    """Return thumbs on an answer each, dealt to the prompts and raters in turn; one of `up_of` of a prompt is up."""
    return [
        Thumb(
            id=f"thumb-{number}",
            prompt_ids=(number % prompts,),
            answer_ids=(number, 9),
            up=number // prompts % up_of == 0,
            weight=1.0,
            prompt_key=f"key-{number % prompts}",
            rater=f"rater-{number % raters}",
        )
        for number in range(count)
    ]


def test_thumbs_make_no_more_pairs_than_there_are_of_the_more_frequent_kind() -> None:
    began = time.perf_counter()
    pairs = pairs_of_thumbs(rated(2000, prompts=1))
    assert time.perf_counter() - began < 1
    assert len(pairs) == 1000
    assert len({pair.chosen_ids for pair in pairs}) == len({pair.rejected_ids for pair in pairs}) == 1000
    one_sided = pairs_of_thumbs(rated(100, prompts=1, up_of=4))
    assert len(one_sided) == 75
    assert set(Counter(pair.chosen_ids for pair in one_sided).values()) == {3}, "they take turns"


def test_a_rater_s_own_thumbs_are_paired_first_and_never_one_answer_with_itself() -> None:
    thumbs = rated(60, prompts=1, raters=3)  # of each rater ten up and ten down
    assert all(pair.other_rater == "" for pair in pairs_of_thumbs(thumbs))
    same = [replace(thumb, answer_ids=(4, 9)) for thumb in thumbs]
    assert pairs_of_thumbs(same) == []
    other = replace(thumbs[0], id="other", answer_ids=(5, 9), up=True, rater="new")
    assert [pair.id.split("+")[0] for pair in pairs_of_thumbs([*same, other])] == ["other"] * 30


def test_one_thumb_more_makes_one_pair_more_and_many_on_one_answer_take_no_time() -> None:
    on_a = [
        replace(thumb, answer_ids=(4, 9)) for thumb in rated(100, prompts=1, raters=100)
    ]  # 50 up, 50 down
    on_b = replace(on_a[0], id="b", answer_ids=(5, 9), up=False, rater="new")
    assert len(pairs_of_thumbs([*on_a, on_b])) == 50
    assert len(pairs_of_thumbs([*on_a, on_b, replace(on_a[0], id="more", rater="more")])) == 51
    many = [replace(thumb, answer_ids=(4, 9)) for thumb in rated(20_000, prompts=1, raters=20_000)]
    began = time.perf_counter()
    assert pairs_of_thumbs(many) == []
    assert time.perf_counter() - began < 2


def test_a_hundred_and_eighty_thumbs_are_not_enough_for_either_method() -> None:
    thumbs = rated(180, prompts=30)  # three up and three down on each
    labels = weighted(Preferences(pairs=tuple(pairs_of_thumbs(thumbs)), thumbs=tuple(thumbs)))
    found = statistics_of(labels, corrections=0, on_policy_share=1.0)
    assert (found.pairs, round(found.effective_pairs)) == (90, 90)
    choice = choose_method(found, ChoiceConfig(), wanted="auto", available=("dpo", "ppo", "kto"))
    assert (choice.method, choice.rule) == (None, "0: not enough data")
