"""A shadow is asked after the person has the answer, when there is room, and nothing that it does reaches anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.preferences import load_preferences, take_snapshot
from assistant.engine.errors import EngineBusy, EngineError, EngineStarting, EngineUnavailable
from assistant.engine.protocol import Piece, Queue, Sampling
from assistant.routing import is_drawn
from chat_fixtures import Desk, make_desk, put_beside
from storage import audit, conversations, deployments, feedback, outcomes, runs, tallies
from storage.errors import NotFound
from storage.records import AuditEvent, Deployment, ShadowAnswer, Turn, now
from storage.shadows import record_shadow_answer
from storage_fixtures import deploy, make_run, start_conversation

SECRET = "zebra crossing"
"""What only the shadow says."""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path / "data")


def shade(desk: Desk, *, share: float = 1.0) -> Deployment:
    return put_beside(desk, "shadow", share=share)


async def ask(desk: Desk, text: str = "Where is my parcel?", **options: Any) -> Turn:
    """Return the person's answer, when the shadow has ended too."""
    conversation = conversations.get_conversation(desk.world.store, desk.conversation.id)
    turn = await desk.chat.complete(desk.chat.ask(desk.world.staff, conversation, text, **options))
    await ended(desk)
    return turn


async def ended(desk: Desk) -> None:
    if desk.chat.shadow.asking is not None:
        await asyncio.wait([desk.chat.shadow.asking])


def answers(desk: Desk) -> list[ShadowAnswer]:
    return desk.world.store.all(ShadowAnswer, order="seq")


def asked_of(desk: Desk, policy_id: str) -> list[dict[str, Any]]:
    return [call for call in desk.engine.calls if call["policy_id"] == policy_id]


def instead(desk: Desk, policy_id: str, what: str | Exception | None) -> None:
    """Let the policy's answer come from the policy `what`, fail, or (None) never begin."""
    stream = desk.engine.stream

    async def other(**asked: Any) -> AsyncIterator[Piece]:
        if asked["policy_id"] != policy_id:
            async for piece in stream(**asked):
                yield piece
        elif isinstance(what, Exception):
            raise what
        elif what is None:
            try:
                await asyncio.Event().wait()
            finally:
                desk.engine.aborted.append(asked["request_id"])
        else:
            yield Piece(text="Hi", token_ids=(1,), served_by=what)

    desk.engine.stream = other  # type: ignore[assignment,method-assign]


# -- what is asked ----------------------------------------------------------------------------------------


def test_the_shadow_is_asked_the_same_with_the_same_sampling_and_its_token_ids_are_kept(desk: Desk) -> None:
    shadow = shade(desk)
    asyncio.run(ask(desk, "First question"))
    sampling = Sampling(temperature=0.2, max_tokens=9, seed=7)
    turn = asyncio.run(ask(desk, "Second question", sampling=sampling))
    mine = asked_of(desk, shadow.policy_id)[-1]
    assert (mine["messages"], mine["sampling"]) == (turn.messages, sampling)
    assert len(turn.messages) == 3
    answer = answers(desk)[-1]
    assert (answer.turn_id, answer.deployment_id, answer.finish_reason) == (turn.id, shadow.id, "stop")
    assert answer.prompt_token_ids == turn.prompt_token_ids
    assert shadow.policy_id in answer.answer  # the fake engine words each policy's answer differently
    assert answer.answer_token_ids != turn.answer_token_ids
    assert answer.answer_token_ids[-1] == 0  # the end token is kept
    assert audit.verify(desk.world.store).ok


def test_a_person_has_the_whole_answer_before_the_shadow_is_asked(desk: Desk) -> None:
    shadow = shade(desk)

    async def listen() -> None:
        question = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")
        events = [event async for event in desk.chat.reply(question) if not asked_of(desk, shadow.policy_id)]
        assert isinstance(events[-1], Turn)
        await ended(desk)
        assert len(asked_of(desk, shadow.policy_id)) == 1

    asyncio.run(listen())


def test_only_the_drawn_share_of_the_conversations_is_asked(desk: Desk) -> None:
    shadow = shade(desk, share=0.3)

    async def talk() -> set[str]:
        drawn = set()
        for _ in range(20):
            conversation = start_conversation(desk.world)
            await desk.chat.complete(desk.chat.ask(desk.world.staff, conversation, "Hello?"))
            await ended(desk)
            drawn |= {conversation.id} if is_drawn(conversation.id, shadow) else set()
        return drawn

    drawn = asyncio.run(talk())
    turns = {turn.id: turn.conversation_id for turn in desk.world.store.all(Turn)}
    assert {turns[answer.turn_id] for answer in answers(desk)} == drawn
    assert 0 < len(drawn) < 20


def test_what_a_canary_answered_is_not_asked_again(desk: Desk) -> None:
    shadow = shade(desk)
    canary = put_beside(desk, "canary")
    assert asyncio.run(ask(desk)).policy_id == canary.policy_id
    assert asked_of(desk, shadow.policy_id) == []


# -- room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("running", "waiting", "asked"), [(0, 0, 1), (None, None, 1), (1, 0, 0), (0, 1, 0)])
def test_the_shadow_is_asked_only_while_the_engine_has_room(
    desk: Desk, running: int | None, waiting: int | None, asked: int
) -> None:
    shadow = shade(desk)
    desk.engine.queues_now = [Queue(replica="one", up=True, running=running, waiting=waiting)]
    asyncio.run(ask(desk))
    assert len(asked_of(desk, shadow.policy_id)) == len(answers(desk)) == asked


