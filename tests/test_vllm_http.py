"""The connections to vLLM, against servers that send what they are told to, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from assistant.engine import vllm_http
from assistant.engine.vllm_http import Connections

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = HEAD + b"5\r\nHello\r\n0\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request with the next parts; a float among them is a pause in seconds, None hangs up."""

    def __init__(self, *parts: bytes | float | None) -> None:
        self.parts = parts
        self.connections = self.hung_up = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while request := await reader.readuntil(b"!"):
                self.requests.append(request)
                for part in self.parts:
                    if part is None:
                        return
                    if isinstance(part, float):
                        await asyncio.sleep(part)
                    else:
                        writer.write(part)
                        await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up += 1
        finally:
            writer.close()


@asynccontextmanager
async def open_client(server: Server, *, read_s: float = 5) -> AsyncIterator[httpx.AsyncClient]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with (
        listening,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            transport=Connections(),
            timeout=httpx.Timeout(5, read=read_s),
        ) as client,
    ):
        yield client


def ask(server: Server, *, times: int = 1, read_s: float = 5, pause_s: float = 0) -> list[str]:
    """Return the bodies of so many answers, asked for one after the other."""

    async def asked() -> list[str]:
        async with open_client(server, read_s=read_s) as client:
            texts = []
            for _ in range(times):
                texts.append((await client.post("/ask?now", content="Well!")).text)
                await asyncio.sleep(pause_s)
            return texts

    return asyncio.run(asked())


def test_a_request_is_written_as_http_writes_it() -> None:
    server = Server(WHOLE)
    assert ask(server) == ["Hello"]
    (request,) = server.requests
    assert request.startswith(b"POST /ask?now HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nContent-Length: 5\r\n" in request
    assert request.endswith(b"\r\n\r\nWell!")


def test_an_answer_is_the_same_wherever_the_network_cuts_it() -> None:
    server = Server(*(bytes([byte]) for byte in WHOLE))
    assert ask(server) == ["Hello"]


def test_a_connection_is_used_again_and_not_after_the_server_would_have_closed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(WHOLE)
    assert ask(server, times=3) == ["Hello"] * 3
    assert server.connections == 1
    monkeypatch.setattr(vllm_http, "KEEP_ALIVE_S", 0.01)
    late = Server(WHOLE)
    ask(late, times=2, pause_s=0.05)
    assert late.connections == 2


@pytest.mark.parametrize(
    "parts",
    [
        (WHOLE, None),  # the server hangs up after each answer
        (WHOLE.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"),),
        (WHOLE, 0.01, b"what nobody asked for"),
        (b"HTTP/1.0 200 OK\r\n\r\nHello", None),  # a body that ends with the connection
    ],
)
def test_a_connection_that_is_no_good_any_more_is_not_used_again(parts: Any) -> None:
    server = Server(*parts)
    assert ask(server, times=2, pause_s=0.05) == ["Hello"] * 2
    assert server.connections == 2


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ((None,), httpx.ReadError),
        ((HEAD + b"5\r\nHel", None), httpx.ReadError),
        ((b"SSH-2.0-OpenSSH\r\n",), httpx.RemoteProtocolError),
        ((HEAD + b"zz\r\n",), httpx.RemoteProtocolError),
        ((1.0,), httpx.ReadTimeout),
        ((HEAD + b"5\r\nHello\r\n", 1.0), httpx.ReadTimeout),
    ],
)
def test_what_goes_wrong_is_an_error_of_httpx(parts: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ask(Server(*parts), read_s=0.2)


def test_a_slow_answer_that_goes_on_is_not_silent() -> None:
    pieces = [part for letter in b"Hello" for part in (b"1\r\n%c\r\n" % letter, 0.1)]
    assert ask(Server(HEAD, *pieces, b"0\r\n\r\n"), read_s=0.3) == ["Hello"]  # 0.5 s in all


def test_nobody_there_is_a_failed_connection() -> None:
    async def asked() -> None:
        async with httpx.AsyncClient(transport=Connections()) as client:
            await client.get("http://127.0.0.1:9/")

    with pytest.raises(httpx.ConnectError):
        asyncio.run(asked())


def test_who_closes_a_response_early_hangs_up() -> None:
    server = Server(HEAD + b"5\r\nHello\r\n", 0.05, b"5\r\n you!\r\n", 0.05, b"0\r\n\r\n")

    async def leave() -> None:
        async with open_client(server) as client:
            async with client.stream("POST", "/ask", content="Well!") as response:
                async for _ in response.aiter_raw():
                    break
            async with asyncio.timeout(5):
                while not server.hung_up:
                    await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert server.connections == 1
