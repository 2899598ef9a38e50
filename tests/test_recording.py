"""Answers that end early are recorded beside the event loop, whoever leaves and whatever fails, also at the end."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

from assistant.chat import Delta
from assistant.engine.errors import EngineUnavailable, StreamBroken
from assistant.web.pages.compare_page import ComparePage
from assistant.web.pages.frame import Frame
from assistant.web.words import Words
from chat_fixtures import Desk, make_desk
from storage import conversations
from storage.errors import Busy
from storage.failures import failures_since
from storage.records import Turn
from storage.store import Store
from web_fixtures import make_site


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path)


@contextmanager
def another_process_writes(store: Store) -> Iterator[sqlite3.Connection]:
    """Hold the write lock as another process would, until the connection is rolled back."""
    with closing(sqlite3.connect(store.data / "kotae.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


async def first_word(desk: Desk) -> tuple[asyncio.Task[None], asyncio.Event]:
    """Ask, and return who listens, and the event that ends the listening, once the first word is there."""
    heard, leave = asyncio.Event(), asyncio.Event()

    async def listen() -> None:
        events = desk.chat.reply(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        try:
            async for event in events:
                assert isinstance(event, Delta)
                heard.set()
                await leave.wait()
                return
        finally:
            await events.aclose()

    listening = asyncio.create_task(listen())
    await heard.wait()
    return listening, leave


def recorded(desk: Desk) -> list[tuple[str, str]]:
    return [(turn.answer, turn.finish_reason) for turn in desk.world.store.all(Turn)]


def test_everybody_elses_answers_go_on_while_a_stopped_one_waits_to_be_recorded(desk: Desk) -> None:
    async def stop_one() -> None:
        listening, leave = await first_word(desk)
        with another_process_writes(desk.world.store) as other:
            leave.set()
            await asyncio.sleep(
                0.2
            )  # the loop is free, or it would wait for the lock that only it gives back
            assert not listening.done()
            other.execute("ROLLBACK")
            await listening

    desk.engine.enqueue(["one two three"])
    asyncio.run(stop_one())
    assert recorded(desk) == [("one", "cancelled")]


def test_a_failure_is_booked_beside_the_event_loop(desk: Desk) -> None:
    async def fail() -> None:
        with another_process_writes(desk.world.store) as other:
            ask = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")
            asking = asyncio.create_task(desk.chat.complete(ask))
            await asyncio.sleep(0.2)
            other.execute("ROLLBACK")
            with pytest.raises(EngineUnavailable, match="500"):
                await asking

    desk.engine.enqueue([EngineUnavailable("the engine answered 500")])
    asyncio.run(fail())
    assert len(failures_since(desk.world.store, (desk.world.base.id, ""), since=0)) == 1


def test_who_is_cancelled_twice_has_ended_only_when_what_was_said_is_recorded(desk: Desk) -> None:
    """The page stops its answer, closes it, and then shows the turn."""

    async def cancel() -> None:
        listening, _ = await first_word(desk)
        with another_process_writes(desk.world.store) as other:
            for _ in range(2):  # the second meets the recording
                listening.cancel()
                await asyncio.sleep(0.05)
            assert not listening.done()
            other.execute("ROLLBACK")
        (ended,) = await asyncio.gather(listening, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError)
        assert recorded(desk) == [("one", "cancelled")]
        await desk.chat.stop()

    desk.engine.enqueue(["one two three"])
    asyncio.run(cancel())


def test_what_went_wrong_with_the_answer_is_told_and_not_that_it_could_not_be_recorded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise Busy("another change took longer than 10 s")

    monkeypatch.setattr(conversations, "record_turn", busy)
    desk.engine.enqueue([("one", StreamBroken("the engine went away"))])
    ask = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")
    with caplog.at_level(logging.ERROR), pytest.raises(StreamBroken, match="went away"):
        asyncio.run(desk.chat.complete(ask))
    assert ask.turn_id in caplog.text
    assert "another change took longer" in caplog.text


def test_an_answer_that_is_cut_after_the_chat_was_stopped_is_recorded_too(desk: Desk) -> None:
    """The server's end cancels what is left when the threads are gone, but before the data is closed."""

    async def end() -> None:
        listening, _ = await first_word(desk)
        await desk.chat.stop()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

    desk.engine.enqueue(["one two three"])
    asyncio.run(end())
    assert recorded(desk) == [("one", "cancelled")]


def test_the_comparison_begins_its_conversation_beside_the_event_loop(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    request = SimpleNamespace(username=site.people["staff"].id)

    async def compare() -> None:
        with gr.Blocks():
            page = ComparePage(Frame(site.services, Words("en"), "staff", "staff"))
            page.build()
        shown = page.answer("Where is my parcel?", request)  # type: ignore[arg-type]
        await anext(shown)
        with another_process_writes(site.store) as other:
            answering = asyncio.ensure_future(anext(shown))
            await asyncio.sleep(0.2)
            other.execute("ROLLBACK")
            await answering
        await shown.aclose()

    asyncio.run(compare())
    assert len(site.store.all(Turn)) == 2