def test_the_shadow_is_not_asked_while_another_person_waits(desk: Desk) -> None:
    shadow = shade(desk)
    with desk.chat.admission.admit(desk.world.other.id):
        asyncio.run(ask(desk))
        assert asked_of(desk, shadow.policy_id) == []
        desk.chat.admission.limits = replace(desk.chat.admission.limits, shadow_below=2)
        asyncio.run(ask(desk))
    assert len(asked_of(desk, shadow.policy_id)) == 1


def test_the_shadow_gives_way_to_a_person(desk: Desk) -> None:
    shadow = shade(desk)
    instead(desk, shadow.policy_id, None)

    async def interrupt() -> Turn:
        await desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "One?"))
        first = desk.chat.shadow.asking
        await asyncio.sleep(0.02)
        assert first is not None
        assert desk.chat.admission.under_way == 0  # the shadow takes no place of anybody
        assert desk.release.in_flight[shadow.policy_id] == 1  # and is not unloaded meanwhile
        turn = await desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "Two?"))
        assert first.cancelled()
        assert len(desk.engine.aborted) == 1  # upstream too
        await desk.chat.shadow.stop()
        return turn

    assert asyncio.run(interrupt()).finish_reason == "stop"
    assert answers(desk) == []


@pytest.mark.parametrize("error", [EngineBusy("full"), EngineStarting("being started")])
def test_a_full_or_absent_engine_is_nobodys_fault(desk: Desk, error: EngineError) -> None:
    instead(desk, shade(desk).policy_id, error)
    asyncio.run(ask(desk))
    assert answers(desk) == []


# -- failing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [None, EngineUnavailable("gone"), "policy-other", RuntimeError("a bug")])
def test_a_shadow_that_hangs_or_fails_changes_nothing_for_the_person(
    desk: Desk, what: str | Exception | None
) -> None:
    shadow = shade(desk)
    instead(desk, shadow.policy_id, what)
    desk.chat.shadow.timeout_s = 0.05
    turns = [asyncio.run(ask(desk)) for _ in range(2)]
    assert {turn.policy_id for turn in turns} == {desk.world.base.id}
    kinds = {"policy-other": "wrong_policy", None: "error"}
    expected = [] if isinstance(what, RuntimeError) else [kinds.get(what, "error")] * 2  # type: ignore[arg-type]
    assert [answer.finish_reason for answer in answers(desk)] == expected
    assert desk.world.store.rows("SELECT * FROM failures") == []  # the feed of a canary's judgement


# -- nobody takes it for a person's turn ------------------------------------------------------------------


def test_a_shadow_is_in_no_history_search_feedback_snapshot_canary_evidence_or_count(desk: Desk) -> None:
    shadow, store = shade(desk), desk.world.store
    desk.engine.enqueue(["It is on its way.", SECRET])
    turn = asyncio.run(ask(desk))
    (answer,) = answers(desk)
    assert answer.answer == SECRET

    feedback.rate(store, turn_id=turn.id, person_id=desk.world.staff.id, verdict="up")
    with pytest.raises(NotFound):
        feedback.rate(store, turn_id=answer.id, person_id=desk.world.staff.id, verdict="up")
    assert conversations.search(store, person_id=desk.world.staff.id, query="zebra") == []
    assert store.rows("SELECT * FROM turns_fts WHERE turns_fts MATCH 'zebra'") == []
    assert conversations.thread(store, turn.conversation_id) == [turn]
    conversation = conversations.get_conversation(store, turn.conversation_id)
    history = desk.chat.ask(desk.world.staff, conversation, "And now?").messages
    assert SECRET not in str(history)
    assert [liking.policy_id for liking in tallies.likings(store)] == [desk.world.base.id]

    run = make_run()
    runs.open_run(store, run)
    snapshot = take_snapshot(store, run_id=run.id)
    loaded = load_preferences(store, snapshot, tokenize=lambda text, served: [1], max_tokens=1000)
    assert [thumb.answer_ids for thumb in loaded.thumbs] == [tuple(turn.answer_token_ids)]
    assert loaded.pairs == ()

    deploy(desk.world, desk.world.store.get(type(desk.world.base), shadow.policy_id), "canary", share=0.5)
    found = outcomes.outcomes(
        store,
        canary_id=shadow.policy_id,
        stable_id=desk.world.base.id,
        began_at=0.0,
        after=0.0,
        until=now() + 1e6,
    )
    assert {outcome.policy_id for outcome in found} == {desk.world.base.id}


def test_a_deleted_conversation_takes_its_shadow_answers_along(desk: Desk) -> None:
    shadow, store = shade(desk), desk.world.store
    turn = asyncio.run(ask(desk))
    (answer,) = answers(desk)
    conversations.delete_conversation(store, turn.conversation_id, actor=desk.world.staff.id)
    assert answers(desk) == []
    assert conversations.get_turn(store, turn.id) == turn
    (event,) = store.all(AuditEvent, "action = 'conversation.deleted'")
    assert event.detail["shadow_answers"] == 1
    record_shadow_answer(store, replace(answer, id="shadow_late", deployment_id=shadow.id))
    assert answers(desk) == []  # one that was under way meanwhile is not kept
    assert audit.verify(store).ok


def test_a_shadow_is_still_there_after_a_restart(desk: Desk) -> None:
    shadow = shade(desk)
    again = make_desk(desk.world.store.data, world=desk.world)
    assert deployments.served(again.world.store).shadow == shadow  # type: ignore[union-attr]
    assert again.release.shadow_of("conversation_1") is None  # not before it is loaded
    again.engine.adapters.update(desk.engine.adapters)
    asyncio.run(again.release.sync())
    asyncio.run(ask(again))
    assert [answer.deployment_id for answer in answers(again)] == [shadow.id]
