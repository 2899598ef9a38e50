"""The hash chain of audit events: pure functions of the writer (`store`) and the verifier (`audit`)."""

from __future__ import annotations

from typing import Any

from storage.digests import canonical_json, sha256_of
from storage.errors import InvalidField
from storage.records import AuditEvent, Json

GENESIS = "0" * 64
"""What the first event has in place of its predecessor's digest."""
LONGEST_TEXT = 200
"""Characters of an id, a digest or a name. A longer text in a detail is likely chat, which must not be."""


def link(
    previous: tuple[int, str] | None, *, at: float, actor: str, action: str, subject: str, detail: Json
) -> AuditEvent:
    """Return the event that follows `previous` (its seq and sha256; None for the first)."""
    seq, previous_sha256 = (previous[0] + 1, previous[1]) if previous else (1, GENESIS)
    body = _body(seq, at, actor, action, subject, detail, previous_sha256)
    return AuditEvent(**body, sha256=sha256_of(body))


def event_sha256(event: AuditEvent) -> str:
    """Return the digest that `event` ought to carry."""
    return sha256_of(
        _body(
            event.seq,
            event.at,
            event.actor,
            event.action,
            event.subject,
            event.detail,
            event.previous_sha256,
        )
    )


def check_detail(detail: Json) -> None:
    """Refuse what must not be in an event: long texts, anything that is not JSON.

    Raises:
        InvalidField: naming the key.
    """
    for key, value in detail.items():
        canonical_json(value)
        if any(len(text) > LONGEST_TEXT for text in _texts(value)):
            raise InvalidField(
                key, value, "put ids and numbers into audit details, never chat text or secrets"
            )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []


def _body(
    seq: int, at: float, actor: str, action: str, subject: str, detail: Json, previous_sha256: str
) -> Json:
    return {
        "seq": seq,
        "at": at,
        "actor": actor,
        "action": action,
        "subject": subject,
        "detail": detail,
        "previous_sha256": previous_sha256,
    }
