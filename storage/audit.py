"""Reading and verifying the audit log.

Each event carries the digest of the one before it, and the digests of the evidence rows it tells of. Whoever
can write the file could compute the whole chain anew; keep `head_sha256` of a report elsewhere to notice that
as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from storage import chain
from storage.records import AuditEvent
from storage.schema_sql import APPEND_ONLY
from storage.store import Store
from storage.tables import TABLES, column_list, row_sha256, table_of

PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """Whether the log is whole. `message` is for a person."""

    ok: bool
    events: int
    first_bad_seq: int | None
    message: str
    head_sha256: str = chain.GENESIS
    """Digest of the newest event."""


def events(store: Store, *, limit: int = 200, subject: str | None = None) -> list[AuditEvent]:
    """Return the latest events, newest first, of everything or of one subject (an id)."""
    where, params = ("subject = ?", [subject]) if subject is not None else ("", [])
    return store.all(AuditEvent, where, params, order="seq DESC", limit=limit)


def verify(store: Store) -> AuditReport:
    """Check every event, its place in the chain, and that all evidence is still as its event recorded it."""
    with store.reading():
        return _verify(store)


def _verify(store: Store) -> AuditReport:
    head, count, evidence = chain.GENESIS, 0, dict[str, str]()
    for event in _oldest_first(store):
        problem = _problem(event, count + 1, head)
        if problem:
            return AuditReport(
                ok=False, events=count, first_bad_seq=event.seq, message=problem, head_sha256=head
            )
        head, count = event.sha256, event.seq
        evidence.update(event.detail.get("evidence", {}))
    for check in (_removed_tail(store, count), _altered_evidence(store, evidence), _missing_triggers(store)):
        if check:
            bad = count + 1 if check.startswith("event") else None
            return AuditReport(ok=False, events=count, first_bad_seq=bad, message=check, head_sha256=head)
    message = f"{count} events, each in its place; {len(evidence)} pieces of evidence unaltered"
    return AuditReport(ok=True, events=count, first_bad_seq=None, message=message, head_sha256=head)


def _oldest_first(store: Store) -> Iterator[AuditEvent]:
    """Return all events in order, a page at a time."""
    last = None
    while page := store.all(
        AuditEvent, "seq > ?", [last if last is not None else -(2**63)], order="seq", limit=PAGE
    ):
        yield from page
        last = page[-1].seq


def _problem(event: AuditEvent, expected_seq: int, previous_sha256: str) -> str | None:
    if event.seq != expected_seq:
        return f"event {expected_seq} was removed, or event {event.seq} inserted"
    if event.previous_sha256 != previous_sha256:
        return f"event {event.seq} does not follow event {event.seq - 1}: one of them was altered or moved"
    if event.sha256 != chain.event_sha256(event):
        return f"event {event.seq} was altered"
    return None


def _rows(store: Store, record_type: type[Any]) -> Iterator[dict[str, Any]]:
    """Return all rows of a table, a page at a time: turns may be larger than memory."""
    name, last = table_of(record_type).name, 0
    sql = f"SELECT seq, {column_list(record_type)} FROM {name} WHERE seq > ? ORDER BY seq LIMIT {PAGE}"
    while page := store.rows(sql, [last]):
        yield from page
        last = page[-1]["seq"]


def _removed_tail(store: Store, last_seq: int) -> str | None:
    """Notice that the newest events are gone: SQLite remembers the highest number it gave."""
    rows = store.rows("SELECT seq FROM sqlite_sequence WHERE name = 'audit_events'")
    highest = rows[0]["seq"] if rows else 0
    return (
        f"event {last_seq + 1} and later ones, up to {highest}, were removed" if highest > last_seq else None
    )


def _altered_evidence(store: Store, evidence: dict[str, str]) -> str | None:
    """Compare every evidence row with the digest that its event recorded."""
    left = dict(evidence)
    for record_type, table in TABLES.items():
        if not table.evidence:
            continue
        for row in _rows(store, record_type):
            name = f"{table.name}/{row[table.key]}"
            if left.pop(name, None) != row_sha256(record_type, row):
                return f"{name} was altered, or added without an event"
    return f"{min(left)} was removed" if left else None


def _missing_triggers(store: Store) -> str | None:
    present = {row["name"] for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
    wanted = {f"{table}_no_{what}" for table in APPEND_ONLY for what in ("update", "delete", "replace")}
    missing = sorted(wanted - present)
    return f"the protection {missing[0]} was removed from the database" if missing else None
