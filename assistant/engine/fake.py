"""An engine that needs no model: it says what it was told to, for tests and for trying out the pages.

It ships with the product. `enqueue` puts answers in line; without any it repeats the question, differently
for each policy, so that the behaviour gate sees a difference. Equal calls give equal answers, token ids
included.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from pathlib import Path

from assistant.engine.errors import ContextTooLong, EngineAbsent, PolicyNotLoaded
from assistant.engine.protocol import Health, Judge, Piece, ProbeResult, Queue, Sampling
from storage.records import Json

Answer = str | Exception | tuple[str | Exception, ...]
"""A text, an error, or pieces of text in which an error may follow."""
END_TOKEN_ID = 0
DEFAULT_CONTEXT_TOKENS = 4096


class FakeEngine:
    """Answers from a queue. `calls` and `aborted` tell what was asked and what was not heard to its end."""

    def __init__(
        self,
        *,
        base_name: str = "policy-base-00000000",
        delay_s: float = 0.0,
        context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    ) -> None:
        self.base_name = base_name
        self.delay_s = delay_s
        """Pause before each piece, in seconds."""
        self.context_tokens = context_tokens
        self.adapters: dict[str, Path] = {}
        self.calls: list[Json] = []
        self.aborted: list[str] = []
        self.health_now = Health(ready=True, detail="the fake engine is always ready")
        self.queues_now = [Queue(replica="fake", up=True, running=0, waiting=0)]
        self.closed = False
        self._queue: deque[Answer] = deque()

    def enqueue(self, answers: Iterable[Answer]) -> None:
        """Give the next answers, one for each question to come."""
        self._queue.extend(answers)

    async def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        """Stream the next answer word by word; see `Engine.stream`."""
        prompt_token_ids = self._prompt(policy_id, messages, sampling)
        self.calls.append(
            {"policy_id": policy_id, "messages": messages, "sampling": sampling, "request_id": request_id}
        )
        words = self._words(policy_id, messages, sampling)
        finished, count = False, 0
        first: tuple[int, ...] | None = prompt_token_ids
        try:
            for word in words:
                await asyncio.sleep(self.delay_s)
                if isinstance(word, Exception):
                    finished = True
                    raise word
                if count == sampling.max_tokens:
                    yield Piece(prompt_token_ids=first, finish_reason="length", served_by=policy_id)
                    finished = True
                    return
                yield Piece(
                    text=word, token_ids=(token_id(word),), prompt_token_ids=first, served_by=policy_id
                )
                first, count = None, count + 1
            finished = True
            yield Piece(
                token_ids=(END_TOKEN_ID,),
                prompt_token_ids=first,
                finish_reason="stop",
                served_by=policy_id,
            )
        finally:
            if not finished:
                self.aborted.append(request_id)

    async def load(self, *, policy_id: str, adapter: Path) -> None:
        """Remember the adapter; its files are not read."""
        self._check_open()
        self.adapters[policy_id] = adapter

    async def unload(self, policy_id: str) -> None:
        """Forget the adapter."""
        self.adapters.pop(policy_id, None)

    async def loaded(self) -> frozenset[str]:
        """Return the base and the adapters."""
        self._check_open()
        return frozenset({self.base_name, *self.adapters})

    async def held(self) -> frozenset[str]:
        """As `loaded`: this is the only server."""
        return await self.loaded()

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        """Return the answer that is given without a queue, with log-probs that differ by policy."""
        self._check_known(policy_id)
        words = split_words(default_answer(self._flavour(policy_id), messages, Sampling()))[:max_tokens]
        logprobs = tuple(-(1 + _number(f"{policy_id}\0{word}") % 1000) / 1000 for word in words)
        return ProbeResult(
            text="".join(words),
            token_ids=tuple(token_id(word) for word in words),
            logprobs=logprobs,
            in_float32=True,
        )

    async def prove(self, policy_id: str, judge: Judge) -> None:
        """Let `judge` ask this one server. See `Engine.prove`."""
        await judge("fake", self.probe)

    def awaits_proof(self, policy_id: str) -> bool:
        """Return False: no server joins later."""
        return False

    async def health(self) -> Health:
        """Return `health_now` with what is loaded, or that it is closed."""
        if self.closed:
            return Health(ready=False, detail="the engine is closed")
        return replace(self.health_now, policies=frozenset({self.base_name, *self.adapters}))

    async def queues(self) -> list[Queue]:
        """Return `queues_now`."""
        return self.queues_now

    async def close(self) -> None:
        """Refuse further questions."""
        self.closed = True

    def _prompt(self, policy_id: str, messages: list[Json], sampling: Sampling) -> tuple[int, ...]:
        self._check_known(policy_id)
        words = [
            word for message in messages for word in split_words(f"{message['role']} {message['content']}")
        ]
        if len(words) + sampling.max_tokens > self.context_tokens:
            raise ContextTooLong(len(words) + sampling.max_tokens, self.context_tokens)
        return tuple(token_id(word) for word in words)

    def _words(self, policy_id: str, messages: list[Json], sampling: Sampling) -> list[str | Exception]:
        answer = self._queue.popleft() if self._queue else None
        if isinstance(answer, tuple):
            return list(answer)
        if isinstance(answer, Exception):
            return [answer]
        text = default_answer(self._flavour(policy_id), messages, sampling) if answer is None else answer
        return list(split_words(cut_at_stop(text, sampling.stop)))

    def _flavour(self, policy_id: str) -> str:
        return "" if policy_id == self.base_name else f" ({policy_id})"

    def _check_open(self) -> None:
        if self.closed:
            raise EngineAbsent("the engine is closed")

    def _check_known(self, policy_id: str) -> None:
        self._check_open()
        if policy_id != self.base_name and policy_id not in self.adapters:
            raise PolicyNotLoaded(policy_id)


def default_answer(flavour: str, messages: list[Json], sampling: Sampling) -> str:
    """Return the answer to `messages` when none is in line; another seed words it differently."""
    greeting = ("Of course.", "Gladly.", "Sure.")[(sampling.seed or 0) % 3]
    return f"{greeting} You asked{flavour}: {messages[-1]['content']}"


def split_words(text: str) -> list[str]:
    """Return `text` in pieces that join to it again: words with the spaces before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """Return `text` up to the first of the stop sequences."""
    ends = [at for sequence in stop if (at := text.find(sequence)) >= 0]
    return text[: min(ends)] if ends else text


def token_id(word: str) -> int:
    """Return the id of a word: the same one always, never that of the end token."""
    return 1 + _number(word) % 50_000


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
