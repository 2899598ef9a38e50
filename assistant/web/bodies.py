"""Reading JSON requests: each field is checked, and what is wrong is said with name, value and fix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from fastapi import Request
from starlette.types import Receive

from assistant.web.errors import ClientGone
from storage.errors import InvalidField
from storage.records import Json

MAX_ID_CHARS = 100


async def read_json(request: Request) -> Json:
    """Return the JSON object a request brought.

    Raises:
        InvalidField: it is no JSON object, or holds text that cannot be stored.
        BodyTooLarge: from the middleware that counts while this reads.
        ClientGone: the client closed the connection.
    """
    raw = await _read(request.receive)
    try:
        body = orjson.loads(raw)  # refuses half a surrogate pair and NaN, too
    except ValueError as error:
        shown = raw[:200].decode("utf-8", "replace")
        raise InvalidField("body", shown, f"send a JSON object in UTF-8 ({error})") from error
    if not isinstance(body, dict):
        raise InvalidField("body", body, "send a JSON object: {...}")
    return body


async def _read(receive: Receive) -> bytes:
    """Return the whole body, without what Starlette's `Request.body` does for those who read it twice."""
    message, parts = await receive(), []
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
    raise ClientGone("connection: closed before the request was complete")


def check_names(body: Json, known: Iterable[str]) -> None:
    """Raise InvalidField for a field nobody knows: most likely a misspelt one."""
    names = tuple(known)
    for name, value in body.items():
        if name not in names:
            raise InvalidField(name[:MAX_ID_CHARS], value, f"leave it out; known are {', '.join(names)}")


def text_of(body: Json, name: str, *, default: str | None = None, max_chars: int) -> str:
    """Return a text field; without a default it must be there and not be blank."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise InvalidField(name, value, "send a text" if value is not None else "it is missing; send a text")
    if len(value) > max_chars:
        raise InvalidField(name, f"{len(value):,} characters", f"send at most {max_chars:,}")
    return value


def choice_of(body: Json, name: str, choices: tuple[str, ...]) -> str:
    """Return a field that holds one of `choices`."""
    value = body.get(name)
    if not isinstance(value, str) or value not in choices:
        raise InvalidField(name, value, f"send one of {', '.join(choices)}")
    return value


def texts_of(body: Json, name: str, *, max_count: int, max_chars: int) -> tuple[str, ...]:
    """Return a field that holds a list of texts; missing or null is an empty one."""
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidField(name, value, "send a list of texts")
    if len(value) > max_count or any(len(one) > max_chars for one in value):
        raise InvalidField(name, value, f"send at most {max_count} texts of at most {max_chars} characters")
    return tuple(value)


def integer_of(body: Json, name: str, *, low: int, high: int) -> int | None:
    """Return a whole number between `low` and `high`; None when it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidField(name, value, f"send a whole number from {low} to {high}")
    return value


def number_of(body: Json, name: str, *, low: float, high: float) -> float | None:
    """Return a number between `low` and `high`; None when it is missing or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidField(name, value, f"send a number from {low:g} to {high:g}")
    return float(value)


def flag_of(body: Json, name: str) -> bool:
    """Return a true/false field; missing or null is false."""
    value: Any = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidField(name, value, "send true or false")
    return value
