"""One answer of one policy as it streams in, whoever asked for it: a person's question or the shadow's copy of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate

from assistant.engine.errors import ContextTooLong, PolicyNotLoaded, WrongPolicy
from assistant.engine.protocol import Piece, Sampling
from assistant.release import Release
from storage.records import Deployment, FinishReason, Json

MARKS_BYTES = 16
"""What a chat template puts around a message, about: ChatML's five tokens at some three bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a policy is asked."""

    messages: list[Json]
    sampling: Sampling
    request_id: str
    may_shorten: bool
    """Whether a dialogue that outgrew the context loses its oldest turns; False refuses it."""


@dataclass(slots=True)
class Stream:
    """What one stream has brought so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None

    def add(self, piece: Piece, *, elapsed_s: float) -> None:
        """Take in one piece that came after so many seconds."""
        if self.first_token_s is None and (piece.text or piece.token_ids):
            self.first_token_s = elapsed_s
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        if piece.prompt_token_ids is not None:
            self.prompt_token_ids = list(piece.prompt_token_ids)
        self.finish_reason = piece.finish_reason or self.finish_reason


async def pieces_of(release: Release, deployment: Deployment, prompt: Prompt) -> AsyncGenerator[Piece, None]:
    """Yield the engine's pieces; a dialogue that outgrew the context loses its oldest turns first.

    Both errors that are mended here come before the first piece.
    """
    messages, reloaded = prompt.messages, False
    while True:
        try:
            stream: AsyncIterator[Piece] = release.engine.stream(
                policy_id=deployment.policy_id,
                messages=messages,
                sampling=prompt.sampling,
                request_id=prompt.request_id,
            )
            async with aclosing(stream) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if piece.served_by != deployment.policy_id:
                        raise WrongPolicy(
                            f"policy: {piece.served_by!r} answered instead of {deployment.policy_id!r}; ask again"
                        )
                    yield piece
            return
        except PolicyNotLoaded:  # the engine restarted and has lost its adapters
            if reloaded:
                raise
            reloaded = True
            await release.put_back(deployment.policy_id)
        except ContextTooLong as refusal:
            shorter = drop_oldest_turns(messages, refusal)
            if not prompt.may_shorten or shorter is None:
                raise
            messages = shorter


def drop_oldest_turns(messages: list[Json], refusal: ContextTooLong) -> list[Json] | None:
    """Return `messages` without the oldest questions and answers that are too many; None when only the question is left.

    As many go at once as make up the excess by their share of the bytes, so that a long dialogue takes a few
    requests and not one for each turn; half of them where the engine does not say by how much it is too long.
    """
    system = [message for message in messages if message["role"] == "system"]
    rest = messages[len(system) :]
    turns = (len(rest) - 1) // 2
    if turns == 0:
        return None
    drop = (turns + 1) // 2
    if refusal.tokens and refusal.limit:
        sizes = [len(message["content"].encode()) + MARKS_BYTES for message in messages]
        freed = list(accumulate(sizes[len(system) :]))[1::2]  # bytes of the first 1, 2, … turns
        excess = sum(sizes) * (refusal.tokens - refusal.limit + 1) / refusal.tokens
        drop = min(bisect_left(freed, excess) + 1, turns)
    return [*system, *rest[2 * drop :]]
