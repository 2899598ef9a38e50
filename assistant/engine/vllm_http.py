"""The connections to vLLM: requests and responses are httpx's, the bytes between them aiohttp's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from storage.records import Json

KEEP_ALIVE_S = 3.0
"""An idle connection is used again; below the 5 s after which vLLM closes it, so that no question meets a closed one."""


def connections() -> httpx.AsyncBaseTransport:
    """Return the connections: aiohttp parses in C, which halves what a token costs on its way through httpx."""
    return AiohttpTransport(client=_session, trust_env=False)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))


@asynccontextmanager
async def posted(
    transport: httpx.AsyncBaseTransport,
    url: str,
    body: Json,
    *,
    headers: httpx.Headers,
    timeout: httpx.Timeout,
) -> AsyncIterator[httpx.Response]:
    """Yield the response to a question while it streams, straight from the connections.

    httpx's client would look for redirects, cookies and credentials first: half a millisecond for each answer.
    """
    request = httpx.Request(
        "POST", url, json=body, headers=headers, extensions={"timeout": timeout.as_dict()}
    )
    response = await transport.handle_async_request(request)
    response.request = request
    async with aclosing(response):
        yield response
