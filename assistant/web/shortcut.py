"""Straight to the completions: what FastAPI does before a route is not needed on the way to a first token.

On a processor that the model uses too, none of that code is in a cache: each of its calls takes microseconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from assistant.web.errors import told
from storage.errors import KotaeError

Endpoint = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """ASGI middleware that answers POSTs to one path itself, errors included, and passes on all else."""

    def __init__(self, app: ASGIApp, *, path: str, endpoint: Endpoint) -> None:
        self.app = app
        self.path = path
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on. What nobody foresaw is for the outermost layer, as it is of every route."""
        if scope["type"] != "http" or scope["path"] != self.path or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self.endpoint(request)
            await response(scope, receive, send)
        except KotaeError as error:  # of a stream before its first event: a later one is told in it
            await told(request, error)(scope, receive, send)
