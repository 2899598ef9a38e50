"""The use cases of a conversation: reply, reply again, reply twice, rate, compare, correct.

Knows neither Gradio, HTTP, torch nor SQL. An answer is recorded when it is complete (or was stopped), with the
policy that gave it, in one transaction; feedback finds its way back through `Turn.policy_id`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from assistant.admission import Admission, Limits
from assistant.answering import Prompt, Stream, pieces_of
from assistant.engine.errors import NO_POLICYS_FAULT, EngineError, StreamBroken, WrongPolicy
from assistant.engine.protocol import Engine, Sampling
from assistant.release import Release
from assistant.shadow import Shadow
from storage import conversations, feedback, settings
from storage.errors import InvalidField, KotaeError, NotFound
from storage.failures import record_failure
from storage.flusher import Flusher
from storage.records import (
    Comparison,
    Conversation,
    Deployment,
    FailureKind,
    Json,
    Person,
    Turn,
    TurnSource,
    new_id,
    now,
)
from storage.store import Store

T = TypeVar("T")
log = logging.getLogger("kotae.chat")

MAX_MESSAGE_CHARS = 32_768
"""Longer input is refused before the engine sees it (about 8,000 tokens of English)."""
MAX_MESSAGES = 512
DEFAULT_SYSTEM_PROMPT = ""
ORDER_PROPENSITY = 0.5
"""Both orders of a comparison are equally likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What has been answered so far."""

    turn_id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question on its way to a policy."""

    person: Person
    conversation_id: str
    parent_turn_id: str | None
    messages: list[Json]
    source: TurnSource = "chat"
    sampling: Sampling = field(default_factory=Sampling)
    turn_id: str = field(default_factory=lambda: new_id("turn"))
    begins: Conversation | None = None
    """The conversation, where it is kept with this answer only: nobody waits for it before the first token."""

    @property
    def prompt(self) -> Prompt:
        """What the policy is asked."""
        return Prompt(
            messages=self.messages,
            sampling=self.sampling,
            request_id=self.turn_id,
            may_shorten=self.source != "api",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one question, in the order in which they are shown."""

    left: Turn
    right: Turn
    propensity: float = ORDER_PROPENSITY


class Chat:
    """Conversations between people and the served policy."""

    def __init__(
        self, store: Store, engine: Engine, release: Release, *, limits: Limits | None = None
    ) -> None:
        self.store = store
        self.engine = engine
        self.release = release
        self.admission = Admission(limits)
        self.shadow = Shadow(store, release, self.admission)
        self.recording = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recording")
        """One thread, as only one can write at a time: several would wait for each other and read pages anew."""
        self.flusher = Flusher(store.flush)
        self._is_stopped = False

    async def stop(self) -> None:
        """Ask the shadow no more and wait until every answer is recorded."""
        await self.shadow.stop()
        self._is_stopped = True
        await asyncio.to_thread(self.recording.shutdown)
        await asyncio.to_thread(self.flusher.stop)

    # -- asking ---------------------------------------------------------------------------------------

    def ask(
        self, person: Person, conversation: Conversation, question: str, *, sampling: Sampling | None = None
    ) -> Ask:
        """Return the next question of a conversation, with the turns so far as its messages."""
        return self._ask_after(person, conversation.id, conversation.head_turn_id, question, sampling)

    def ask_first(self, person: Person, question: str) -> Ask:
        """Return the first question of a new conversation, which is kept with the answer."""
        begins = conversations.new_conversation(person_id=person.id)
        return replace(self._ask_after(person, begins.id, None, question, None), begins=begins)

    def ask_again(self, person: Person, turn_id: str, *, question: str | None = None) -> Ask:
        """Return the question of an earlier turn again (regenerate), or an edited one in its place."""
        turn = conversations.get_turn(self.store, turn_id)
        conversation = self.conversation(person, turn.conversation_id)
        text = turn.messages[-1]["content"] if question is None else question
        return self._ask_after(person, conversation.id, turn.parent_turn_id, text, None)

    def _ask_after(
        self,
        person: Person,
        conversation_id: str,
        parent_turn_id: str | None,
        question: str,
        sampling: Sampling | None,
    ) -> Ask:
        messages = [*self._history(parent_turn_id), {"role": "user", "content": question}]
        system = settings.get(self.store, "system_prompt", DEFAULT_SYSTEM_PROMPT)
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return Ask(
            person=person,
            conversation_id=conversation_id,
            parent_turn_id=parent_turn_id,
            messages=check_messages(messages),
            sampling=sampling or Sampling(),
        )

    def _history(self, turn_id: str | None) -> list[Json]:
        """Return the messages that lead to and include `turn_id`, oldest first.

        A turn without an answer is left out whole: two questions in a row are refused by many chat templates, and an
        empty answer would only teach the policy to give more of them.
        """
        messages: list[Json] = []
        while turn_id is not None:
            turn = conversations.get_turn(self.store, turn_id)
            if turn.answer.strip():
                messages[:0] = [
                    {"role": "user", "content": turn.messages[-1]["content"]},
                    {"role": "assistant", "content": turn.answer},
                ]
            turn_id = turn.parent_turn_id
        return messages

    def conversation(self, person: Person, conversation_id: str) -> Conversation:
        """Return a conversation of this person; raises NotFound for another's, as for one that is not there."""
        conversation = conversations.get_conversation(self.store, conversation_id)
        if conversation.person_id != person.id:
            raise NotFound("conversation", conversation_id, "open one of your own")
        return conversation

    def conversation_for(self, person: Person, external_id: str | None) -> Conversation:
        """Return the caller's conversation of that name, made on first use; without a name a new one."""
        if external_id is not None:
            known = conversations.conversation_of_external(
                self.store, person_id=person.id, external_id=external_id
            )
            if known is not None:
                return known
        return conversations.create_conversation(self.store, person_id=person.id, external_id=external_id)

    # -- answering ------------------------------------------------------------------------------------

    async def reply(self, ask: Ask) -> AsyncGenerator[Delta | Turn, None]:
        """Stream the answer: `Delta`s with the whole text so far, at last the recorded `Turn`.

        Closing the generator (stop, closed tab) aborts the request and records what was said as
        `cancelled`.

        Raises:
            QueueFull, TooManyAtOnce: too many answers are under way; nothing was asked.
            EngineError: the engine refused or broke; a partial answer is recorded as `error`.
        """
        with (
            self.admission.admit(ask.person.id),
            self.release.lease(ask.conversation_id) as deployment,
        ):
            self.shadow.give_way()
            started = time.monotonic()
            stream = Stream()
            try:
                async with aclosing(pieces_of(self.release, deployment, ask.prompt)) as pieces:
                    async for piece in pieces:
                        stream.add(piece, elapsed_s=time.monotonic() - started)
                        if piece.text:
                            yield Delta(turn_id=ask.turn_id, text=stream.text)
                if stream.finish_reason is None:
                    raise StreamBroken("the engine ended the answer without a finish reason; ask again")
            except BaseException as error:
                cancelled = isinstance(error, (GeneratorExit, asyncio.CancelledError))
                stream.finish_reason = "cancelled" if cancelled else "error"
                fault = fault_of_policy(error, begun=bool(stream.token_ids))
                if stream.token_ids or fault:
                    total_s = time.monotonic() - started
                    record_end = partial(self._record_end, ask, deployment, stream)
                    await self._beside(partial(record_end, fault=fault, total_s=total_s))
                raise
            total_s = time.monotonic() - started
            turn = await self._beside(partial(self._record, ask, deployment, stream, total_s=total_s))
        try:
            yield turn
        finally:  # whoever asked has the whole answer now
            self.shadow.offer(ask.prompt, turn)

    async def _beside(self, work: Callable[[], T]) -> T:
        """Do what writes in its thread, to its end, whoever leaves meanwhile; after `stop` here, where nobody else waits.

        Who leaves may leave again, as a page does that stops its answer and then closes it: what comes after must find the
        turn, so a cancellation waits until it is written.
        """
        if self._is_stopped:
            return work()
        writing = asyncio.get_running_loop().run_in_executor(self.recording, work)
        left: asyncio.CancelledError | None = None
        while not writing.done():
            try:
                await asyncio.wait({writing})
            except asyncio.CancelledError as error:
                left = error
        if left is not None:
            raise left
        return writing.result()

    def _record_end(
        self,
        ask: Ask,
        deployment: Deployment,
        stream: Stream,
        *,
        fault: FailureKind | None,
        total_s: float,
    ) -> None:
        """Store what was said until the answer broke off, and the policy's fault. Never raises: that is told already."""
        try:
            if stream.token_ids:
                self._record(ask, deployment, stream, total_s=total_s)
            if fault:
                record_failure(self.store, policy_id=deployment.policy_id, kind=fault)
        except Exception:
            log.exception("the end of the answer %s was not recorded", ask.turn_id)

    def _record(self, ask: Ask, deployment: Deployment, stream: Stream, *, total_s: float) -> Turn:
        """Store the answered turn and return it."""
        turn = Turn(
            id=ask.turn_id,
            conversation_id=ask.conversation_id,
            parent_turn_id=ask.parent_turn_id,
            person_id=ask.person.id,
            source=ask.source,
            messages=ask.messages,
            answer=stream.text,
            prompt_token_ids=stream.prompt_token_ids,
            answer_token_ids=stream.token_ids,
            policy_id=deployment.policy_id,
            deployment_id=deployment.id,
            sampling=ask.sampling.as_json(),
            finish_reason=stream.finish_reason or "error",
            first_token_s=stream.first_token_s,
            total_s=total_s,
            created_at=now(),
        )
        conversations.record_turn(self.store, turn, begins=ask.begins, durable=self._is_stopped)
        self.flusher.soon()
        return turn

    async def reply_pair(self, ask: Ask) -> Pair:
        """Return two answers of the same policy to one question, sides drawn at random.

        Both are sampled with seeds of their own, so that they differ wherever the policy is undecided.
        """
        asks = [
            replace(
                ask,
                turn_id=new_id("turn"),
                source="compare" if ask.source == "chat" else ask.source,
                sampling=replace(ask.sampling, seed=secrets.randbelow(2**31)),
            )
            for _ in range(2)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.complete(one)) for one in asks]
        except BaseExceptionGroup as failed:
            raise only_error(failed) from failed
        first, second = (task.result() for task in tasks)
        if secrets.randbelow(2):
            first, second = second, first
        return Pair(left=first, right=second)

    async def complete(self, ask: Ask) -> Turn:
        """Return the recorded turn of a whole answer."""
        async with aclosing(self.reply(ask)) as events:
            async for event in events:
                if isinstance(event, Turn):
                    return event
        raise StreamBroken("the answer did not complete; ask again")

    # -- feedback -------------------------------------------------------------------------------------

    def compare(
        self,
        person: Person,
        *,
        left_turn_id: str,
        right_turn_id: str,
        choice: str,
        strength: int | None = None,
        reasons: tuple[str, ...] = (),
    ) -> Comparison:
        """Record which of two answers is better and continue the conversation with it."""
        comparison = feedback.compare(
            self.store,
            left_turn_id=left_turn_id,
            right_turn_id=right_turn_id,
            person_id=person.id,
            choice=choice,  # type: ignore[arg-type]  # checked by storage, which names the field
            strength=strength,
            propensity=ORDER_PROPENSITY,
            reasons=reasons,
        )
        chosen = right_turn_id if comparison.choice == "right" else left_turn_id
        turn = conversations.get_turn(self.store, chosen)
        conversation = conversations.get_conversation(self.store, turn.conversation_id)
        if conversation.person_id == person.id and conversation.head_turn_id in (left_turn_id, right_turn_id):
            conversations.set_head(self.store, conversation.id, turn_id=chosen, actor=person.id)
        return comparison


