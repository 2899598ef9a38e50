"""How many answers may be under way, and what those are told who come when it is full."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assistant.admission import Admission, Limits, QueueFull, TooManyAtOnce
from assistant.chat import Delta
from assistant.web.errors import error_response
from chat_fixtures import Desk, make_desk
from storage import conversations
from storage.errors import InvalidField
from storage.records import Turn


def test_an_answer_that_ended_makes_room_whatever_its_end() -> None:
    admission = Admission(Limits(everybody=1, one_person=1))
    with pytest.raises(RuntimeError, match="broken"), admission.admit("aya"):
        raise RuntimeError("broken")
    with admission.admit("aya"):
        assert admission.under_way == 1
        with pytest.raises(QueueFull, match="1 answers are under way"), admission.admit("ben"):
            pass
    assert admission.under_way == 0


def test_one_person_does_not_take_it_all() -> None:
    admission = Admission(Limits(everybody=3, one_person=2))
    with admission.admit("aya"), admission.admit("aya"):
        with pytest.raises(TooManyAtOnce, match="2 of your answers"), admission.admit("aya"):
            pass
        with admission.admit("ben"):
            assert admission.under_way == 3


@pytest.mark.parametrize(
    ("name", "option"), [("everybody", "--max-answers: got 0"), ("one_person", "--max-answers-each: got 0")]
)
def test_a_limit_of_nobody_is_named_as_people_give_it(name: str, option: str) -> None:
    with pytest.raises(InvalidField, match=option):
        Limits(**{name: 0})


def test_both_are_told_when_to_come_back() -> None:
    for error, status in ((QueueFull("busy"), 503), (TooManyAtOnce("busy"), 429)):
        reply = error_response(error)
        assert (reply.status_code, reply.headers["retry-after"]) == (status, "2")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


def test_a_question_too_many_is_refused_before_the_engine_and_leaves_nothing(desk: Desk) -> None:
    desk.chat.admission = Admission(Limits(everybody=1))

    async def ask_twice() -> None:
        first = desk.chat.reply(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        assert isinstance(await anext(first), Delta)
        with pytest.raises(QueueFull):
            await anext(desk.chat.reply(desk.chat.ask(desk.world.staff, desk.conversation, "And I?")))
        await first.aclose()  # closed like a tab
        await desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "Now?"))

    asyncio.run(ask_twice())
    asked = [conversations.question_of(turn) for turn in desk.world.store.all(Turn)]
    assert asked == ["Hello?", "Now?"]
