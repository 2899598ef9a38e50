"""Answers that go out while they are made, and what happens when nobody listens any more.

A closed connection ends the work behind it at once: tokens for nobody would keep others waiting.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from assistant.web.errors import ClientGone
from storage.records import Json

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Kept, as `json.dumps` would make a new one for each token."""


def sse(data: Json) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _COMPACT.encode(data).encode() + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client closes the connection.

    Raises:
        ClientGone: it did.
    """
    task: asyncio.Task[Result] = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("connection: closed before the answer was complete")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends server-sent events; closes their source as soon as the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or nobody listens."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass  # a server of a newer ASGI version tells by this that the client is gone
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(
                    0
                )  # events that came in one burst would keep us from hearing that nobody listens
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
