"""What Kotae changes inside Gradio: it still does all that the pages need, and no longer what nobody does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.state_holder import StateHolder

from assistant.web.lean_gradio import LeanSession, PromptQueue
from assistant.web.services import Services
from web_fixtures import Site, make_site


def streaming_site(data: Path, free: threading.Event) -> tuple[Site, gr.Blocks]:
    """Return a site whose page has one event, which streams a word, waits, and streams another; one at a time."""
    made: list[gr.Blocks] = []

    async def speak() -> Any:
        yield "one"
        await asyncio.to_thread(free.wait, 10)
        yield "two"

    def make_page(services: Services) -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as page:
            gr.State()
            gr.Button().click(speak, None, gr.Textbox(), api_name="speak", concurrency_limit=1)
        made.append(page)
        return page

    site = make_site(data, pages=(("/", "staff", make_page),))
    return site, made[0]


def messages(client: Any, session: str) -> list[str]:
    with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
        return [line for line in events.iter_lines() if line.startswith("data: ")]


def join(client: Any, page: gr.Blocks, session: str) -> None:
    (number,) = page.fns
    body = {"data": [], "fn_index": number, "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200


@pytest.mark.timeout(60)
def test_an_event_that_found_no_room_is_started_when_the_one_before_it_ends(tmp_path: Path) -> None:
    free = threading.Event()
    site, page = streaming_site(tmp_path, free)
    with site.signed_in() as client:
        for session in ("first", "second"):
            join(client, page, session)
        queue = page._queue
        assert len(queue) <= 1 or queue.changed.is_set()  # the second waits, or nobody has looked yet
        free.set()
        for session in ("first", "second"):
            text = "".join(messages(client, session))
            assert "process_completed" in text
            assert "two" in text
    assert queue.stopped


def test_nobody_looks_for_events_while_none_comes(tmp_path: Path) -> None:
    _, page = streaming_site(tmp_path, threading.Event())
    queue = page._queue
    looks = 0

    async def wait_a_while() -> None:
        nonlocal looks
        real = queue.get_events

        def counted() -> Any:
            nonlocal looks
            looks += 1
            return real()

        queue.get_events = counted  # type: ignore[method-assign]
        processing = asyncio.create_task(queue.start_processing())
        await asyncio.sleep(0.1)
        queue.close()
        await processing

    assert isinstance(queue, PromptQueue)
    queue.active_jobs = [None]
    asyncio.run(wait_a_while())
    assert looks <= 1  # at the end, when it was told to look


def test_a_tab_keeps_its_state_and_describes_no_component(tmp_path: Path) -> None:
    _, page = streaming_site(tmp_path, threading.Event())
    (state,) = [id for id, block in page.blocks.items() if isinstance(block, gr.State)]
    session = StateHolder()
    session.set_blocks(page)
    session["tab"][state] = "kept"
    assert session["tab"][state] == "kept"
    assert isinstance(session["tab"], LeanSession)
    assert set(session["tab"].config_values) <= {state}
