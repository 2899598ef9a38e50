"""From stored labels to training data: what becomes what, what is dropped, weights, snapshots and splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.labels import Pair, Thumb, pairs_of_thumbs
from alignment.preferences import Preferences, load_preferences, split_by_prompt, take_snapshot, weighted
from alignment.rater_weights import cap_factors
from alignment.repeats import Repeats
from learning_fixtures import make_pairs, make_thumbs
from storage import conversations, deployments, feedback, people, policies, runs
from storage.errors import InvalidField
from storage.records import Person, Turn
from storage_fixtures import BASE_SHA256, World, make_run, make_turn, make_world, start_conversation

PROMPT, EOS = (1, 2, 3), 9


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def two_turns(world: World, *, ids=((4, 5, EOS), (6, EOS)), **changes) -> tuple[Turn, Turn]:
    """Record two answers to one question in a new conversation."""
    conversation = start_conversation(world)
    turns = tuple(make_turn(world, conversation, answer_token_ids=list(i), **changes) for i in ids)
    for turn in turns:
        conversations.record_turn(world.store, turn)
    return turns[0], turns[1]


def compared(world: World, choice: str, *, person: Person | None = None, strength=None, **changes) -> None:
    left, right = two_turns(world, **changes)
    feedback.compare(
        world.store,
        left_turn_id=left.id,
        right_turn_id=right.id,
        person_id=(person or world.staff).id,
        choice=choice,
        strength=strength,
    )


def ended_as_served(text: str, served: Sequence[int]) -> list[int]:
    return [*map(ord, text), served[-1]]


def loaded(world: World, **options) -> Preferences:
    run = make_run()
    runs.open_run(world.store, run)
    snapshot = take_snapshot(world.store, run_id=run.id)
    options = {"tokenize": ended_as_served, "max_tokens": 100, **options}
    runs.close_run(world.store, run.id, status="refused", message="a test", cost={})
    return load_preferences(world.store, snapshot, **options)


def test_the_chosen_side_comes_first_with_the_served_ids(world: World) -> None:
    compared(world, "left")
    compared(world, "right", strength=3, person=world.admin)
    left, right = loaded(world).pairs
    assert (left.prompt_ids, left.chosen_ids, left.rejected_ids) == (PROMPT, (4, 5, EOS), (6, EOS))
    assert (right.chosen_ids, right.rejected_ids) == ((6, EOS), (4, 5, EOS))
    assert (left.margin, right.margin) == (0.0, 1.0)
    assert left.source == "comparison"
    assert left.rater == world.staff.id
    assert not left.tie


def test_a_tie_stays_a_tie_and_both_bad_becomes_two_thumbs_down(world: World) -> None:
    compared(world, "tie")
    compared(world, "both_bad")
    found = loaded(world)
    assert [pair.tie for pair in found.pairs] == [True]
    assert [(thumb.answer_ids, thumb.up) for thumb in found.thumbs] == [
        ((4, 5, EOS), False),
        ((6, EOS), False),
    ]
    assert (found.notes["pairs"], found.notes["ties"], found.notes["thumbs"]) == (0, 1, 2)


def test_a_correction_is_a_pair_edited_over_served_and_ends_as_the_served_one(world: World) -> None:
    turn, _ = two_turns(world)
    feedback.correct(world.store, turn_id=turn.id, person_id=world.staff.id, edited="ab")
    (pair,) = loaded(world).pairs
    assert pair.chosen_ids == (97, 98, EOS)
    assert pair.rejected_ids == (4, 5, EOS)
    assert pair.source == "correction"


def test_thumbs_that_differ_on_two_answers_to_one_prompt_become_a_pair_too(world: World) -> None:
    good, bad = two_turns(world)
    feedback.rate(world.store, turn_id=good.id, person_id=world.staff.id, verdict="up")
    feedback.rate(world.store, turn_id=bad.id, person_id=world.staff.id, verdict="down")
    found = loaded(world)
    assert [(thumb.answer_ids, thumb.up) for thumb in found.thumbs] == [
        ((4, 5, EOS), True),
        ((6, EOS), False),
    ]
    (pair,) = found.pairs
    assert (pair.chosen_ids, pair.rejected_ids, pair.source) == ((4, 5, EOS), (6, EOS), "ratings")


def test_two_people_s_thumbs_make_a_pair_of_half_the_weight(world: World) -> None:
    good, bad = two_turns(world)
    feedback.rate(world.store, turn_id=good.id, person_id=world.staff.id, verdict="up")
    feedback.rate(world.store, turn_id=bad.id, person_id=world.admin.id, verdict="down")
    found = loaded(world)
    # weights 0.5, 1 and 1 are scaled to a mean of 1: 0.6, 1.2 and 1.2
    assert found.pairs[0].weight == pytest.approx(0.6)
    assert [thumb.weight for thumb in found.thumbs] == [pytest.approx(1.2)] * 2


def test_a_retracted_thumb_is_not_a_downvote(world: World) -> None:
    turn, _ = two_turns(world)
    for verdict in ("down", "retracted"):
        feedback.rate(world.store, turn_id=turn.id, person_id=world.staff.id, verdict=verdict)
    assert loaded(world).thumbs == ()


def test_what_cannot_be_used_is_dropped_and_counted_with_its_reason(world: World) -> None:
    compared(world, "left", ids=((4, EOS), (4, EOS)))
    compared(world, "left", ids=((4,) * 98, (5,)))
    compared(world, "left", finish_reason="cancelled")
    compared(world, "left", prompt_token_ids=[])
    found = loaded(world)
    assert found.pairs == ()
    assert found.notes["dropped"] == {
        "the two answers are the same": 1,
        "longer than 100 tokens (data.max_tokens, or the model's context)": 1,
        "the answer was cut off": 1,
        "no token ids were served": 1,
    }


def test_turns_of_another_base_are_dropped_when_the_base_is_named(world: World) -> None:
    compared(world, "left")
    other = policies.register_base(world.store, base_path="/models/other", base_sha256="0ther" + 59 * "0")
    deployment = deployments.deploy(
        world.store, policy_id=other.id, role="stable", share=1, actor="system", reason="another model"
    )
    compared(world, "right", person=world.admin, policy_id=other.id, deployment_id=deployment.id)
    assert len(loaded(world).pairs) == 2
    found = loaded(world, base_sha256=BASE_SHA256)
    assert len(found.pairs) == 1
    assert found.notes["dropped"] == {"served by another base model": 1}


def test_the_same_judgement_of_the_same_person_counts_once(world: World) -> None:
    compared(world, "left")
    compared(world, "left")
    compared(world, "left", person=world.admin)
    found = loaded(world)
    assert [pair.rater for pair in found.pairs] == [world.staff.id, world.admin.id]
    assert found.notes["dropped"] == {"said twice by the same person": 1}


def test_a_thumb_given_after_both_were_bad_is_the_later_word(world: World) -> None:
    left, right = two_turns(world)
    feedback.compare(
        world.store,
        left_turn_id=left.id,
        right_turn_id=right.id,
        person_id=world.staff.id,
        choice="both_bad",
        strength=None,
    )
    feedback.rate(world.store, turn_id=left.id, person_id=world.staff.id, verdict="up")
    found = loaded(world)
    assert {(thumb.answer_ids, thumb.up) for thumb in found.thumbs} == {
        ((4, 5, EOS), True),
        ((6, EOS), False),
    }


def test_a_person_who_changes_their_mind_has_one_vote(world: World) -> None:
    for choice in ("right", "left"):
        compared(world, choice)
    turn, _ = two_turns(world)
    again, _ = two_turns(world)
    for rated, verdict in ((turn, "up"), (again, "down")):
        feedback.rate(world.store, turn_id=rated.id, person_id=world.staff.id, verdict=verdict)
    found = loaded(world)
    assert [pair.chosen_ids for pair in found.pairs] == [(4, 5, EOS)]
    assert [thumb.up for thumb in found.thumbs] == [False]
    assert found.notes["dropped"] == {"said otherwise by the same person, more often or later": 2}
    assert found.notes["repeats"] == {world.staff.id: Repeats(unlike=2)}


def test_a_snapshot_is_stored_and_later_labels_do_not_enter_it(world: World) -> None:
    compared(world, "left")
    run = make_run()
    runs.open_run(world.store, run)
    snapshot = take_snapshot(world.store, run_id=run.id)
    compared(world, "right")
    assert runs.snapshot_of(world.store, run.id) == snapshot
    assert snapshot.counts == {"comparisons": 1, "ratings": 0, "corrections": 0}
    found = load_preferences(world.store, snapshot, tokenize=lambda text, served: [1], max_tokens=100)
    assert len(found.pairs) == 1


def test_a_snapshot_that_does_not_match_its_hash_is_refused(world: World) -> None:
    run = make_run()
    runs.open_run(world.store, run)
    snapshot = take_snapshot(world.store, run_id=run.id)
    forged = replace(snapshot, item_ids={**snapshot.item_ids, "comparisons": ["comparison_1"]})
    with pytest.raises(InvalidField, match="hash"):
        load_preferences(world.store, forged, tokenize=lambda text, served: [1], max_tokens=100)


def test_prompts_that_differ_in_case_and_order_number_only_have_one_key(world: World) -> None:
    questions = ("Where is order 4711?", "where is  order 4712", "Cancel order 4711")
    for number, question in enumerate(questions):
        messages = [{"role": "user", "content": question}]
        compared(world, "left", messages=messages, prompt_token_ids=[1, number])
    first, same, other = (pair.prompt_key for pair in loaded(world).pairs)
    assert first == same
    assert first != other


def test_a_split_shares_no_prompt_and_depends_on_prompts_and_seed_alone() -> None:
    pairs = [replace(pair, prompt_key=f"key-{i // 3}") for i, pair in enumerate(make_pairs(60))]
    whole = Preferences(pairs=tuple(pairs), thumbs=tuple(make_thumbs(10)), notes={"pairs": 60})
    train, held_out = split_by_prompt(whole, held_out=0.2, seed=1)
    keys = [{item.prompt_key for item in (*part.pairs, *part.thumbs)} for part in (train, held_out)]
    assert not keys[0] & keys[1]
    assert len(keys[1]) == 6  # a fifth of 20 + 10 prompts
    assert len(train.pairs) + len(held_out.pairs) == 60
    assert len(train.thumbs) + len(held_out.thumbs) == 10
    backwards = replace(whole, pairs=whole.pairs[::-1])
    assert {p.id for p in split_by_prompt(backwards, held_out=0.2, seed=1)[1].pairs} == {
        p.id for p in held_out.pairs
    }
    assert {p.id for p in split_by_prompt(whole, held_out=0.2, seed=2)[1].pairs} != {
        p.id for p in held_out.pairs
    }
    assert split_by_prompt(whole, held_out=0, seed=1)[0] == whole
    with pytest.raises(InvalidField, match="held_out"):
        split_by_prompt(whole, held_out=1.0, seed=1)


def test_no_rater_keeps_more_than_a_tenth_of_the_weight() -> None:
    totals = {f"rater-{number}": 20.0 for number in range(19)} | {"loud": 2000.0, "louder": 18000.0}
    factors = cap_factors(totals, labels=20380)
    capped = {rater: totals[rater] * factors[rater] for rater in totals}
    whole = sum(capped.values())
    # the two loud ones are left 10% each, 19 share 80%: 380 / 0.8 * 0.1 = 47.5
    assert capped["loud"] == pytest.approx(47.5)
    assert capped["louder"] / whole == pytest.approx(0.1)
    assert factors["rater-0"] == 1.0


def test_with_few_raters_the_cap_is_reported_and_not_enforced(world: World) -> None:
    assert cap_factors({"a": 9.0, "b": 1.0}, labels=10) == {"a": 1.0, "b": 1.0}
    compared(world, "left")
    notes = loaded(world).notes
    assert notes["raters"] == 1
    assert notes["pair_raters"].largest == 1.0
    assert notes["pair_raters"].cap_enforced is False
    assert notes["thumb_raters"] is None


def test_ten_raters_are_capped_to_equal_parts_in_the_training_data(world: World) -> None:
    for number in range(10):
        rater = people.add_person(world.store, name=f"rater {number}", role="reviewer", actor="system")
        for answer in range(4 if number == 0 else 2):
            compared(world, "left", person=rater, ids=((10 * number + answer + 20, EOS), (6, EOS)))
    found = loaded(world)
    assert found.notes["pair_raters"].cap_enforced
    assert found.notes["pair_raters"].largest == pytest.approx(0.1)
    assert sum(pair.weight for pair in found.pairs) == pytest.approx(len(found.pairs))


def thumbs_by(rater: str, count: int, *, up: bool, answer: int) -> list[Thumb]:
    """One answer to each of `count` questions."""
    return [
        Thumb(
            id=f"{rater}-{number}-{answer}",
            prompt_ids=(number + 10,),
            answer_ids=(answer, EOS),
            up=up,
            weight=1.0,
            prompt_key=f"q{number}",
            rater=rater,
        )
        for number in range(count)
    ]


def test_thumbs_of_who_is_left_out_make_no_pairs_either() -> None:
    honest = [thumb for rater in "abcd" for thumb in thumbs_by(rater, 60, up=True, answer=5)]
    honest += [thumb for rater in "abcd" for thumb in thumbs_by(rater, 60, up=False, answer=6)]
    wrong = thumbs_by("mal", 60, up=False, answer=5) + thumbs_by("mal", 60, up=True, answer=6)
    thumbs = tuple(honest + wrong)
    found = weighted(Preferences(pairs=tuple(pairs_of_thumbs(thumbs)), thumbs=thumbs))
    assert "mal" not in {thumb.rater for thumb in found.thumbs}
    assert {pair.chosen_ids[0] for pair in found.pairs} == {5}
    assert not any("mal" in pair.raters for pair in found.pairs)
    assert found.notes["pair_raters"].raters == 4


def test_pairs_and_thumbs_are_capped_apart() -> None:
    thumbs = tuple(
        thumb
        for number in range(12)
        for thumb in thumbs_by(f"rater-{number}", 200, up=True, answer=20 + number)
    )
    pairs = tuple(
        Pair(
            id=f"pair-{number}",
            prompt_ids=(number + 10,),
            chosen_ids=(5, EOS),
            rejected_ids=(6, EOS),
            weight=1.0,
            margin=0.0,
            source="comparison",
            prompt_key=f"q{number}",
            rater="alone",
        )
        for number in range(220)
    )
    notes = weighted(Preferences(pairs=pairs, thumbs=thumbs)).notes
    assert notes["pair_raters"].largest == 1.0
    assert notes["pair_raters"].raters == 1
    assert notes["thumb_raters"].largest == pytest.approx(1 / 12)