def fault_of_policy(error: BaseException, *, begun: bool) -> FailureKind | None:
    """Return what speaks against the policy and leaves no turn: neither the question nor an engine that is away."""
    if isinstance(error, WrongPolicy):
        return "wrong_policy"
    is_fault = isinstance(error, EngineError) and not isinstance(error, NO_POLICYS_FAULT)
    return "error" if is_fault and not begun else None


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of Kotae in `group` that says most to a person, else its first error."""
    flat: list[BaseException] = []
    for error in group.exceptions:
        flat.append(only_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in flat if isinstance(error, KotaeError)), flat[0])


def check_messages(messages: list[Json]) -> list[Json]:
    """Return `messages` when they can be answered; an answer of the assistant among them may be empty.

    Raises:
        InvalidField: names the message that is empty, too long or of an unknown role.
    """
    if not messages:
        raise InvalidField("messages", messages, "send at least one message")
    if len(messages) > MAX_MESSAGES:
        raise InvalidField("messages", f"{len(messages)} messages", f"send at most {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if message.get("role") not in ("system", "user", "assistant"):
            raise InvalidField(f"{name}.role", message.get("role"), "use system, user or assistant")
        content = message.get("content")
        if not isinstance(content, str) or not (content.strip() or message["role"] == "assistant"):
            raise InvalidField(f"{name}.content", content, "send some text")
        if len(content) > MAX_MESSAGE_CHARS:
            raise InvalidField(
                f"{name}.content", f"{len(content):,} characters", f"send at most {MAX_MESSAGE_CHARS:,}"
            )
    if messages[-1]["role"] != "user":
        raise InvalidField("messages[-1].role", messages[-1]["role"], "end with a user message")
    return messages
