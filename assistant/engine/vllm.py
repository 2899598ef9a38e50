"""The engine that serves: one or more vLLM servers over their OpenAI-compatible HTTP API.

Requests go to the replica with the least in flight; another one is tried only before the first token.
Adapters are immutable: a name is loaded once, from one path, and never in place, because vLLM keys its prefix
cache by both (vllm issues 30931, 42125). Starting a server is the supervisor's work, not this module's.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx

from assistant.engine import vllm_wire as wire
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    PolicyNotLoaded,
    StreamBroken,
)
from assistant.engine.pace import Pace
from assistant.engine.protocol import Health, Piece, ProbeResult, Queue, Sampling
from assistant.engine.vllm_http import Connections, post
from storage.errors import InvalidField, KotaeError
from storage.records import Json

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0
"""Longest silence of a stream, waiting in the queue included."""
HEALTH_TIMEOUT_S = 4.0
"""For one replica, below what the web side waits for all: a silent one must not make the others look absent."""
WORTH_ANOTHER_REPLICA = (EngineUnavailable, EngineBusy, PolicyNotLoaded, StreamBroken)


@dataclass(slots=True)
class _Replica:
    """One server, as last seen."""

    url: str
    in_flight: int = 0
    ready: bool = True
    base: str | None = None
    """The name under which it serves the base model; learnt from its model list."""
    policies: set[str] = field(default_factory=set)
    """What it can serve; learnt from its model list and from what was done since."""
    pace: Pace = field(default_factory=Pace)


class VllmEngine:
    """`Engine` over the HTTP API of one or more vLLM servers that share the adapters' paths."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        base_name: str,
        api_key: str | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
        explain: Callable[[], EngineUnavailable | None] = lambda: None,
        in_float32: bool = False,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            explain: says why a server that does not answer does not, when its supervisor knows.
            in_float32: whether the servers are known to compute in float32; vLLM does not tell.
        """
        if not urls:
            raise InvalidField("engine_url", list(urls), "give the address of at least one vLLM server")
        self.base_name = base_name
        self._explain = explain
        self._in_float32 = in_float32
        self._replicas = [_Replica(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self._transport = transport or Connections()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        self._timeout = limits.as_dict()
        self._client = httpx.AsyncClient(
            headers=self._headers | {"Accept-Encoding": "identity"},
            timeout=limits,
            transport=self._transport,
        )

    # -- answering ------------------------------------------------------------------------------------

    async def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Stream an answer; closing the iterator early aborts the request in vLLM. See `Engine.stream`."""
        failure: EngineError = EngineUnavailable("engine: no replica is configured")
        for replica in self._by_load(policy_id):
            begun = False
            try:
                async with aclosing(
                    self._stream_from(replica, policy_id, messages, sampling, request_id)
                ) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except ContextTooLong as refusal:
                raise await self._counted(replica, policy_id, messages, refusal) from None
            except WORTH_ANOTHER_REPLICA as error:
                if begun:
                    raise
                if isinstance(error, PolicyNotLoaded):
                    replica.policies.discard(policy_id)
                failure = _worse(failure, error)
        raise failure

    async def _stream_from(
        self, replica: _Replica, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one replica's answer; the first carries the prompt's ids and a token."""
        model = await self._name_on(replica, policy_id)
        size = replica.pace.chunk_tokens(replica.in_flight + 1)
        body = wire.chat_body(
            model=model, policy_id=policy_id, messages=messages, sampling=sampling, chunk_tokens=size
        )
        prompt: tuple[int, ...] | None = None
        begun, finished, tokens, first_at = False, False, 0, 0.0
        replica.in_flight += 1
        try:
            response = await post(
                self._transport,
                f"{replica.url}/v1/chat/completions",
                wire.encoded(body),
                headers=self._headers | {"X-Request-Id": request_id, "Content-Type": "application/json"},
                timeout=self._timeout,
            )
            async with aclosing(response):
                await _raise_for_status(response, policy_id=policy_id, url=replica.url)
                replica.ready = True
                assert isinstance(response.stream, httpx.AsyncByteStream)
                async for data in wire.sse_data(response.stream):
                    event = wire.parse_event(data)
                    if "error" in event:
                        raise wire.stream_error(event, policy_id=policy_id, url=replica.url, begun=begun)
                    piece = wire.read_chunk(event, model=model, served_by=policy_id, prompt=prompt)
                    if piece is None:
                        continue
                    prompt = piece.prompt_token_ids
                    if not (piece.text or piece.token_ids or piece.finish_reason):
                        continue
                    if not begun:
                        prompt, first_at = None, time.monotonic()
                    tokens += len(piece.token_ids)
                    yield piece
                    begun, finished = True, piece.finish_reason is not None
            if not finished:
                raise StreamBroken(
                    f"stream: {replica.url} ended the answer without a finish reason; ask again"
                )
            replica.pace.note(tokens=tokens, seconds=time.monotonic() - first_at)
        except httpx.TransportError as error:
            if not finished:
                raise self._lost(replica, error, begun=begun) from error
        finally:
            replica.in_flight -= 1

    async def _counted(
        self, replica: _Replica, policy_id: str, messages: list[Json], refusal: ContextTooLong
    ) -> ContextTooLong:
        """Return the refusal with the length of the prompt, which vLLM does not count to its end."""
        if refusal.tokens is not None:
            return refusal
        body: Json = {"model": await self._name_on(replica, policy_id), "messages": messages}
        try:
            response = await self._send(replica, "POST", "/tokenize", json=body, timeout_s=HEALTH_TIMEOUT_S)
        except KotaeError:
            return refusal
        return wire.counted(refusal, response.text)

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return a greedy answer with its log-probs, NaN where vLLM has no number. See `Engine.probe`."""

        async def ask(replica: _Replica) -> ProbeResult:
            model = await self._name_on(replica, policy_id)
            body = wire.probe_body(model=model, policy_id=policy_id, messages=messages, max_tokens=max_tokens)
            response = await self._send(replica, "POST", "/v1/chat/completions", json=body)
            if response.status_code >= 400 and "JSON compliant" in response.text:  # 0.32 says 400
                return ProbeResult(text="", token_ids=(0,), logprobs=(math.nan,))
            await _raise_for_status(response, policy_id=policy_id, url=replica.url)
            return replace(wire.read_probe(response.json(), model=model), in_float32=self._in_float32)

        failure: EngineError = EngineUnavailable("engine: no replica is configured")
        for replica in self._by_load(policy_id):
            try:
                return await ask(replica)
            except WORTH_ANOTHER_REPLICA as error:
                failure = _worse(failure, error)
        raise failure

    # -- adapters -------------------------------------------------------------------------------------

    async def load(self, *, policy_id: str, adapter: Path) -> None:
        """Load an adapter on every replica that answers; loading it twice is fine. See `Engine.load`.

        The files must stay where they are for as long as the policy may be asked: vLLM reads them again when
        it has moved an adapter out of memory, and dies when they are gone.
        """
        if policy_id == self.base_name:
            raise AdapterRefused(f"policy: {policy_id!r} is the base's name; give the adapter its own")
        path = str(adapter.resolve())  # vLLM takes a relative path that it cannot find for a hub id
        if not (adapter / "adapter_config.json").is_file():
            raise AdapterRefused(f"{path}: no adapter_config.json; give the folder of a LoRA adapter")
        await self._on_every_replica(lambda replica: self._load_on(replica, policy_id, path))

    async def _load_on(self, replica: _Replica, policy_id: str, path: str) -> None:
        body = {"lora_name": policy_id, "lora_path": path}
        response = await self._send(replica, "POST", "/v1/load_lora_adapter", json=body)
        if response.status_code == 200:
            replica.policies.add(policy_id)
            return
        error = wire.error_of_body(response.text)
        message = str(error["message"])
        if "already been loaded" in message:
            loaded_from = (await self._models(replica)).get(policy_id)
            if loaded_from in (path, None):
                return
            raise AdapterRefused(f"{policy_id} is loaded from {loaded_from}; give {path} an id of its own")
        if message == "Not Found":
            raise EngineUnavailable(
                f"engine: {replica.url} cannot load adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if response.status_code in (400, 404, 500) and await self._is_healthy(replica):
            raise AdapterRefused(f"{path}: the engine refused it: {message[:300]}")
        raise wire.translate(error, status=response.status_code, policy_id=policy_id, url=replica.url)

    async def unload(self, policy_id: str) -> None:
        """Forget an adapter on every replica that answers; one that is not loaded is fine."""
        if policy_id == self.base_name:
            return

        async def forget(replica: _Replica) -> None:
            body = {"lora_name": policy_id}
            response = await self._send(replica, "POST", "/v1/unload_lora_adapter", json=body)
            if response.status_code not in (200, 404):
                await _raise_for_status(response, policy_id=policy_id, url=replica.url)
            replica.policies.discard(policy_id)

        await self._on_every_replica(forget)

    async def loaded(self) -> frozenset[str]:
        """Return the names that every replica that answers can serve, the base among them.

        Raises:
            EngineUnavailable: none of them answers.
        """
        names = [frozenset(models) for models in await self._on_every_replica(self._models)]
        return frozenset.intersection(*names)

    # -- replicas -------------------------------------------------------------------------------------

    async def health(self) -> Health:
        """Say how many replicas answer and what is wrong with the others; never raises."""
        checks = await asyncio.gather(*(self._check(replica) for replica in self._replicas))
        wrong = [detail for detail in checks if detail]
        well = len(checks) - len(wrong)
        return Health(ready=well > 0, detail="; ".join([f"{well} of {len(checks)} replicas answer", *wrong]))

    async def queues(self) -> list[Queue]:
        """Return how many answers each replica makes and holds waiting, by its own metrics; never raises."""
        return await asyncio.gather(*(self._queue(replica) for replica in self._replicas))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _check(self, replica: _Replica) -> str:
        """Return what is wrong with a replica, or an empty text; remembers the outcome."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                response = await self._send(replica, "GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
                await _raise_for_status(response, policy_id=self.base_name, url=replica.url)
                await self._models(replica)
        except (KotaeError, TimeoutError) as error:
            replica.ready = False
            return str(error) or f"engine: {replica.url} does not answer within {HEALTH_TIMEOUT_S:g} s"
        replica.ready = True
        return ""

    async def _queue(self, replica: _Replica) -> Queue:
        lengths = None
        if replica.ready:  # one that is known to be silent would only hold up the others' numbers
            with suppress(KotaeError):
                response = await self._send(replica, "GET", "/metrics", timeout_s=HEALTH_TIMEOUT_S)
                lengths = wire.queue_lengths(response.text)
        running, waiting = lengths or (None, None)
        return Queue(replica=replica.url, up=replica.ready, running=running, waiting=waiting)

    async def _is_healthy(self, replica: _Replica) -> bool:
        return not await self._check(replica)

    async def _models(self, replica: _Replica) -> dict[str, str | None]:
        """Return what a replica can serve: our name of it → the path it was loaded from."""
        response = await self._send(replica, "GET", "/v1/models", timeout_s=HEALTH_TIMEOUT_S)
        await _raise_for_status(response, policy_id=self.base_name, url=replica.url)
        try:
            rows = response.json()["data"]
            bases = [row["id"] for row in rows if row.get("parent") is None]
            paths = {row["id"]: row.get("root") for row in rows if row.get("parent") is not None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineUnavailable(f"engine: {replica.url} is not vLLM; check the address") from error
        if not bases:
            raise EngineUnavailable(f"engine: {replica.url} lists no base model; check the address")
        replica.base = self.base_name if self.base_name in bases else bases[0]
        replica.policies = {self.base_name, *paths}
        return {self.base_name: None, **paths}

    async def _name_on(self, replica: _Replica, policy_id: str) -> str:
        """Return what a replica calls a policy: a server run elsewhere has its own name for the base."""
        if policy_id != self.base_name:
            return policy_id
        if replica.base is None:
            await self._models(replica)
        return replica.base or self.base_name

    def _by_load(self, policy_id: str) -> list[_Replica]:
        """Return the replicas in the order to try: those that answer and have the policy, least in flight first.

        One that came back without its adapters is asked for them only when no other is left.
        """

        def last(replica: _Replica) -> tuple[bool, bool, int]:
            return not replica.ready, policy_id not in replica.policies, replica.in_flight

        return sorted(self._replicas, key=last)

    async def _on_every_replica(self, act: Callable[[_Replica], Awaitable[T]]) -> list[T]:
        """Act on all replicas at once and return the results of those that answer.

        Raises:
            EngineUnavailable: none answered.
            KotaeError: the first other failure; all of them were tried.
        """
        done = await asyncio.gather(*(act(replica) for replica in self._replicas), return_exceptions=True)
        absent: list[EngineUnavailable] = []
        results: list[T] = []
        for outcome in done:
            if isinstance(outcome, EngineUnavailable):
                absent.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                results.append(outcome)
        if not results:
            raise absent[0]
        return results

    async def _send(
        self,
        replica: _Replica,
        method: str,
        path: str,
        *,
        json: Json | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        limit = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            return await self._client.request(method, replica.url + path, json=json, timeout=limit)
        except httpx.TransportError as error:
            raise self._lost(replica, error, begun=False) from error

    def _lost(self, replica: _Replica, error: httpx.TransportError, *, begun: bool) -> EngineError:
        """Return a failed connection as our error, and try this replica last from now on."""
        replica.ready, replica.base, replica.policies = False, None, set()
        reason = str(error) or type(error).__name__
        if begun:
            return StreamBroken(f"stream: lost {replica.url} in mid-answer ({reason}); ask again")
        silent = f"engine: {replica.url} does not answer ({reason}); is it running?"
        return self._explain() or EngineUnavailable(silent)


def _worse(first: EngineError, second: EngineError) -> EngineError:
    """Return the error to show when every replica failed: a busy one tells most about what to do."""
    return first if isinstance(first, EngineBusy) else second


async def _raise_for_status(response: httpx.Response, *, policy_id: str, url: str) -> None:
    if response.status_code >= 400:
        await response.aread()
        error = wire.error_of_body(response.text)
        raise wire.translate(error, status=response.status_code, policy_id=policy_id, url=url)
