"""The engine that serves: one or more vLLM servers over their OpenAI-compatible HTTP API.

Requests go to the replica with the least in flight; another one is tried only before the first token.
Adapters are immutable: a name is loaded once, from one path, and never in place, because vLLM keys its prefix
cache by both (vllm issues 30931, 42125). Starting a server is the supervisor's work, not this module's.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx

from assistant.engine import vllm_wire as wire
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineAbsent,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    LoadFailed,
    PolicyNotLoaded,
    StreamBroken,
    WrongPolicy,
)
from assistant.engine.protocol import Health, Judge, Piece, ProbeResult, Queue, Sampling
from assistant.engine.vllm_http import Connections, post
from assistant.engine.vllm_replicas import HEALTH_TIMEOUT_S, Replica, Replicas
from storage.errors import InvalidField, KotaeError
from storage.records import Json

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 120.0
"""Longest silence of a stream, waiting in the queue included."""
WORTH_ANOTHER_REPLICA = (EngineUnavailable, EngineBusy, PolicyNotLoaded, StreamBroken)
"""Before the first token; but not `WrongPolicy`, which another's right answer would cover up."""


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
        explain: Callable[[], EngineAbsent | None] = lambda: None,
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
        self._in_float32 = in_float32
        self._transport = transport or Connections()
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        self._timeout = limits.as_dict()
        self._client = httpx.AsyncClient(
            headers=self._headers | {"Accept-Encoding": "identity"},
            timeout=limits,
            transport=self._transport,
        )
        self._replicas = Replicas(urls, base_name=base_name, client=self._client, explain=explain)

    # -- answering ------------------------------------------------------------------------------------

    async def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Stream an answer; closing the iterator early aborts the request in vLLM. See `Engine.stream`."""
        failure: EngineError | None = None
        for replica in self._replicas.by_load(policy_id):
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
                if begun or isinstance(error, WrongPolicy):
                    raise
                if isinstance(error, PolicyNotLoaded):
                    replica.lacks(policy_id)
                failure = _worse(failure, error)
        raise failure or self._replicas.nobody(policy_id)

    async def _stream_from(
        self, replica: Replica, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one replica's answer; the first carries the prompt's ids and a token."""
        model = await self._replicas.name_on(replica, policy_id)
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
                await self._replicas.raise_for_status(replica, response, policy_id=policy_id)
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
                raise self._replicas.lost(replica, error, begun=begun) from error
        finally:
            replica.in_flight -= 1

    async def _counted(
        self, replica: Replica, policy_id: str, messages: list[Json], refusal: ContextTooLong
    ) -> ContextTooLong:
        """Return the refusal with the length of the prompt, which vLLM does not count to its end."""
        if refusal.tokens is not None:
            return refusal
        body: Json = {"model": await self._replicas.name_on(replica, policy_id), "messages": messages}
        try:
            response = await self._replicas.send(
                replica, "POST", "/tokenize", json=body, timeout_s=HEALTH_TIMEOUT_S
            )
        except KotaeError:
            return refusal
        return wire.counted(refusal, response.text)

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return a greedy answer with its log-probs, NaN where vLLM has no number. See `Engine.probe`."""
        failure: EngineError | None = None
        for replica in self._replicas.by_load(policy_id):
            try:
                return await self._probe_on(
                    replica, policy_id=policy_id, messages=messages, max_tokens=max_tokens
                )
            except WORTH_ANOTHER_REPLICA as error:
                if isinstance(error, WrongPolicy):
                    raise
                failure = _worse(failure, error)
        raise failure or self._replicas.nobody(policy_id)

    async def _probe_on(
        self, replica: Replica, *, policy_id: str, messages: list[Json], max_tokens: int
    ) -> ProbeResult:
        model = await self._replicas.name_on(replica, policy_id)
        body = wire.probe_body(model=model, policy_id=policy_id, messages=messages, max_tokens=max_tokens)
        response = await self._replicas.send(replica, "POST", "/v1/chat/completions", json=body)
        if response.status_code >= 400 and "JSON compliant" in response.text:  # 0.32 says 400
            return ProbeResult(text="", token_ids=(0,), logprobs=(math.nan,))
        await self._replicas.raise_for_status(replica, response, policy_id=policy_id)
        return replace(wire.read_probe(response.json(), model=model), in_float32=self._in_float32)

    async def prove(self, policy_id: str, judge: Judge) -> None:
        """Let `judge` ask every replica that answers and has the policy. See `Engine.prove`."""
        await self._replicas.prove(
            policy_id, lambda replica: judge(replica.url, partial(self._probe_on, replica))
        )

    def awaits_proof(self, policy_id: str) -> bool:
        """Return whether a replica that answers has the policy and did not pass. See `Engine.awaits_proof`."""
        return self._replicas.awaits_proof(policy_id)

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
        await self._replicas.on_every(lambda replica: self._load_on(replica, policy_id, path))

    async def _load_on(self, replica: Replica, policy_id: str, path: str) -> None:
        body = {"lora_name": policy_id, "lora_path": path}
        response = await self._replicas.control(replica, "POST", "/v1/load_lora_adapter", json=body)
        if response.status_code == 200:
            replica.gains(policy_id)
            return
        error = wire.error_of_body(response.text)
        message = str(error["message"])
        if "already been loaded" in message:
            loaded_from = (await self._replicas.models(replica)).get(policy_id)
            if loaded_from in (path, None):
                return
            raise AdapterRefused(f"{policy_id} is loaded from {loaded_from}; give {path} an id of its own")
        if message == "Not Found":
            raise EngineUnavailable(
                f"engine: {replica.url} cannot load adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if response.status_code in (400, 404, 500) and not await self._replicas.check(replica):
            kind = AdapterRefused if response.status_code == 400 else LoadFailed
            raise kind(f"{path}: the engine refused it: {message[:300]}")
        raise wire.translate(error, status=response.status_code, policy_id=policy_id, url=replica.url)

    async def unload(self, policy_id: str) -> None:
        """Forget an adapter on every replica that answers; one that is not loaded is fine."""
        if policy_id == self.base_name:
            return

        async def forget(replica: Replica) -> None:
            """Unload the adapter from one replica."""
            body = {"lora_name": policy_id}
            response = await self._replicas.control(replica, "POST", "/v1/unload_lora_adapter", json=body)
            if response.status_code not in (200, 404):
                await self._replicas.raise_for_status(replica, response, policy_id=policy_id)
            replica.lacks(policy_id)

        await self._replicas.on_every(forget)
        self._replicas.judged.discard(policy_id)

    async def loaded(self) -> frozenset[str]:
        """Return the names that every replica that answers can serve, the base among them.

        Raises:
            EngineUnavailable: none of them answers.
        """
        return frozenset.intersection(*await self._listed())

    async def held(self) -> frozenset[str]:
        """Return the names that any replica that answers has, the base among them; raises as `loaded` does."""
        return frozenset.union(*await self._listed())

    async def _listed(self) -> list[frozenset[str]]:
        return [frozenset(models) for models in await self._replicas.on_every(self._replicas.listed)]

    # -- replicas -------------------------------------------------------------------------------------

    async def health(self) -> Health:
        """Say how many replicas answer, what they can serve and what is wrong with the others; never raises."""
        return await self._replicas.health()

    async def queues(self) -> list[Queue]:
        """Return how many answers each replica makes and holds waiting, by its own metrics; never raises."""
        return await self._replicas.queues()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _worse(first: EngineError | None, second: EngineError) -> EngineError:
    """Return the error to show when every replica failed: a busy one tells most about what to do, an absent one least.

    `first` is None before any failed.
    """
    if first is None:
        return second
    is_first = isinstance(first, EngineBusy) or (
        isinstance(second, EngineAbsent) and not isinstance(first, EngineAbsent)
    )
    return first if is_first else second
