"""Feedback from other programs, such as the company's help desk: ratings, comparisons, corrections.

The turn ids are the `id`s of the answers of `/v1/chat/completions`. A comparison needs two answers to one
question in one conversation: `POST /api/pairs` is how a program gets them. Everything is answered with 201
and the record's id; sending the same again returns the record that is there.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from assistant.web.bodies import (
    MAX_ID_CHARS,
    check_names,
    choice_of,
    integer_of,
    read_json,
    text_of,
    texts_of,
)
from assistant.web.openai_api import CONVERSATION_HEADER, make_ask, usage
from assistant.web.openai_request import read_completion
from assistant.web.services import Services
from assistant.web.sessions import Sessions, caller
from assistant.web.streams import unless_gone
from storage import feedback
from storage.errors import InvalidField
from storage.records import Choice, Comparison, Correction, Json, Rating, Turn, Verdict

MAX_COMMENT_CHARS = 4_000
MAX_CORRECTION_CHARS = 32_768
"""As long as a message may be (`assistant.chat.MAX_MESSAGE_CHARS`)."""
MAX_REASONS, MAX_REASON_CHARS = 20, 100


class FeedbackApi:
    """The routes under /api."""

    def __init__(self, services: Services, sessions: Sessions) -> None:
        self.services = services
        self.sessions = sessions

    def router(self) -> APIRouter:
        """Return the routes, to be included before the mounts."""
        router = APIRouter(prefix="/api")
        for path, handler in (
            ("/ratings", self.rate),
            ("/pairs", self.answer_twice),
            ("/comparisons", self.compare),
            ("/corrections", self.correct),
        ):
            router.add_api_route(path, handler, methods=["POST"], status_code=201, response_model=None)
        return router

    async def rate(self, request: Request) -> JSONResponse:
        """Keep a thumb: `{turn_id, verdict: up | down | retracted, reasons: [...], comment}`.

        A person's last one on a turn counts; `retracted` takes it back.
        """
        person = caller(request, self.sessions)
        body = await read_json(request)
        check_names(body, ("turn_id", "verdict", "reasons", "comment"))
        kept = await asyncio.to_thread(
            feedback.rate,
            self.services.store,
            turn_id=_turn_id(body, "turn_id"),
            person_id=person.id,
            verdict=choice_of(body, "verdict", get_args(Verdict)),  # type: ignore[arg-type]  # just checked
            reasons=_reasons(body),
            comment=text_of(body, "comment", default="", max_chars=MAX_COMMENT_CHARS),
        )
        return stored(kept)

    async def answer_twice(self, request: Request) -> JSONResponse:
        """Answer one question twice, for `POST /api/comparisons`.

        Takes what `/v1/chat/completions` takes (`{messages, temperature, max_tokens, user, ...}`, no stream
        and no seed: each answer has its own). Returns `{"left": {"turn_id", "answer", ...}, "right": {...}}`
        with the sides drawn at random: show them in that order.
        """
        person = caller(request, self.sessions)
        body = await read_json(request)
        asked = read_completion(body, request.headers.get(CONVERSATION_HEADER))
        if asked.stream:
            raise InvalidField("stream", True, "leave it out: both answers are shown together")
        if asked.sampling.seed is not None:
            raise InvalidField("seed", asked.sampling.seed, "leave it out: each answer has its own")
        ask = await asyncio.to_thread(make_ask, self.services, person, asked)
        pair = await unless_gone(request, self.services.chat.reply_pair(ask))
        return JSONResponse({"left": _side(pair.left), "right": _side(pair.right)}, status_code=201)

    async def compare(self, request: Request) -> JSONResponse:
        """Keep a choice: `{left_turn_id, right_turn_id, choice, strength, reasons}`.

        `choice` is left, right, tie or both_bad; `strength` is 1 slightly, 2 clearly, 3 much better, only
        with a winner. The conversation goes on with the better answer.
        """
        person = caller(request, self.sessions)
        body = await read_json(request)
        check_names(body, ("left_turn_id", "right_turn_id", "choice", "strength", "reasons"))
        kept = await asyncio.to_thread(
            self.services.chat.compare,
            person,
            left_turn_id=_turn_id(body, "left_turn_id"),
            right_turn_id=_turn_id(body, "right_turn_id"),
            choice=choice_of(body, "choice", get_args(Choice)),
            strength=integer_of(body, "strength", low=1, high=3),
            reasons=_reasons(body),
        )
        return stored(kept)

    async def correct(self, request: Request) -> JSONResponse:
        """Keep an answer as the person would have written it: `{turn_id, text}`."""
        person = caller(request, self.sessions)
        body = await read_json(request)
        check_names(body, ("turn_id", "text"))
        kept = await asyncio.to_thread(
            feedback.correct,
            self.services.store,
            turn_id=_turn_id(body, "turn_id"),
            person_id=person.id,
            edited=text_of(body, "text", max_chars=MAX_CORRECTION_CHARS),
        )
        return stored(kept)


def stored(record: Rating | Comparison | Correction) -> JSONResponse:
    """Return 201 with the record as it is stored."""
    return JSONResponse(asdict(record), status_code=201)


def _turn_id(body: Json, name: str) -> str:
    return text_of(body, name, max_chars=MAX_ID_CHARS)


def _reasons(body: Json) -> tuple[str, ...]:
    return texts_of(body, "reasons", max_count=MAX_REASONS, max_chars=MAX_REASON_CHARS)


def _side(turn: Turn) -> Json:
    return {
        "turn_id": turn.id,
        "answer": turn.answer,
        "finish_reason": turn.finish_reason,
        "usage": usage(turn),
    }
