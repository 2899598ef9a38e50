"""A label is kept once, never changed, and counts exactly as the person last meant it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from storage import audit, feedback, people
from storage.errors import Conflict, InvalidField, KotaeError, NotAllowed, NotFound
from storage.records import Comparison, Correction, Rating, Turn
from storage_fixtures import World, ask, make_world, record, start_conversation


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


@pytest.fixture
def turn(world: World) -> Turn:
    return record(world, start_conversation(world))


@pytest.fixture
def pair(world: World) -> tuple[Turn, Turn]:
    conversation = start_conversation(world)
    return record(world, conversation, answer="left"), record(world, conversation, answer="right")


def rate(world: World, turn: Turn, verdict: Any, **more: Any) -> Rating:
    return feedback.rate(world.store, turn_id=turn.id, person_id=world.staff.id, verdict=verdict, **more)


def compare(world: World, left: Turn, right: Turn, choice: Any, **more: Any) -> Comparison:
    return feedback.compare(
        world.store,
        left_turn_id=left.id,
        right_turn_id=right.id,
        person_id=more.pop("person_id", world.staff.id),
        choice=choice,
        **more,
    )


def correct(world: World, turn: Turn, edited: str) -> Correction:
    return feedback.correct(world.store, turn_id=turn.id, person_id=world.staff.id, edited=edited)


def test_the_last_thumb_counts(world: World, turn: Turn) -> None:
    rate(world, turn, "up")
    down = rate(world, turn, "down", reasons=["wrong"], comment="no")
    assert feedback.ratings(world.store) == [down]
    assert feedback.current_rating(world.store, turn_id=turn.id, person_id=world.staff.id) == down


def test_retracted_thumb_is_not_a_downvote(world: World, turn: Turn) -> None:
    rate(world, turn, "up")
    rate(world, turn, "retracted")
    assert feedback.ratings(world.store) == []
    assert feedback.current_rating(world.store, turn_id=turn.id, person_id=world.staff.id) is None
    assert feedback.count_labels(world.store) == 0


def test_a_thumb_given_again_after_it_was_taken_back_counts(world: World, turn: Turn) -> None:
    for verdict in ("up", "retracted", "up"):
        rate(world, turn, verdict)
    assert [rating.verdict for rating in feedback.ratings(world.store)] == ["up"]
    assert len(world.store.all(Rating)) == 3


def test_the_same_thumb_again_is_not_kept_twice(world: World, turn: Turn) -> None:
    first = rate(world, turn, "down", reasons=["tone"])
    assert rate(world, turn, "down", reasons=["tone"]) == first
    assert rate(world, turn, "down", reasons=["tone", "late"]) != first
    assert len(world.store.all(Rating)) == 2


def test_a_double_click_from_two_threads_counts_once(world: World, turn: Turn) -> None:
    threads = [threading.Thread(target=rate, args=(world, turn, "up")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(world.store.all(Rating)) == 1


def test_ratings_of_a_moment_are_those_that_counted_then(world: World, turn: Turn) -> None:
    up = rate(world, turn, "up")
    down = rate(world, turn, "down")
    assert feedback.ratings(world.store, until=up.created_at) == [up]
    assert feedback.ratings(world.store, until=down.created_at) == [down]
    assert feedback.ratings(world.store, until=up.created_at - 1) == []


def test_labels_after_a_moment_are_counted_as_they_stand(world: World, pair: tuple[Turn, Turn]) -> None:
    left, right = pair
    first = rate(world, left, "up")
    rate(world, right, "down")
    rate(world, right, "up")
    compare(world, left, right, "left")
    correct(world, left, "one")
    correct(world, left, "two")
    assert feedback.count_labels(world.store) == 4  # left up, right up, the comparison, the second correction
    assert feedback.count_labels(world.store, since=first.created_at) == 3


def test_a_comparison_keeps_sides_strength_and_propensity(world: World, pair: tuple[Turn, Turn]) -> None:
    kept = compare(world, *pair, "right", strength=3, propensity=0.25, reasons=["tone"])
    assert feedback.comparisons(world.store) == [kept]
    assert (kept.left_turn_id, kept.right_turn_id) == (pair[0].id, pair[1].id)
    assert (kept.strength, kept.propensity) == (3, 0.25)


def test_the_same_choice_again_is_the_first_one_whichever_side_it_is_on(
    world: World, pair: tuple[Turn, Turn]
) -> None:
    left, right = pair
    first = compare(world, left, right, "left", strength=2)
    assert compare(world, left, right, "left", strength=1) == first
    assert compare(world, right, left, "right") == first
    assert len(world.store.all(Comparison)) == 1


@pytest.mark.parametrize("choice", ["right", "tie", "both_bad"])
def test_another_choice_of_the_same_person_is_a_conflict(
    world: World, pair: tuple[Turn, Turn], choice: str
) -> None:
    compare(world, *pair, "left")
    with pytest.raises(Conflict, match=r"^choice: left"):
        compare(world, *pair, choice)
    with pytest.raises(Conflict):
        compare(world, pair[1], pair[0], "left")


def test_another_person_chooses_on_their_own(world: World, pair: tuple[Turn, Turn]) -> None:
    compare(world, *pair, "left")
    compare(world, *pair, "right", person_id=world.admin.id)
    assert len(feedback.comparisons(world.store)) == 2


def test_the_two_sides_must_answer_the_same_question(world: World, pair: tuple[Turn, Turn]) -> None:
    left, _ = pair
    elsewhere = record(world, start_conversation(world))
    conversation = start_conversation(world)
    edited = [record(world, conversation, messages=ask(text)) for text in ("one", "two")]
    child = record(world, conversation, parent_turn_id=edited[0].id, messages=ask("one"))
    for one, two in ((left, left), (left, elsewhere), tuple(edited), (edited[0], child)):
        with pytest.raises(InvalidField, match=r"^right_turn_id"):
            compare(world, one, two, "left")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("choice", "up"),
        ("strength", 0),
        ("strength", 4),
        ("propensity", 0.0),
        ("propensity", 1.5),
        ("reasons", "tone"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_by_name(
    world: World, pair: tuple[Turn, Turn], field: str, value: object
) -> None:
    with pytest.raises(InvalidField, match=rf"^{field}"):
        compare(world, *pair, **{"choice": "left", field: value})


def test_a_tie_has_no_strength(world: World, pair: tuple[Turn, Turn]) -> None:
    with pytest.raises(InvalidField, match=r"^strength"):
        compare(world, *pair, "tie", strength=2)


def test_a_correction_keeps_what_it_corrects_and_the_last_one_counts(world: World, turn: Turn) -> None:
    correct(world, turn, "first try")
    last = correct(world, turn, "second try")
    assert correct(world, turn, "second try") == last
    assert last.original == turn.answer
    assert feedback.corrections(world.store) == [last]
    assert len(world.store.all(Correction)) == 2


def test_a_correction_must_change_the_answer(world: World, turn: Turn) -> None:
    for edited in (turn.answer, "", "  \n"):
        with pytest.raises(InvalidField, match=r"^text"):
            correct(world, turn, edited)


def test_only_the_owner_or_a_reviewer_may_judge(world: World, pair: tuple[Turn, Turn]) -> None:
    left, right = pair
    store, other = world.store, world.other.id
    with pytest.raises(NotAllowed):
        feedback.rate(store, turn_id=left.id, person_id=other, verdict="up")
    with pytest.raises(NotAllowed):
        compare(world, left, right, "left", person_id=other)
    with pytest.raises(NotAllowed):
        feedback.correct(store, turn_id=left.id, person_id=other, edited="x")
    people.set_role(store, other, role="reviewer", actor="system")
    assert feedback.rate(store, turn_id=left.id, person_id=other, verdict="up").person_id == other


def test_somebody_disabled_may_not_judge_even_their_own(world: World, turn: Turn) -> None:
    people.disable(world.store, world.staff.id, actor="system")
    with pytest.raises(NotAllowed):
        rate(world, turn, "up")


@pytest.mark.parametrize(("verdict", "reasons"), [("good", ()), ("up", "tone"), ("up", [1])])
def test_a_rating_that_cannot_be_is_refused(world: World, turn: Turn, verdict: str, reasons: Any) -> None:
    with pytest.raises(InvalidField):
        rate(world, turn, verdict, reasons=reasons)
    assert world.store.all(Rating) == []


def test_unknown_turns_and_people_are_named(world: World, turn: Turn) -> None:
    with pytest.raises(NotFound, match="turn_x"):
        feedback.rate(world.store, turn_id="turn_x", person_id=world.staff.id, verdict="up")
    with pytest.raises(KotaeError, match="person_x"):
        feedback.rate(world.store, turn_id=turn.id, person_id="person_x", verdict="up")


def test_comments_and_corrections_never_reach_the_audit_log(world: World, turn: Turn) -> None:
    rate(world, turn, "down", reasons=["secret reason"], comment="secret comment")
    correct(world, turn, "secret text")
    assert "secret" not in repr(audit.events(world.store))
