"""Conversations are trees: one branch is shown, none is lost, and a person finds their own again."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import audit, conversations
from storage.errors import Conflict, InvalidField, NotAllowed, NotFound
from storage.records import new_id
from storage_fixtures import World, add_candidate, ask, make_turn, make_world, record, start_conversation


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def found(world: World, query: str) -> list[str]:
    hits = conversations.search(world.store, person_id=world.staff.id, query=query)
    return [hit.turn.answer for hit in hits]


def test_a_thread_goes_from_the_root_to_the_head(world: World) -> None:
    conversation = start_conversation(world)
    first = record(world, conversation)
    second = record(world, conversation, parent_turn_id=first.id)
    third = record(world, conversation, parent_turn_id=second.id)
    assert conversations.thread(world.store, conversation.id) == [first, second, third]


def test_a_new_conversation_has_an_empty_thread_and_an_unknown_one_is_an_error(world: World) -> None:
    assert conversations.thread(world.store, start_conversation(world).id) == []
    with pytest.raises(NotFound):
        conversations.thread(world.store, "conversation_x")


def test_a_conversation_is_kept_with_its_first_answer_or_not_at_all(world: World) -> None:
    begins = conversations.new_conversation(person_id=world.staff.id)
    with pytest.raises(InvalidField, match="deployment_id"):
        conversations.record_turn(world.store, make_turn(world, begins, policy_id="policy_x"), begins=begins)
    with pytest.raises(NotFound):
        conversations.get_conversation(world.store, begins.id)
    turn = make_turn(world, begins)
    conversations.record_turn(world.store, turn, begins=begins)
    assert conversations.thread(world.store, begins.id) == [turn]
    told = world.store.rows(
        "SELECT action FROM audit_events WHERE subject IN (?, ?) ORDER BY seq", [begins.id, turn.id]
    )
    assert [event["action"] for event in told] == ["conversation.created", "turn.recorded"]


def test_a_regenerated_answer_is_an_alternative_and_becomes_the_head(world: World) -> None:
    conversation = start_conversation(world)
    root = record(world, conversation)
    first = record(world, conversation, parent_turn_id=root.id)
    second = record(world, conversation, parent_turn_id=root.id)
    assert conversations.alternatives(world.store, first.id) == [first, second]
    assert conversations.children(world.store, root.id) == [first, second]
    assert conversations.children(world.store, first.id) == []
    assert conversations.thread(world.store, conversation.id) == [root, second]
    conversations.set_head(world.store, conversation.id, turn_id=first.id, actor=world.staff.id)
    assert conversations.thread(world.store, conversation.id) == [root, first]


def test_alternatives_of_a_first_question_stay_in_their_conversation(world: World) -> None:
    conversation = start_conversation(world)
    roots = [record(world, conversation), record(world, conversation)]
    record(world, start_conversation(world))
    assert conversations.alternatives(world.store, roots[0].id) == roots


def test_the_head_must_be_a_turn_of_the_conversation(world: World) -> None:
    conversation, turn = start_conversation(world), record(world, start_conversation(world))
    with pytest.raises(InvalidField, match=r"^turn_id"):
        conversations.set_head(world.store, conversation.id, turn_id=turn.id, actor=world.staff.id)


def test_a_parent_must_be_a_turn_of_the_conversation(world: World) -> None:
    elsewhere = record(world, start_conversation(world))
    for parent in (elsewhere.id, "turn_x"):
        with pytest.raises(InvalidField, match=r"^parent_turn_id"):
            record(world, start_conversation(world), parent_turn_id=parent)


def test_a_turn_cannot_be_attributed_to_a_policy_that_its_deployment_did_not_serve(world: World) -> None:
    candidate = add_candidate(world)
    with pytest.raises(InvalidField, match=r"^deployment_id"):
        record(world, start_conversation(world), policy_id=candidate.id)


def test_the_same_turn_is_recorded_once(world: World) -> None:
    conversation = start_conversation(world)
    turn = record(world, conversation)
    with pytest.raises(Conflict, match="twice"):
        record(world, conversation, id=turn.id, answer="another")
    assert conversations.get_turn(world.store, turn.id) == turn


def test_the_first_question_gives_the_title_once(world: World) -> None:
    conversation = start_conversation(world)
    record(world, conversation, messages=ask("  My\n\0parcel " + "is late " * 20))
    record(world, conversation, messages=ask("Another question"))
    title = conversations.get_conversation(world.store, conversation.id).title
    assert title.startswith("My parcel is late")
    assert title.endswith("…")
    assert len(title) <= 60


def test_a_given_title_stays(world: World) -> None:
    conversation = conversations.create_conversation(world.store, person_id=world.staff.id, title="Mine")
    record(world, conversation)
    renamed = conversations.rename_conversation(
        world.store, conversation.id, title="Yours", actor=world.staff.id
    )
    assert renamed.title == "Yours"


@pytest.mark.parametrize("title", ["", "  ", "x" * 201, "two\nlines"])
def test_a_title_that_cannot_be_shown_is_refused(world: World, title: str) -> None:
    with pytest.raises(InvalidField, match=r"^title"):
        conversations.rename_conversation(
            world.store, start_conversation(world).id, title=title, actor="system"
        )


def test_the_list_shows_the_newest_activity_first_in_pages(world: World) -> None:
    ids = [start_conversation(world).id for _ in range(5)]
    record(world, conversations.get_conversation(world.store, ids[1]))
    expected = [ids[1], ids[4], ids[3], ids[2], ids[0]]
    listed = conversations.list_conversations(world.store, world.staff.id, limit=2)
    while page := conversations.list_conversations(
        world.store, world.staff.id, limit=2, before=listed[-1].id
    ):
        listed += page
    assert [conversation.id for conversation in listed] == expected
    assert conversations.list_conversations(world.store, world.other.id) == []


def test_a_deleted_conversation_is_gone_from_list_search_and_use_but_its_turns_stay(world: World) -> None:
    conversation = start_conversation(world)
    turn = record(world, conversation)
    conversations.delete_conversation(world.store, conversation.id, actor=world.staff.id)
    assert conversations.list_conversations(world.store, world.staff.id) == []
    assert found(world, "parcel") == []
    assert conversations.get_turn(world.store, turn.id) == turn
    with pytest.raises(NotFound, match="deleted"):
        record(world, conversation)


def test_an_external_id_keeps_a_conversation_and_may_be_used_again_after_deletion(world: World) -> None:
    store, person_id = world.store, world.staff.id
    first = conversations.create_conversation(store, person_id=person_id, external_id="ticket 7")
    assert conversations.conversation_of_external(store, person_id=person_id, external_id="ticket 7") == first
    assert (
        conversations.conversation_of_external(store, person_id=world.other.id, external_id="ticket 7")
        is None
    )
    with pytest.raises(Conflict):
        conversations.create_conversation(store, person_id=person_id, external_id="ticket 7")
    conversations.delete_conversation(store, first.id, actor=person_id)
    second = conversations.create_conversation(store, person_id=person_id, external_id="ticket 7")
    assert (
        conversations.conversation_of_external(store, person_id=person_id, external_id="ticket 7") == second
    )


def test_somebody_elses_conversation_cannot_be_changed(world: World) -> None:
    conversation = start_conversation(world)
    turn = record(world, conversation)
    store, other = world.store, world.other.id
    with pytest.raises(NotAllowed):
        conversations.rename_conversation(store, conversation.id, title="x", actor=other)
    with pytest.raises(NotAllowed):
        conversations.delete_conversation(store, conversation.id, actor=other)
    with pytest.raises(NotAllowed):
        conversations.set_head(store, conversation.id, turn_id=turn.id, actor=other)
    with pytest.raises(NotAllowed):
        record(world, conversation, person_id=other)
    conversations.delete_conversation(store, conversation.id, actor=world.admin.id)


def test_search_finds_every_word_in_question_or_answer_whatever_its_capitals(world: World) -> None:
    conversation = start_conversation(world)
    record(world, conversation, messages=ask("Where is my PARCEL?"), answer="In Osaka")
    record(world, conversation, messages=ask("Where is my refund?"), answer="In Kyoto")
    assert found(world, "parcel osaka") == ["In Osaka"]
    assert found(world, "parcel kyoto") == []
    assert sorted(found(world, "where")) == ["In Kyoto", "In Osaka"]
    assert found(world, '"my refund"') == ["In Kyoto"]
    assert found(world, '"refund my"') == []


def test_search_finds_japanese_words_even_of_two_characters(world: World) -> None:
    conversation = start_conversation(world)
    record(world, conversation, messages=ask("商品を返品したいのですが"), answer="一")
    record(world, conversation, messages=ask("配送はいつですか"), answer="二")
    assert found(world, "返品") == ["一"]
    assert found(world, "返品したい") == ["一"]
    assert found(world, "配送 いつですか") == ["二"]


@pytest.mark.parametrize(
    "query",
    ['"', '""', "'", "*", "a*", "NEAR(", "a OR b", "abc AND", "NOT abc", "question:abc", "(abc", "-abc",
     "^abc", "%", "_", "%%%", "!", "a\0b", "\ud800", "{abc}", "abc; DROP TABLE turns", "a" * 5000, "   "],
)  # fmt: skip
def test_no_query_breaks_the_search(world: World, query: str) -> None:
    record(world, start_conversation(world), answer="nothing of that kind")
    assert found(world, query) == []


def test_search_takes_signs_literally(world: World) -> None:
    conversation = start_conversation(world)
    record(world, conversation, messages=ask("q"), answer="5% off")
    record(world, conversation, messages=ask("q"), answer="50 off")
    assert found(world, "5%") == ["5% off"]


def test_search_stays_with_the_persons_own_turns(world: World) -> None:
    record(world, start_conversation(world))
    assert conversations.search(world.store, person_id=world.other.id, query="parcel") == []


def test_a_hit_shows_the_text_around_the_word(world: World) -> None:
    record(world, start_conversation(world), answer="left " * 30 + "needle" + " right" * 30)
    [hit] = conversations.search(world.store, person_id=world.staff.id, query="NEEDLE")
    assert "needle" in hit.snippet
    assert hit.snippet.startswith("…")
    assert hit.snippet.endswith("…")
    assert len(hit.snippet) < 100


def test_chat_text_never_reaches_the_audit_log(world: World) -> None:
    conversation = conversations.create_conversation(
        world.store, person_id=world.staff.id, title="secret one"
    )
    record(world, conversation, messages=ask("secret two"), answer="secret three")
    conversations.rename_conversation(world.store, conversation.id, title="secret four", actor=world.staff.id)
    assert "secret" not in repr(audit.events(world.store))


def test_an_unknown_turn_is_named(world: World) -> None:
    missing = new_id("turn")
    with pytest.raises(NotFound, match=missing):
        conversations.get_turn(world.store, missing)
