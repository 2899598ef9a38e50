"""The chat page over Gradio's own protocol: the question is one event, its answer a second one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.engine.errors import EngineBusy, StreamBroken
from assistant.web.pages import chat_page, staff_app
from storage.records import Conversation, Turn
from web_fixtures import PASSWORD, Site, make_site, running, wait_until


class Tab:
    """A browser tab on the chat page."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.client.post("/login", data={"name": "staff", "password": PASSWORD})
        events = self.client.get("/config").json()["dependencies"]
        self.ids = {event["api_name"]: event["id"] for event in events}

    def send(self, path: str, event: str, *data: Any, clicked: Any = None) -> Any:
        body = {"data": data, "fn_index": self.ids[event], "session_hash": "tab", "event_data": clicked}
        return self.client.post(f"/gradio_api/{path}", json=body).raise_for_status().json()

    def ask(self, question: str) -> None:
        self.send("run/predict", "ask", None, question)

    def see_answer(self) -> str:
        """Return the events of the stream as they came."""
        self.send("queue/join", "stream", None)
        return self.client.get("/gradio_api/queue/data?session_hash=tab").text


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = make_site(tmp_path / "data", pages=(("/", "staff", staff_app),))
    site.give_password("staff")
    with running(site):
        yield site


@pytest.fixture
def tab(site: Site) -> Iterator[Tab]:
    with httpx.Client(base_url=site.url, timeout=30) as client:
        yield Tab(client)


def test_the_engine_begins_with_the_question_and_is_asked_once(site: Site, tab: Tab) -> None:
    site.engine.enqueue(["It left our warehouse yesterday."])
    tab.ask("Where is it?")
    wait_until(lambda: site.store.all(Turn))  # nobody has asked to see it yet
    events = tab.see_answer()
    assert "It left our warehouse yesterday." in events
    assert json.loads(events.strip().splitlines()[-3][6:])["success"]
    (turn,) = site.store.all(Turn)
    assert turn.id in events  # what can be done with it
    assert len(site.engine.calls) == 1


def test_a_conversation_is_kept_with_its_first_answer_and_listed_from_then_on(site: Site, tab: Tab) -> None:
    site.engine.enqueue([EngineBusy("engine: its queue is full; try again"), "Here it is."])
    tab.ask("Where is it?")
    assert "its queue is full" in tab.see_answer()
    assert site.store.all(Conversation) == []
    tab.ask("Where is my vase?")  # in the same tab, whose conversation is not there
    assert "Here it is." in tab.see_answer()
    (conversation,) = site.store.all(Conversation)
    listing, title = tab.send("run/predict", "refresh_list", None, "")["data"]
    assert conversation.title == "Where is my vase?"
    assert conversation.title in listing
    assert conversation.title in title


def test_a_first_answer_that_broke_is_kept_and_the_next_try_joins_it(site: Site, tab: Tab) -> None:
    site.engine.enqueue([("Well,", StreamBroken("stream: it broke; ask again")), "Here it is."])
    tab.ask("Where is it?")
    assert "it broke" in tab.see_answer()
    tab.send("run/predict", "ask_again", None, clicked={"act": "retry"})
    assert "Here it is." in tab.see_answer()
    broken, whole = site.store.all(Turn)
    assert (broken.answer, broken.finish_reason, whole.finish_reason) == ("Well,", "error", "stop")
    assert broken.conversation_id == whole.conversation_id


def test_an_answer_that_no_tab_waits_for_is_given_up_and_asked_for_anew(
    site: Site, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_page, "UNSEEN_S", 0.1)
    site.engine.delay_s = 0.05
    site.engine.enqueue(["word " * 400, "Here it is."])
    tab.ask("Where is it?")
    wait_until(lambda: site.engine.aborted)
    wait_until(lambda: site.store.all(Turn))
    site.engine.delay_s = 0
    assert "Here it is." in tab.see_answer()
    assert [turn.finish_reason for turn in site.store.all(Turn)] == ["cancelled", "stop"]


def test_who_begins_a_new_conversation_ends_the_answer_that_was_not_shown_yet(site: Site, tab: Tab) -> None:
    site.engine.delay_s = 0.05
    site.engine.enqueue(["word " * 400])
    tab.ask("Where is it?")
    wait_until(lambda: site.engine.calls)
    tab.send("run/predict", "open_new")
    wait_until(lambda: site.engine.aborted)


def test_the_last_update_of_an_answer_that_was_left_shows_nothing_of_it(site: Site, tab: Tab) -> None:
    # Gradio repeats the last update when an event ends, which may be after the next screen was drawn.
    site.engine.delay_s = 0.02
    site.engine.enqueue(["leftover " * 400])
    tab.ask("Where is it?")
    tab.send("queue/join", "stream", None)
    with tab.client.stream("GET", "/gradio_api/queue/data?session_hash=tab") as reply:
        events = (line for line in reply.iter_lines() if line)
        assert "leftover" in next(event for event in events if "process_generating" in event)
        tab.send("run/predict", "open_new")
        assert "leftover" not in next(event for event in events if "process_completed" in event)
