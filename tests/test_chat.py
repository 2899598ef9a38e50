"""The use cases of a conversation, over the fake engine and a real database."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from assistant.chat import MAX_MESSAGE_CHARS, Delta, check_messages
from assistant.engine.errors import ContextTooLong, EngineUnavailable, StreamBroken
from chat_fixtures import Desk, make_desk
from storage import conversations, feedback
from storage.errors import Conflict, InvalidField, NotFound
from storage.records import Turn


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


def ask_and_answer(desk: Desk, question: str) -> Turn:
    conversation = conversations.get_conversation(desk.world.store, desk.conversation.id)
    return asyncio.run(desk.chat.complete(desk.chat.ask(desk.world.staff, conversation, question)))


def recorded(desk: Desk) -> list[Turn]:
    return conversations.thread(desk.world.store, desk.conversation.id)


def test_an_answer_is_recorded_with_the_policy_the_sampling_and_the_served_tokens(desk: Desk) -> None:
    desk.engine.enqueue(["It is on its way."])
    turn = ask_and_answer(desk, "Where is my parcel?")
    assert recorded(desk) == [turn]
    assert (turn.answer, turn.finish_reason) == ("It is on its way.", "stop")
    assert (turn.policy_id, turn.deployment_id) == (desk.world.base.id, desk.world.deployment.id)
    assert turn.sampling == desk.engine.calls[0]["sampling"].as_json()
    assert len(turn.answer_token_ids) == 6  # five words and the end token
    assert turn.prompt_token_ids
    assert turn.first_token_s is not None
    assert 0 <= turn.first_token_s <= turn.total_s


def test_the_next_question_carries_the_conversation_so_far(desk: Desk) -> None:
    desk.engine.enqueue(["First answer.", "Second answer."])
    ask_and_answer(desk, "One?")
    ask_and_answer(desk, "Two?")
    assert desk.engine.calls[1]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two?"},
    ]


@pytest.mark.parametrize("nothing", ["", "\n\n"])
def test_an_empty_answer_does_not_end_its_conversation(desk: Desk, nothing: str) -> None:
    """Its question goes with it, so that roles alternate, as most chat templates demand."""
    desk.engine.enqueue(["First answer.", nothing, "Third answer."])
    for question in ("One?", "Two?", "Three?"):
        ask_and_answer(desk, question)
    assert [turn.answer for turn in recorded(desk)] == ["First answer.", nothing, "Third answer."]
    assert desk.engine.calls[2]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Three?"},
    ]


def test_deltas_carry_the_whole_text_so_far(desk: Desk) -> None:
    async def collect() -> list[str]:
        ask = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")
        return [event.text async for event in desk.chat.reply(ask) if isinstance(event, Delta)]

    desk.engine.enqueue(["one two three"])
    assert asyncio.run(collect()) == ["one", "one two", "one two three"]


def test_stopping_records_what_was_said_and_aborts_upstream(desk: Desk) -> None:
    async def stop_after_two() -> None:
        events = desk.chat.reply(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        await anext(events)
        await anext(events)
        await events.aclose()

    desk.engine.enqueue(["one two three four"])
    asyncio.run(stop_after_two())
    (turn,) = recorded(desk)
    assert (turn.answer, turn.finish_reason) == ("one two", "cancelled")
    assert desk.engine.aborted == [turn.id]
    assert desk.release.in_flight.total() == 0


def test_a_stream_that_breaks_is_recorded_as_an_error_and_raised(desk: Desk) -> None:
    desk.engine.enqueue([("one", StreamBroken("the engine went away"))])
    with pytest.raises(StreamBroken, match="went away"):
        ask_and_answer(desk, "Hello?")
    (turn,) = recorded(desk)
    assert (turn.answer, turn.finish_reason) == ("one", "error")


def test_an_engine_that_is_down_leaves_no_turn(desk: Desk) -> None:
    desk.engine.enqueue([EngineUnavailable("the engine is starting")])
    with pytest.raises(EngineUnavailable):
        ask_and_answer(desk, "Hello?")
    assert recorded(desk) == []


def test_a_dialogue_that_outgrew_the_context_loses_its_oldest_turns(desk: Desk) -> None:
    for word in ("first", "second", "third"):
        desk.engine.enqueue([f"{word} answer"])
        ask_and_answer(desk, f"{word} question")
    # "user third question" and the like are 3 words each; 2 x 3 + 3 + the 256 of the answer fit, 15 do not.
    desk.engine.context_tokens = 256 + 12
    desk.engine.enqueue(["fourth answer"])
    turn = ask_and_answer(desk, "fourth question")
    sent = desk.engine.calls[-1]["messages"]
    assert [message["content"] for message in sent] == ["third question", "third answer", "fourth question"]
    assert turn.answer == "fourth answer"


def test_a_single_question_that_does_not_fit_is_refused(desk: Desk) -> None:
    desk.engine.context_tokens = 258
    with pytest.raises(ContextTooLong):
        ask_and_answer(desk, "far too many words for such a small context")


def test_asking_again_makes_an_alternative_and_shows_it(desk: Desk) -> None:
    first = ask_and_answer(desk, "Hello?")
    again = asyncio.run(desk.chat.complete(desk.chat.ask_again(desk.world.staff, first.id)))
    assert again.parent_turn_id == first.parent_turn_id
    assert [turn.id for turn in recorded(desk)] == [again.id]
    assert {turn.id for turn in conversations.alternatives(desk.world.store, again.id)} == {
        first.id,
        again.id,
    }


def test_an_edited_question_takes_the_place_of_the_first(desk: Desk) -> None:
    first = ask_and_answer(desk, "Helo?")
    ask = desk.chat.ask_again(desk.world.staff, first.id, question="Hello?")
    asyncio.run(desk.chat.complete(ask))
    assert [turn.messages[-1]["content"] for turn in recorded(desk)] == ["Hello?"]


def test_nobody_continues_another_persons_conversation(desk: Desk) -> None:
    turn = ask_and_answer(desk, "Hello?")
    with pytest.raises(NotFound, match="conversation"):
        desk.chat.ask_again(desk.world.other, turn.id)


def test_a_pair_is_two_answers_of_one_policy_with_seeds_of_their_own(desk: Desk) -> None:
    ask = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")
    pair = asyncio.run(desk.chat.reply_pair(ask))
    assert pair.left.policy_id == pair.right.policy_id
    assert pair.left.messages == pair.right.messages
    assert pair.left.sampling["seed"] != pair.right.sampling["seed"]
    assert pair.left.source == pair.right.source == "compare"


def test_both_orders_of_a_pair_happen(desk: Desk) -> None:
    async def first_is_left() -> bool:
        before = len(desk.engine.calls)
        pair = await desk.chat.reply_pair(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        return bool(pair.left.id == desk.engine.calls[before]["request_id"])

    async def several() -> list[bool]:
        return [await first_is_left() for _ in range(24)]

    # 24 fair draws are all alike once in 2^23 runs.
    assert set(asyncio.run(several())) == {True, False}


def test_a_vote_continues_with_the_better_answer(desk: Desk) -> None:
    pair = asyncio.run(desk.chat.reply_pair(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")))
    ids = {"left_turn_id": pair.left.id, "right_turn_id": pair.right.id}
    desk.chat.compare(desk.world.staff, **ids, choice="right", strength=2)
    assert recorded(desk)[-1].id == pair.right.id
    (comparison,) = feedback.comparisons(desk.world.store)
    assert (comparison.choice, comparison.strength, comparison.propensity) == ("right", 2, 0.5)


def test_a_double_click_counts_once_and_a_second_opinion_is_refused(desk: Desk) -> None:
    pair = asyncio.run(desk.chat.reply_pair(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")))
    ids = {"left_turn_id": pair.left.id, "right_turn_id": pair.right.id}
    first = desk.chat.compare(desk.world.staff, **ids, choice="left")
    assert desk.chat.compare(desk.world.staff, **ids, choice="left") == first
    with pytest.raises(Conflict):
        desk.chat.compare(desk.world.staff, **ids, choice="right")
    assert len(feedback.comparisons(desk.world.store)) == 1


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ([{"role": "user", "content": "  "}], r"messages\[0\].content"),
        ([{"role": "user", "content": "x" * (MAX_MESSAGE_CHARS + 1)}], "32,769 characters"),
        ([{"role": "robot", "content": "hi"}], r"messages\[0\].role"),
        ([{"role": "user", "content": None}], r"messages\[0\].content"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content"),
        ([{"role": "assistant", "content": "hi"}], r"messages\[-1\].role"),
        ([{"role": "user", "content": "hi"}] * 513, "513 messages"),
    ],
)
def test_messages_that_cannot_be_answered_are_named(messages: list[Any], named: str) -> None:
    with pytest.raises(InvalidField, match=named):
        check_messages(messages)


def test_an_empty_answer_in_a_history_can_be_answered() -> None:
    history = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": ""}]
    asked = [*history, {"role": "user", "content": "Two?"}]
    assert check_messages(asked) == asked


def test_who_leaves_while_the_whole_answer_is_being_recorded_does_not_lose_it(desk: Desk) -> None:
    async def leave_then() -> None:
        free = threading.Event()
        threads = desk.chat.recording
        threads.submit(free.wait, 10)
        asking = asyncio.create_task(
            desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        )
        async with asyncio.timeout(10):
            while threads._work_queue.empty():  # until the recording waits for the thread
                await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        free.set()
        await desk.chat.stop()

    asyncio.run(leave_then())
    (turn,) = desk.world.store.all(Turn)
    assert turn.finish_reason == "stop"
