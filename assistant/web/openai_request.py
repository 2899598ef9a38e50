"""What `POST /v1/chat/completions` takes, read from OpenAI's JSON.

Options that cannot change an answer are accepted and not used, and so are tools that a model may leave alone: stock Open
WebUI offers some with every question. Options that would change the answer, and names nobody knows, are refused: a caller
who is not told believes that they work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from assistant.chat import check_messages
from assistant.engine.protocol import Sampling
from assistant.web.bodies import check_names, flag_of, integer_of, number_of, text_of
from assistant.web.errors import ModelNotFound
from storage.errors import InvalidField
from storage.records import Json

MODEL = "kotae"
MAX_EXTERNAL_ID_CHARS = 200
MAX_ANSWER_TOKENS = 1_000_000
"""Only keeps numbers sane; the engine refuses what does not fit its context."""
MAX_STOPS, MAX_STOP_CHARS = 4, 200
"""OpenAI's limit on stop sequences; a length that no real one reaches."""
SEED_LIMIT = 2**63

USED = (
    "messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "seed", "stop", "user",
)  # fmt: skip
HARMLESS = (
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip
OFFERED = ("tools", "functions")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Options that Kotae does not have, each with the values that ask for nothing. null is always one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A question of an API caller."""

    messages: list[Json]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    external_id: str | None = None
    """The caller's name of the conversation, which keeps it on its policy."""


def read_completion(body: Json, header_id: str | None) -> CompletionRequest:
    """Return what `body` asks for; `header_id` is X-Conversation-Id and goes before `user`.

    Raises:
        InvalidField: names field, value and fix.
        ModelNotFound: another model than ours.
    """
    check_model(body.get("model"))
    check_names(body, (*USED, *HARMLESS, *OFFERED, *NEUTRAL))
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(_same(value, one) for one in neutral):
            raise InvalidField(name, value, "Kotae does not have this option; leave it out")
    for name in OFFERED:
        if not isinstance(body.get(name) or [], list):
            raise InvalidField(name, body[name], "send a list; no tool is ever called")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidField("stream_options", options, 'send {"include_usage": true} or leave it out')
    return CompletionRequest(
        messages=check_messages(read_messages(body.get("messages"))),
        sampling=read_sampling(body),
        stream=flag_of(body, "stream"),
        include_usage=flag_of(options, "include_usage"),
        external_id=_external_id(body, header_id),
    )


def check_model(name: object) -> None:
    """Raise ModelNotFound unless `name` is our model's, or none was named."""
    if name is not None and name != MODEL:
        raise ModelNotFound(
            "model", name, f"use {MODEL!r} or leave it out; Kotae decides which policy answers"
        )


def read_sampling(body: Json) -> Sampling:
    """Return how the answer is to be drawn; what was not said stays at Kotae's defaults."""
    usual = Sampling()
    limit = integer_of(body, "max_completion_tokens", low=1, high=MAX_ANSWER_TOKENS)
    if limit is None:
        limit = integer_of(body, "max_tokens", low=1, high=MAX_ANSWER_TOKENS)
    temperature = number_of(body, "temperature", low=0, high=2)
    top_p = number_of(body, "top_p", low=0, high=1)
    if top_p == 0:
        raise InvalidField(
            "top_p", top_p, "send a number above 0 and up to 1; for greedy answers temperature 0"
        )
    return Sampling(
        temperature=usual.temperature if temperature is None else temperature,
        top_p=usual.top_p if top_p is None else top_p,
        max_tokens=usual.max_tokens if limit is None else limit,
        seed=integer_of(body, "seed", low=-SEED_LIMIT, high=SEED_LIMIT - 1),
        stop=_stops(body.get("stop")),
    )


def read_messages(value: object) -> list[Json]:
    """Return the messages with role and text only; `developer` is OpenAI's newer word for `system`.

    An answer without text is an empty one: it was stopped before its first word.
    """
    if not isinstance(value, list):
        raise InvalidField("messages", value, 'send a list: [{"role": "user", "content": "..."}]')
    messages = []
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidField(name, message, 'send {"role": "user", "content": "..."}')
        for field in ("tool_calls", "function_call", "audio"):
            if message.get(field):
                raise InvalidField(f"{name}.{field}", message[field], "Kotae reads text only; leave it out")
        role = message.get("role")
        role = "system" if role == "developer" else role
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        messages.append({"role": role, "content": _text(f"{name}.content", content)})
    return messages


def _text(name: str, content: object) -> object:
    """Return a message's text; what is neither text nor parts of it is left for `check_messages` to
    refuse."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise InvalidField(f"{name}[{index}]", kind, 'send text only: {"type": "text", "text": "..."}')
        texts.append(text)
    return "\n".join(texts)


def _same(value: object, neutral: object) -> bool:
    """Tell whether the two are equal, without taking true for 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    usable = isinstance(stops, list) and all(
        isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops
    )
    if not usable or not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise InvalidField("stop", value, f"send a text or up to {MAX_STOPS} of them, not empty ones")
    return tuple(stops)


def _external_id(body: Json, header_id: str | None) -> str | None:
    """Return the caller's name of the conversation; an empty one is none."""
    user = text_of(body, "user", default="", max_chars=MAX_EXTERNAL_ID_CHARS)
    if header_id is not None and len(header_id) > MAX_EXTERNAL_ID_CHARS:
        raise InvalidField("X-Conversation-Id", header_id, f"send at most {MAX_EXTERNAL_ID_CHARS} characters")
    return header_id or user or None
