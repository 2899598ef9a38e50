"""What an engine must do: one protocol, implemented by vLLM over HTTP and by transformers in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from storage.records import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn. `temperature` 0 is greedy; `max_tokens` counts the answer only."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def as_json(self) -> Json:
        """Return it as it is stored with a turn."""
        return {**asdict(self), "stop": list(self.stop)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One step of a stream: new text and the token ids behind it."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] | None = None
    """On the first piece: the prompt as the engine rendered it."""
    finish_reason: Literal["stop", "length"] | None = None
    """On the last piece."""
    served_by: str
    """The model name that the engine says answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """A greedy answer with the log-probability (nats) of each of its tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    in_float32: bool = False
    """Whether the engine is known to compute in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the engine can answer, and in words why not."""

    ready: bool
    detail: str
    policies: frozenset[str] = frozenset()
    """What at least one of its servers can answer now, the base among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """How busy one server of an engine is. None where it does not tell."""

    replica: str
    """Its address, or where it runs."""
    up: bool
    """Whether it answered when it was last asked."""
    running: int | None = None
    waiting: int | None = None


class Probe(Protocol):
    """Asks one server what `Engine.probe` asks any of them."""

    def __call__(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> Awaitable[ProbeResult]:
        """Return a greedy answer with its log-probs."""
        ...


Judge = Callable[[str, Probe], Awaitable[None]]
"""Asks the server of that name, and raises what speaks against its answers."""


class Engine(Protocol):
    """Answers questions with the base model or with one of the adapters loaded beside it."""

    base_name: str
    """The name under which the base answers: the id of the base policy."""

    def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncIterator[Piece]:
        """Stream an answer. Closing the iterator early aborts the request upstream.

        Raises:
            EngineUnavailable, EngineBusy, PolicyNotLoaded, ContextTooLong, StreamBroken, WrongPolicy.
        """
        ...

    async def load(self, *, policy_id: str, adapter: Path) -> None:
        """Make an adapter answer under `policy_id`; loading it twice is fine.

        Raises:
            AdapterRefused: the engine does not take these files; as LoadFailed, perhaps only for now.
            EngineUnavailable: nobody answered.
        """
        ...

    async def unload(self, policy_id: str) -> None:
        """Forget an adapter; one that is not loaded is fine."""
        ...

    async def loaded(self) -> frozenset[str]:
        """Return the names that every server that answers has, the base among them: what needs no loading."""
        ...

    async def held(self) -> frozenset[str]:
        """Return the names that at least one server that answers has, the base among them: what may be unloaded."""
        ...

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return a greedy answer with its log-probs, for the behaviour gate."""
        ...

    async def prove(self, policy_id: str, judge: Judge) -> None:
        """Let `judge` ask every server that has the policy; one that did not pass gets none of its questions from then on.

        Raises:
            ReplicaAtFault: it passed on one server and not on another.
            NotProven: it failed on all that could be asked, and another server is away or does not have it.
            KotaeError: what `judge` raised, where it passed on none.
        """
        ...

    def awaits_proof(self, policy_id: str) -> bool:
        """Return whether a policy passed or failed somewhere, and a server that did not pass is to be asked now."""
        ...

    async def health(self) -> Health:
        """Say whether the engine can answer; never raises."""
        ...

    async def queues(self) -> list[Queue]:
        """Say for each server how many answers it makes and holds waiting; never raises."""
        ...

    async def close(self) -> None:
        """Release connections, threads and processes."""
        ...
