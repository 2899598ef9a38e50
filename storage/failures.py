"""What went wrong with a policy without leaving a turn: the feed of a canary's hard stops."""

from __future__ import annotations

from storage.records import Failure, FailureKind, new_id, now
from storage.store import Store


def record_failure(store: Store, *, policy_id: str, kind: FailureKind) -> None:
    """Record a failure that happened now."""
    failure = Failure(id=new_id("failure"), policy_id=policy_id, kind=kind, created_at=now())
    with store.transaction("system", audited=False, durable=False) as changes:
        changes.insert(failure)


def failures_since(store: Store, policy_ids: tuple[str, str], *, since: float) -> list[Failure]:
    """Return the failures of two policies since then (Unix seconds), oldest first."""
    return store.all(Failure, "policy_id IN (?, ?) AND created_at >= ?", [*policy_ids, since], order="seq")
