"""The assistant for other programs, in the form of OpenAI's chat completions.

`id` of an answer is its turn: ratings, comparisons and corrections name it. `system_fingerprint` is the
policy that answered. Messages are sent to the policy as they came; the system prompt of the pages is not
added.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from assistant.chat import Ask, Delta
from assistant.web.bodies import read_json
from assistant.web.errors import error_body
from assistant.web.openai_request import MODEL, CompletionRequest, check_model, read_completion
from assistant.web.services import Services
from assistant.web.sessions import Sessions, caller
from assistant.web.streams import DONE, EventStream, sse, unless_gone
from storage import conversations
from storage.errors import Conflict, KotaeError
from storage.records import Conversation, Json, Person, Turn

log = logging.getLogger("kotae.web")

COMPLETIONS = "/v1/chat/completions"
CONVERSATION_HEADER = "x-conversation-id"
EARLIER_TURNS = 32
"""How far back the turn that a dialogue continues is looked for."""

Events = AsyncGenerator[Delta | Turn, None]


class OpenAiApi:
    """The routes under /v1."""

    def __init__(self, services: Services, sessions: Sessions) -> None:
        self.services = services
        self.sessions = sessions
        self.started_at = int(time.time())

    def router(self) -> APIRouter:
        """Return the routes, to be included before the mounts."""
        router = APIRouter(prefix="/v1")
        # A POST takes the shortcut (`assistant.web.shortcut`); the route tells of other methods (`other_paths`).
        router.add_route(COMPLETIONS, self.complete, methods=["POST"])
        router.add_api_route("/models", self.list_models, methods=["GET"], response_model=None)
        router.add_api_route("/models/{name}", self.show_model, methods=["GET"], response_model=None)
        return router

    async def list_models(self, request: Request) -> Json:
        """Return the one model there is."""
        caller(request, self.sessions)
        return {"object": "list", "data": [self._model()]}

    async def show_model(self, request: Request, name: str) -> Json:
        """Return the model of that name."""
        caller(request, self.sessions)
        check_model(name)
        return self._model()

    async def complete(self, request: Request) -> Response:
        """Answer the last message, whole or as a stream."""
        person = caller(request, self.sessions)
        asked = read_completion(await read_json(request), request.headers.get(CONVERSATION_HEADER))
        ask = (
            first_ask(person, asked)
            if asked.external_id is None
            else await asyncio.to_thread(make_ask, self.services, person, asked)
        )
        if not asked.stream:
            turn = await unless_gone(request, self.services.chat.complete(ask))
            return JSONResponse(completion(turn))
        events = self.services.chat.reply(ask)
        return EventStream(stream_chunks(ask, events, include_usage=asked.include_usage))

    def _model(self) -> Json:
        return {"id": MODEL, "object": "model", "created": self.started_at, "owned_by": "kotae"}


def first_ask(person: Person, asked: CompletionRequest) -> Ask:
    """Return the question of a caller who names no conversation: it begins one, and storage is not asked."""
    begins = conversations.new_conversation(person_id=person.id)
    return Ask(
        person=person,
        conversation_id=begins.id,
        parent_turn_id=None,
        messages=asked.messages,
        source="api",
        sampling=asked.sampling,
        begins=begins,
    )


def make_ask(services: Services, person: Person, asked: CompletionRequest) -> Ask:
    """Return the question in its conversation, after the turn it continues."""
    try:
        conversation = services.chat.conversation_for(person, asked.external_id)
    except Conflict:  # another request made it a moment ago
        conversation = services.chat.conversation_for(person, asked.external_id)
    return Ask(
        person=person,
        conversation_id=conversation.id,
        parent_turn_id=continued_turn(services, conversation, asked.messages),
        messages=asked.messages,
        source="api",
        sampling=asked.sampling,
    )


def continued_turn(services: Services, conversation: Conversation, messages: list[Json]) -> str | None:
    """Return the latest shown turn whose question and answer stand last before the question; None if none does.

    Chat pages send along what was stopped before its first word and left no turn: a question without an answer, or with
    an empty one.
    """
    before = messages[:-1]
    while len(before) > 1:
        answered = before[-1]["role"] == "assistant"
        if answered:
            found = _turn_of(services, conversation, before[-2]["content"], before[-1]["content"])
            if found or before[-1]["content"]:
                return found
        before = before[: -2 if answered else -1]
    return None


def _turn_of(services: Services, conversation: Conversation, question: str, answer: str) -> str | None:
    """Return the latest shown turn with this question and answer."""
    turn_id = conversation.head_turn_id
    for _ in range(EARLIER_TURNS):
        if turn_id is None:
            return None
        turn = conversations.get_turn(services.store, turn_id)
        if turn.answer == answer and turn.messages[-1]["content"] == question:
            return turn.id
        turn_id = turn.parent_turn_id
    return None


def completion(turn: Turn) -> Json:
    """Return a recorded answer as OpenAI's `chat.completion`."""
    message = {"role": "assistant", "content": turn.answer, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": turn.finish_reason}
    return {
        "id": turn.id,
        "object": "chat.completion",
        "created": int(turn.created_at),
        "model": MODEL,
        "choices": [choice],
        "usage": usage(turn),
        "system_fingerprint": turn.policy_id,
    }


def usage(turn: Turn) -> Json:
    """Return how many tokens went in and came out, the end of the answer included."""
    prompt, answer = len(turn.prompt_token_ids), len(turn.answer_token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


async def stream_chunks(ask: Ask, events: Events, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of an answer: role, pieces of text, finish reason, usage when wanted,
    [DONE].

    An error after the first token can only be told inside the stream; clients raise it as an APIError.
    """
    created, sent = int(time.time()), 0

    def chunk(delta: Json, *, finish_reason: str | None = None, policy_id: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        last = {"usage": None} if include_usage else {}
        return _chunk(ask.turn_id, created, [choice], policy_id) | last

    ready = sse(chunk({"role": "assistant", "content": ""}))  # goes out with what follows: writes cost
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Delta):
                    yield ready + sse(chunk({"content": event.text[sent:]}))
                    ready, sent = b"", len(event.text)
                    continue
                ready += sse(chunk({}, finish_reason=event.finish_reason, policy_id=event.policy_id))
                if include_usage:
                    ready += sse(_chunk(ask.turn_id, created, [], event.policy_id) | {"usage": usage(event)})
    except Exception as error:
        if not sent:
            raise
        if not isinstance(error, KotaeError):
            log.exception("an answer broke off")
        ready += sse(error_body(error))
    yield ready + DONE


def _chunk(id: str, created: int, choices: list[Json], policy_id: str | None) -> Json:
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": MODEL,
        "system_fingerprint": policy_id,
        "choices": choices,
    }
