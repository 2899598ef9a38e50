"""Whoever alters the past, by whatever tool, is noticed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import audit, chain, settings
from storage.digests import canonical_json
from storage.errors import InvalidField
from storage.records import AuditEvent
from storage.schema_sql import APPEND_ONLY
from storage_fixtures import World, fill_evidence, make_world

Tamper = Callable[[sqlite3.Connection], object]


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = make_world(tmp_path / "data")
    fill_evidence(made)
    return made


def tampered(world: World, tamper: Tamper) -> audit.AuditReport:
    """Change the file as somebody with full access would, triggers put aside and put back, then verify."""
    connection = sqlite3.connect(world.store.data / "kotae.db", isolation_level=None)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    tamper(connection)
    for _, sql in triggers:
        connection.execute(sql)
    connection.close()
    return audit.verify(world.store)


def insert_forged(connection: sqlite3.Connection) -> None:
    """Put a well-made event between two others, moving the later ones up."""
    connection.execute("UPDATE audit_events SET seq = -(seq + 1) WHERE seq >= 6")
    connection.execute("UPDATE audit_events SET seq = -seq WHERE seq < 0")
    previous = connection.execute("SELECT sha256 FROM audit_events WHERE seq = 5").fetchone()[0]
    forged = chain.link((5, previous), at=1.0, actor="system", action="setting.put", subject="x", detail={})
    values = [forged.at, forged.actor, forged.action, forged.subject, "{}", "f" * 64, forged.sha256]
    connection.execute(
        """INSERT INTO audit_events (seq, at, actor, action, subject, detail, previous_sha256, sha256)
            VALUES (6, ?, ?, ?, ?, ?, ?, ?)""",
        values,
    )


def swap(connection: sqlite3.Connection) -> None:
    for before, after in ((5, -5), (6, 5), (-5, 6)):
        connection.execute("UPDATE audit_events SET seq = ? WHERE seq = ?", [after, before])


def test_a_fresh_log_is_whole(world: World) -> None:
    report = audit.verify(world.store)
    assert report.ok, report.message
    assert report.events == len(audit.events(world.store, limit=1000))
    assert report.head_sha256 == audit.events(world.store, limit=1)[0].sha256


def test_the_digest_is_that_of_the_documented_canonical_json(world: World) -> None:
    first, second = sorted(audit.events(world.store, limit=1000), key=lambda event: event.seq)[:2]
    assert first.previous_sha256 == "0" * 64
    assert second.previous_sha256 == first.sha256
    fields = ("seq", "at", "actor", "action", "subject", "detail", "previous_sha256")
    body = {name: getattr(second, name) for name in fields}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert second.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        "at = at + 0.001",
        "actor = 'somebody'",
        "action = 'person.admired'",
        "subject = 'x'",
        "detail = '{}'",
        "sha256 = upper(sha256) || ''",
        f"previous_sha256 = '{'e' * 64}'",
    ],
)
def test_an_altered_event_is_found(world: World, change: str) -> None:
    report = tampered(world, lambda c: c.execute(f"UPDATE audit_events SET {change} WHERE seq = 5"))
    assert not report.ok
    assert report.first_bad_seq == 5


def test_an_event_altered_with_its_own_digest_is_found_at_the_next(world: World) -> None:
    def rewrite(connection: sqlite3.Connection) -> None:
        row = connection.execute(
            "SELECT seq - 1, previous_sha256, at FROM audit_events WHERE seq = 5"
        ).fetchone()
        forged = chain.link((row[0], row[1]), at=row[2], actor="system", action="x", subject="x", detail={})
        connection.execute(
            """UPDATE audit_events
                SET actor = 'system', action = 'x', subject = 'x', detail = '{}', sha256 = ? WHERE seq = 5""",
            [forged.sha256],
        )

    report = tampered(world, rewrite)
    assert (report.ok, report.first_bad_seq) == (False, 6)


@pytest.mark.parametrize("seq", [1, 5])
def test_a_removed_event_is_found(world: World, seq: int) -> None:
    report = tampered(world, lambda c: c.execute("DELETE FROM audit_events WHERE seq = ?", [seq]))
    assert not report.ok
    assert report.first_bad_seq == seq + 1
    assert f"event {seq} was removed" in report.message


def test_removed_newest_events_are_found(world: World) -> None:
    events = audit.verify(world.store).events
    report = tampered(world, lambda c: c.execute("DELETE FROM audit_events WHERE seq > ?", [events - 2]))
    assert (report.ok, report.first_bad_seq) == (False, events - 1)


def test_an_emptied_log_is_found(world: World) -> None:
    assert not tampered(world, lambda c: c.execute("DELETE FROM audit_events")).ok


def test_an_inserted_event_is_found(world: World) -> None:
    report = tampered(world, insert_forged)
    assert (report.ok, report.first_bad_seq) == (False, 6)


def test_reordered_events_are_found(world: World) -> None:
    report = tampered(world, swap)
    assert (report.ok, report.first_bad_seq) == (False, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE turns SET answer = 'forged' WHERE seq = 1", "turns/"),
        ("UPDATE ratings SET verdict = 'down'", "ratings/"),
        ("UPDATE comparisons SET choice = 'tie'", "comparisons/"),
        ("UPDATE corrections SET edited = 'forged'", "corrections/"),
        (
            "UPDATE policies SET adapter_sha256 = replace(adapter_sha256, '0', 'f') WHERE run_id <> ''",
            "policies/",
        ),
        ("UPDATE evaluations SET passed = 0", "evaluations/"),
        ("UPDATE approvals SET reason = 'forged'", "approvals/"),
        ("UPDATE deployments SET share = 0.5", "deployments/"),
        ("DELETE FROM approvals", "approvals/"),
        ("DELETE FROM judgements", "judgements/"),
        (
            """INSERT INTO ratings (id, turn_id, person_id, verdict, reasons, comment, created_at)
                SELECT 'rating_forged', turn_id, person_id, 'down', '[]', '', 1.0 FROM ratings""",
            "ratings/rating_forged",
        ),
    ],
)
def test_altered_removed_or_added_evidence_is_found(world: World, change: str, named: str) -> None:
    report = tampered(world, lambda c: c.execute(change))
    assert not report.ok
    assert named in report.message


def test_a_missing_protection_is_found(world: World) -> None:
    connection = sqlite3.connect(world.store.data / "kotae.db")
    for table in APPEND_ONLY:
        connection.execute(f"DROP TRIGGER {table}_no_delete")
    connection.close()
    report = audit.verify(world.store)
    assert not report.ok
    assert "_no_delete" in report.message


def test_events_are_listed_newest_first_and_by_subject(world: World) -> None:
    listed = audit.events(world.store, limit=5)
    assert [event.seq for event in listed] == sorted((event.seq for event in listed), reverse=True)
    mine = audit.events(world.store, subject=world.staff.id)
    assert [event.action for event in mine] == ["person.added"]


@pytest.mark.parametrize(
    "detail", [{"text": "x" * 201}, {"a": [{"b": "x" * 201}]}, {"a": float("nan")}, {"a": "\ud800"}]
)
def test_long_texts_and_what_is_no_json_are_kept_out_of_details(
    world: World, detail: dict[str, object]
) -> None:
    with pytest.raises(InvalidField), world.store.transaction("system") as changes:
        changes.audit("test", "subject", **detail)


def test_an_event_may_stand_alone(world: World) -> None:
    with world.store.transaction(world.staff.id) as changes:
        event = changes.audit("page.seen", "policy-0001", page="approval")
    assert audit.events(world.store, limit=1) == [event]
    assert isinstance(event, AuditEvent)


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": [1, 1.5], "a": "返 \0"}) == '{"a":"返 \\u0000","b":[1,1.5]}'


def test_a_long_log_is_verified_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PAGE", 3)
    settings.put(world.store, "a", 1, "system")
    report = audit.verify(world.store)
    assert report.ok
    assert report.events > 9
