"""Gradio without what it does for nobody: looking for events day and night, describing components to no reader, statistics.

Each changes how Gradio 6 works inside; `tests/test_lean_gradio.py` fails where a later version does it otherwise.
"""

from __future__ import annotations

import asyncio
import sys
import time
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio import state_holder
from gradio.queueing import Event, Queue
from gradio.utils import run_coro_in_background, set_task_name

PROGRESS_LOOK_S = 1.0
"""No page has a progress bar; Gradio would look for one each 10 ms."""


def make_lean(blocks: gr.Blocks) -> None:
    """Change a mounted app, before it is served."""
    state_holder.SessionState = LeanSession  # type: ignore[misc]
    queue = blocks._queue
    queue.__class__ = PromptQueue
    assert isinstance(queue, PromptQueue)
    queue.changed = asyncio.Event()
    queue.progress_update_sleep_when_free = PROGRESS_LOOK_S
    # At the end of each queued event Gradio makes a table of the last 10,000 (1 ms of a processor with few, 7 with all) for
    # a page of statistics that Kotae closes (`guard.CLOSED`).
    queue.ANALYTICS_MAX_EVENTS, queue.ANAYLTICS_CACHE_FREQUENCY = 1, sys.maxsize


class LeanSession(state_holder.SessionState):
    """What a browser tab has on the server, without a description of each component of the app, which nothing reads.

    To make them held up everybody's answers for 15 ms, for each tab that was opened.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        described: Any = SimpleNamespace(default_config=blocks.default_config, blocks=())
        super().__init__(described)

    def _update_config(self, key: int) -> None:
        pass

    def _update_value_in_config(self, key: int, value: Any) -> None:
        pass


class PromptQueue(Queue):
    """Starts an event when it comes; Gradio's queue of each app looks for one each millisecond.

    Each 5 ms it still cost 1.5% of a processor, and an event waited for that.
    """

    changed: asyncio.Event
    """An event came, or one that may have stood in its way has ended."""

    async def push(self, *args: Any, **named: Any) -> Any:
        """Put an event in line; see Gradio."""
        pushed = await super().push(*args, **named)
        self.changed.set()
        return pushed

    def close(self) -> None:
        """Start no more events."""
        super().close()  # type: ignore[no-untyped-call]
        self.changed.set()

    async def start_processing(self) -> None:
        """Start what can be started whenever that may be something."""
        try:
            while not self.stopped:
                await self.changed.wait()
                self.changed.clear()
                while None in self.active_jobs and (found := self.get_events()):
                    self._start(*found)
        finally:
            self.stopped = True
            self._cancel_asyncio_tasks()  # type: ignore[no-untyped-call]

    def _start(self, events: list[Event], batch: bool, concurrency_id: str) -> None:
        """Start some events as Gradio's `Queue.start_processing` does."""
        started, fn = time.time(), events[0].fn
        self.active_jobs[self.active_jobs.index(None)] = events
        line = self.event_queue_per_concurrency_id[concurrency_id]
        line.current_concurrency += 1
        line.start_times_per_fn[fn].add(started)
        task = run_coro_in_background(self.process_events, events, batch, started, fn)
        set_task_name(task, events[0].session_hash, fn._id, events[0]._id, batch)
        self._asyncio_tasks.add(task)
        task.add_done_callback(self._ended)
        if self.live_updates:
            self.broadcast_estimations(concurrency_id)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._asyncio_tasks.discard(task)
        self.changed.set()
