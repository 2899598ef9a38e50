"""Fake vLLM servers that answer what they are told to, and the client that asks them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from assistant.engine.protocol import Piece, Sampling
from assistant.engine.vllm import VllmEngine
from storage.records import Json

BASE, POLICY = "policy-base-00000000", "policy-0001-aaaaaa"
MESSAGES: list[Json] = [{"role": "user", "content": "Hello"}]
ONE, TWO = "http://one", "http://two"


class Body(httpx.AsyncByteStream):
    """A streamed body, in the chunks given; an exception among them is raised. Remembers that it was closed."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self.chunks = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            await asyncio.sleep(0)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        self.closed = True


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


def chunk(
    text: str, ids: list[int] | None, *, finish: str | None = None, model: str = POLICY, **more: Any
) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "token_ids": ids}
    return event(model=model, choices=[choice], **more)


FIRST = event(
    model=POLICY,
    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}],
    prompt_token_ids=[1, 2],
)
DONE = b"data: [DONE]\n\n"
GOOD = (FIRST, chunk("Hi", [5]), chunk("", [9], finish="stop"), DONE)


class Server:
    """Fake vLLM servers by host name; each answers a path with what was put in line for it, the last one again."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[tuple[str, str], list[Any]] = {}
        for host in ("one", "two"):
            self.on(host, "/health", httpx.Response(200))
            self.on(host, "/v1/models", models(BASE))
            self.on(host, "/tokenize", httpx.Response(404))

    def on(self, host: str, path: str, *answers: Any) -> None:
        self.answers[host, path] = list(answers)

    def chat(self, host: str, *answers: Any) -> None:
        self.on(host, "/v1/chat/completions", *answers)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        line = self.answers[request.url.host, request.url.path]
        answer = line.pop(0) if len(line) > 1 else line[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return httpx.Response(200, stream=Body(*answer))
        if isinstance(answer, Body):
            return httpx.Response(200, stream=answer)
        return httpx.Response(answer.status_code, content=answer.content)


def models(base: str, **adapters: str) -> httpx.Response:
    rows = [{"id": base, "parent": None, "root": "/model"}]
    rows += [{"id": name.replace("_", "-"), "parent": base, "root": root} for name, root in adapters.items()]
    return httpx.Response(200, json={"data": rows})


def problem(status: int, message: str, param: str | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "param": param, "code": status}})


def engine_of(server: Server, *urls: str, read_timeout_s: float = 5) -> VllmEngine:
    transport = httpx.MockTransport(server)
    return VllmEngine(urls or [ONE], base_name=BASE, read_timeout_s=read_timeout_s, transport=transport)


def ask(engine: VllmEngine, policy_id: str = POLICY, *, sampling: Sampling | None = None) -> list[Piece]:
    async def collect() -> list[Piece]:
        stream = engine.stream(
            policy_id=policy_id, messages=MESSAGES, sampling=sampling or Sampling(), request_id="turn_1"
        )
        return [piece async for piece in stream]

    return asyncio.run(collect())


CONTEXT = (
    "This model's maximum context length is 256 tokens. However, your prompt contains at least 257 input tokens, "
    "which exceeds this limit even without any output tokens."
)
