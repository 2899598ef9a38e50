"""Answers that go out while they are made, and what happens when nobody listens any more.

A closed connection ends the work behind it at once: tokens for nobody would keep others waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from assistant.web.errors import ClientGone
from storage.records import Json

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store"),
    (b"x-accel-buffering", b"no"),
)
"""Nobody on the way is to keep or to collect the events."""


def sse(data: Json) -> bytes:
    """Return one server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


@asynccontextmanager
async def while_heard(receive: Receive) -> AsyncGenerator[None, None]:
    """Run the block, which is cancelled when the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.current_task()
    assert task is not None

    def hang_up(listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            listening.exception()  # what broke off the request says no more than that it did
        task.cancel()

    listening = asyncio.create_task(_gone(receive))
    listening.add_done_callback(hang_up)
    try:
        yield
    except asyncio.CancelledError:
        if listening.done() and task.uncancel() == 0:
            raise ClientGone("connection: closed before the answer was complete") from None
        raise
    finally:
        listening.remove_done_callback(hang_up)
        listening.cancel()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    async with while_heard(request.receive):
        return await work


class EventStream(Response):
    """Sends server-sent events; closes their source as soon as the client has gone.

    What the source raises before its first event is still answered with an HTTP status, which is what clients retry on.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events
        self.status_code = 200
        self.background = None
        self.raw_headers = [*EVENT_STREAM]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or nobody listens."""
        has_begun = False
        try:
            async with while_heard(receive), aclosing(self.events) as events:
                async for event in events:
                    if not has_begun:
                        await send(self._start())
                        has_begun = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # a server of a newer ASGI version tells by this that the client is gone
        except ClientGone:
            if not has_begun:
                raise

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
