"""What Kotae changes inside Gradio: it still does all that the pages need, and no longer what nobody does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio import state_holder

from assistant.web.lean_gradio import LeanSession, PromptQueue
from assistant.web.pages import staff_app
from web_fixtures import Site, make_site


def streaming_page(free: threading.Event) -> gr.Blocks:
    """Return a page whose one event streams a word, waits, and streams another; one at a time."""

    async def speak() -> Any:
        yield "one"
        await asyncio.to_thread(free.wait, 10)
        yield "two"

    with gr.Blocks(analytics_enabled=False) as page:
        told = gr.Textbox()
        gr.Button().click(speak, None, told, api_name="speak", concurrency_limit=1)
    return page


def site_of(data: Path, page: gr.Blocks) -> Site:
    return make_site(data, pages=(("/", "staff", lambda services: page),))


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
    page = streaming_page(free)
    site = site_of(tmp_path, page)
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
    page = streaming_page(threading.Event())
    site_of(tmp_path, page)
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
    site = make_site(tmp_path)
    page = staff_app(site.services)
    session = LeanSession(page)
    (state, *_) = [id for id, block in page.blocks.items() if isinstance(block, gr.State)]
    session[state] = "kept"
    assert session[state] == "kept"
    described = state_holder.SessionState.__mro__[1](page) if state_holder.SessionState is LeanSession else session
    assert len(session.config_values) == 1 < len(described.config_values)
