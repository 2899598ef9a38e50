"""How much a request may bring and how often somebody may try to sign in.

The body is counted while it is read, so a missing or wrong Content-Length changes nothing. Tries are counted
in this process only: a restart forgets them, which an attacker cannot cause.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assistant.web.errors import BodyTooLarge, TooManyTries, error_response

API_BODY_BYTES = 256 * 1024
COMPLETION_BODY_BYTES = 1024 * 1024
"""A whole dialogue comes with each question: a megabyte is some 250,000 tokens of English."""
PAGE_BODY_BYTES = 4 * 1024 * 1024
"""Gradio sends the visible history with its events."""

TRIES = 10
TRIES_ALONE = 50
"""Per name from anywhere and per address for any name: wide enough that nobody locks out an office behind
one address."""
WINDOW_S = 300.0
MAX_REMEMBERED = 10_000


def body_limit_bytes(path: str) -> int:
    """Return how long a body of a request to `path` may be."""
    if path.startswith("/v1/") or path == "/api/pairs":
        return COMPLETION_BODY_BYTES
    if path.startswith("/api/") or path in ("/login", "/logout", "/password"):
        return API_BODY_BYTES
    return PAGE_BODY_BYTES


class BodyLimit:
    """ASGI middleware that refuses long bodies with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; reading past the limit raises BodyTooLarge where the body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = body_limit_bytes(scope["path"])
        too_large = BodyTooLarge(f"body: got more than {limit:,} bytes; send less at a time")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await error_response(too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            """Pass a message on and count its bytes."""
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        await self.app(scope, counted, send)


@dataclass(frozen=True, slots=True)
class _Key:
    """Whom tries are counted for, and how many they have."""

    name: str
    address: str
    most: int


class SignInLimit:
    """Counts failed sign-ins per name and address over the last five minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: dict[_Key, deque[float]] = {}

    def begin(self, *, name: str, address: str) -> None:
        """Count a try as failed until `succeeded` is told.

        Raises:
            TooManyTries: there were too many.
        """
        now_s = self._clock()
        self._forget(now_s)
        keys = _keys(name, address)
        waits_s = [self._tries[key][0] + WINDOW_S - now_s for key in keys if self._full(key)]
        if waits_s:
            raise TooManyTries(max(1, math.ceil(max(waits_s))))
        for key in keys:
            self._tries.setdefault(key, deque()).append(now_s)

    def succeeded(self, *, name: str, address: str) -> None:
        """Forget the tries of this name from this address; only this one elsewhere."""
        pair, *alone = _keys(name, address)
        self._tries.pop(pair, None)
        for key in alone:
            if self._tries.get(key):
                self._tries[key].pop()

    def _full(self, key: _Key) -> bool:
        return len(self._tries.get(key, ())) >= key.most

    def _forget(self, now_s: float) -> None:
        """Drop tries older than the window, and the oldest keys when there are too many."""
        for key in list(self._tries):
            tries = self._tries[key]
            while tries and tries[0] <= now_s - WINDOW_S:
                tries.popleft()
            if not tries:
                del self._tries[key]
        while len(self._tries) > MAX_REMEMBERED:
            del self._tries[next(iter(self._tries))]


def _keys(name: str, address: str) -> tuple[_Key, ...]:
    folded = name.strip().casefold()[:100]
    return (_Key(folded, address, TRIES), _Key(folded, "", TRIES_ALONE), _Key("", address, TRIES_ALONE))
