"""The connections to vLLM: requests and responses are httpx's, the bytes between them go straight to the C parser.

Each chunk of each answer comes this way, on processors that the model wants: a general client's layers cost
as much again. Deliberately absent: proxies, redirects, compression, HTTP/2; and holding a server back: answers are short.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from functools import cache, lru_cache
from typing import cast

import httptools
import httpx

from storage.records import Json

KEEP_ALIVE_S = 3.0
"""An idle connection is used again; below the 5 s after which vLLM closes it, so that no question meets a closed one."""
PORTS = {"http": 80, "https": 443}
Place = tuple[str, str, int]
"""Scheme, host and port."""


class Connections(httpx.AsyncBaseTransport):
    """Connections to any number of servers, as many as there are answers under way."""

    def __init__(self) -> None:
        self._idle: dict[Place, list[_Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response as soon as its head is there.

        Raises:
            httpx.TransportError: nobody answers, or the connection was lost.
        """
        timeout, body = request.extensions["timeout"], await request.aread()
        connection = await self._connected(request.url, timeout["connect"])
        try:
            connection.send(_head(request) + body, silence_s=timeout["read"])
            await connection.head()
        except BaseException:
            connection.release()
            raise
        return httpx.Response(
            connection.status, headers=connection.headers, stream=_Body(connection), request=request
        )

    async def aclose(self) -> None:
        """Close the idle connections; the others are closed with their responses."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    async def _connected(self, url: httpx.URL, timeout_s: float | None) -> _Connection:
        """Return a connection that nobody uses: the one used last, as it is the least likely to be closed by now."""
        place = (url.scheme, url.host, url.port or PORTS[url.scheme])
        idle, loop = self._idle.setdefault(place, []), asyncio.get_running_loop()
        while idle:
            if (kept := idle.pop()).is_fresh(loop):
                return kept
            kept.close()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop, idle),
                    place[1],
                    place[2],
                    ssl=_tls() if url.scheme == "https" else None,
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {timeout_s:g} s") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection and the response that comes over it; `on_…` are the parser's calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: list[_Connection]) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._loop, self._idle = loop, idle
        self._parts: list[bytes] = []
        self._has_head, self._is_complete, self._is_reusable = False, True, False
        self._error: httpx.TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._heard_at = 0.0
        self._silence: asyncio.TimerHandle | None = None

    # -- for the transport ----------------------------------------------------------------------------

    def send(self, request: bytes, *, silence_s: float | None) -> None:
        """Send a whole request; the answer may pause for so long at most."""
        self.headers, self._parts = [], []
        self._has_head = self._is_complete = self._is_reusable = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        self._heard_at = self._loop.time()
        if silence_s is not None:
            self._silence = self._loop.call_later(silence_s, self._check_silence, silence_s)

    async def head(self) -> None:
        """Return when status and headers are there."""
        while not self._has_head:
            await self._more()

    async def part(self) -> bytes | None:
        """Return what has come of the body, or wait for it; None at its end."""
        while not self._parts:
            if self._is_complete:
                return None
            await self._more()
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    def release(self) -> None:
        """Keep the connection for the next request if its response is complete; else nobody wants the rest of it."""
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if self._is_reusable and self._error is None and not self._transport.is_closing():
            self._heard_at = self._loop.time()
            self._idle.append(self)
        else:
            self.close()

    def is_fresh(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether the server can be expected to take another request."""
        is_open = loop is self._loop and self._error is None and not self._transport.is_closing()
        return is_open and loop.time() - self._heard_at < KEEP_ALIVE_S

    def close(self) -> None:
        """Close at once; vLLM gives up an answer that nobody listens to."""
        if not self._loop.is_closed():
            self._transport.abort()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: httpx.TransportError) -> None:
        self._error = self._error or error
        self._wake()

    def _check_silence(self, silence_s: float) -> None:
        """Fail when nothing came for so long, else look again when that could be."""
        left_s = self._heard_at + silence_s - self._loop.time()
        if left_s > 0:
            self._silence = self._loop.call_later(left_s, self._check_silence, silence_s)
        else:
            self._fail(httpx.ReadTimeout(f"silent for {silence_s:g} s"))

    # -- for the event loop ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        """Parse what came; bytes that nobody asked for make the connection useless."""
        self._heard_at = self._loop.time()
        try:
            if self._is_complete:
                raise httptools.HttpParserError("more than was asked for")
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(httpx.RemoteProtocolError(f"not HTTP: {error}"))
            self.close()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """End a body that has no length; whatever else is still awaited has failed."""
        lengths = {b"content-length", b"transfer-encoding"}
        if error is None and self._has_head and lengths.isdisjoint(name.lower() for name, _ in self.headers):
            self._is_complete = True  # as HTTP/1.0 ends a body
        if self in self._idle:
            self._idle.remove(self)
        self._fail(httpx.ReadError(str(error) if error else "the server closed the connection"))

    # -- for the parser -------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status, self._has_head = self._parser.get_status_code(), True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._is_complete, self._is_reusable = True, self._parser.should_keep_alive()


class _Body(httpx.AsyncByteStream):
    """The body of a response; closing it releases the connection."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._is_open = True

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self._connection.part() if self._is_open else None
        if data is None:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        """Release the connection, once."""
        if self._is_open:
            self._is_open = False
            self._connection.release()


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


_parsed = lru_cache(maxsize=64)(httpx.URL)


def _head(request: httpx.Request) -> bytes:
    line = b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)
    return b"\r\n".join([line, *(b"%s: %s" % header for header in request.headers.raw), b"", b""])


async def post(
    transport: httpx.AsyncBaseTransport,
    url: str,
    body: bytes,
    *,
    headers: dict[str, str],
    timeout: Json,
) -> httpx.Response:
    """Return the response to a question, to be closed, while it streams: straight from the connections.

    httpx's client would look for redirects, cookies and credentials first, and its request work out what it is made of:
    half a millisecond for each answer.
    """
    place = _parsed(url)
    request = httpx.Request(
        "POST",
        place,
        headers={"Host": place.netloc.decode(), "Content-Length": str(len(body)), **headers},
        stream=httpx.ByteStream(body),
        extensions={"timeout": timeout},
    )
    response = await transport.handle_async_request(request)
    response.request = request
    return response
