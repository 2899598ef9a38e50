"""Paces an answer for the screen: the first words at once, then a few updates a second, and a way to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

Event = TypeVar("Event")
UPDATE_INTERVAL_S = 0.1
"""Ten updates a second read as fluent and keep the cost of drawing low."""
UPDATES_PER_S = 60
"""Of all streams together: each costs the web process a millisecond or two, and first words wait behind it."""


def interval_for(streams: int) -> float:
    """Return the seconds between two updates of one of so many streams."""
    return max(UPDATE_INTERVAL_S, streams / UPDATES_PER_S)


class LiveAnswer(Generic[Event]):
    """An answer on its way to one browser tab: read as it comes, shown a few times a second, stopped by whoever may."""

    def __init__(self, events: AsyncGenerator[Event, None], *, turn_id: str = "") -> None:
        """Begin to read, in the running loop: the engine works before anybody looks."""
        self.turn_id = turn_id
        self.is_shown = False
        self.given_up: asyncio.TimerHandle | None = None
        """Gives the answer up unless it is shown before."""
        self._events = events
        self._latest: list[Event] = []
        self._changed = asyncio.Event()
        self._is_stopped = False
        self._loop = asyncio.get_running_loop()
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(self._ended)

    def stop(self) -> None:
        """Cancel the answer where it stands; from any thread."""
        self._is_stopped = True
        self._loop.call_soon_threadsafe(self._reading.cancel)

    async def updates(self, *, interval_s: float = UPDATE_INTERVAL_S) -> AsyncGenerator[Event, None]:
        """Yield the latest event at most once per `interval_s` (seconds); the first and the last at once.

        When it was stopped, or this generator is closed, the answer is cancelled and has ended before this returns.
        """
        self.is_shown = True
        if self.given_up:
            self.given_up.cancel()  # it would hold what it knows of the request until then
        try:
            while True:
                if not self._reading.done():
                    await self._changed.wait()
                self._changed.clear()
                if self._latest and not self._is_stopped:
                    yield self._latest.pop()
                if self._is_stopped:
                    return
                if self._reading.done() and not self._latest:
                    await self._reading  # raises what broke it
                    return
                await asyncio.wait({self._reading}, timeout=interval_s)
        finally:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        async for event in self._events:
            self._latest[:] = [event]
            self._changed.set()

    def _ended(self, reading: asyncio.Task[None]) -> None:
        self._changed.set()
        if not reading.cancelled():
            reading.exception()  # nobody may be there to see it
