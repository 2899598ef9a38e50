"""What the pages and the API are given: the use cases, wired by app.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from assistant.chat import Chat
from assistant.engine.protocol import Engine
from assistant.release import Release
from storage.records import Person, RunTrigger
from storage.runs import NextRun
from storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a page may call. `launch_run` starts an alignment run in a process of its own and returns at once.

    `launch_run` raises Busy when a run is going on. `next_run` says what starts the next one.
    """

    store: Store
    engine: Engine
    release: Release
    chat: Chat
    launch_run: Callable[[RunTrigger, Person], None]
    next_run: Callable[[], NextRun]
    model_name: str
    """What to call the base model on the pages, e.g. "Kotae starter"."""
