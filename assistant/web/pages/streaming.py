"""Paces a stream for the screen: the first words at once, then a few updates a second, and a way to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

Event = TypeVar("Event")
UPDATE_INTERVAL_S = 0.1
"""Ten updates a second read as fluent and keep the cost of drawing low."""
UPDATES_PER_S = 60
"""Of all streams together: each costs the web process a millisecond or two, and first words wait behind it."""


def interval_for(streams: int) -> float:
    """Return the seconds between two updates of one of so many streams."""
    return max(UPDATE_INTERVAL_S, streams / UPDATES_PER_S)


async def paced(
    events: AsyncGenerator[Event, None], *, stop: asyncio.Event, interval_s: float = UPDATE_INTERVAL_S
) -> AsyncGenerator[Event, None]:
    """Yield the latest of `events` at most once per `interval_s` (seconds); the first and the last at once.

    When `stop` is set, or this generator is closed, `events` is cancelled where it stands and has ended before
    this returns.
    """
    latest: list[Event] = []
    changed = asyncio.Event()

    async def pump() -> None:
        try:
            async for event in events:
                latest[:] = [event]
                changed.set()
        finally:
            changed.set()

    pumping = asyncio.create_task(pump())
    stopping = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            waiting = asyncio.create_task(changed.wait())
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            changed.clear()
            if latest and not stop.is_set():
                yield latest.pop()
            if pumping.done() and not latest:
                await pumping
                return
            await asyncio.wait({pumping, stopping}, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                changed.set()
    finally:
        stopping.cancel()
        pumping.cancel()
        await asyncio.wait({pumping})
        if not pumping.cancelled():
            pumping.exception()  # seen here, or already raised above
        await events.aclose()
