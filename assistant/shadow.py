"""Asks the shadow what a person has just been answered, when the engine has room; nobody ever sees or waits for it.

A question that finds no room, or whose room is taken by a person meanwhile, is skipped: it leaves no row, and is counted as
a drawn question without one. At most one question is with the shadow at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import replace

from assistant.admission import Admission
from assistant.answering import Prompt, Stream, pieces_of
from assistant.engine.errors import NO_POLICYS_FAULT, EngineError, WrongPolicy
from assistant.release import Release
from storage.records import Deployment, ShadowAnswer, ShadowFinish, Turn, new_id, now
from storage.shadows import record_shadow_answer
from storage.store import Store

log = logging.getLogger("kotae.shadow")

TIMEOUT_S = 60.0
"""An answer that takes longer has failed: the engine's, where it has room, take seconds."""


class Shadow:
    """The one question that is with the shadow, or none."""

    def __init__(self, store: Store, release: Release, admission: Admission) -> None:
        self.store = store
        self.release = release
        self.admission = admission
        self.timeout_s = TIMEOUT_S
        self.asking: asyncio.Task[None] | None = None

    def offer(self, prompt: Prompt, turn: Turn) -> None:
        """Ask the shadow too, if this conversation is drawn and there is room; returns at once and raises nothing.

        Only what stable answered is asked again, so that the shadow is compared with one policy.
        """
        shadow = self.release.shadow_of(turn.conversation_id)
        if shadow is None or turn.policy_id != self.release.served.stable.policy_id:
            return
        if (self.asking is None or self.asking.done()) and self._has_place():
            self.asking = asyncio.create_task(self._ask(shadow, prompt, turn), name="shadow.ask")

    def give_way(self) -> None:
        """Break off the shadow's answer when a person's takes its room."""
        if self.asking is not None and not self._has_place():
            self.asking.cancel()

    async def stop(self) -> None:
        """Break off the shadow's answer, because the server ends."""
        if self.asking is not None:
            self.asking.cancel()
            with suppress(asyncio.CancelledError):
                await self.asking

    def _has_place(self) -> bool:
        return self.admission.under_way < self.admission.limits.shadow_below

    async def _engine_has_room(self) -> bool:
        """Ask the engine itself: others may use it too. What a server does not tell counts as nothing."""
        queues = await self.release.engine.queues()
        running = sum(queue.running or 0 for queue in queues)
        return not any(queue.waiting for queue in queues) and running < self.admission.limits.shadow_below

    async def _ask(self, shadow: Deployment, prompt: Prompt, turn: Turn) -> None:
        try:
            if await self._engine_has_room():
                answer = await self._answer(shadow, replace(prompt, request_id=new_id("shadow")), turn)
                await asyncio.to_thread(record_shadow_answer, self.store, answer)
        except NO_POLICYS_FAULT as error:
            log.info("the shadow was not asked: %s", error)
        except Exception:
            log.exception("asking the shadow failed")

    async def _answer(self, shadow: Deployment, prompt: Prompt, turn: Turn) -> ShadowAnswer:
        """Return the shadow's answer, or how it failed.

        Raises:
            ContextTooLong, EngineBusy, EngineAbsent: the question, the load or an absent engine is to blame.
        """
        started, stream = time.monotonic(), Stream()
        finish = await self._listen(stream, shadow, prompt)
        return ShadowAnswer(
            id=prompt.request_id,
            turn_id=turn.id,
            deployment_id=shadow.id,
            answer=stream.text,
            prompt_token_ids=stream.prompt_token_ids,
            answer_token_ids=stream.token_ids,
            finish_reason=finish,
            first_token_s=stream.first_token_s,
            total_s=time.monotonic() - started,
            created_at=now(),
        )

    async def _listen(self, stream: Stream, shadow: Deployment, prompt: Prompt) -> ShadowFinish:
        """Take the whole answer into `stream` and return how it ended."""
        started = time.monotonic()
        try:
            with self.release.using(shadow):
                async with (
                    asyncio.timeout(self.timeout_s),
                    aclosing(pieces_of(self.release, shadow, prompt)) as pieces,
                ):
                    async for piece in pieces:
                        stream.add(piece, elapsed_s=time.monotonic() - started)
        except NO_POLICYS_FAULT:
            raise
        except (EngineError, TimeoutError) as error:
            log.warning("the shadow %s failed: %s", shadow.policy_id, error or "no answer in time")
            return "wrong_policy" if isinstance(error, WrongPolicy) else "error"
        return stream.finish_reason if stream.finish_reason in ("stop", "length") else "error"
