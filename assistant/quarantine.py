"""Policies that failed: refused by a gate, or withdrawn by themselves. The mark and its reason stay until a person
decides for the policy again and both gates pass it.

A mark and its end are events of the audit log, and nothing else. A quarantined policy may be approved again: every approval
runs the gates, and the server that answers with it then lifts the mark. Deliberately absent: a way to lift it without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from assistant.engine.errors import LEAVES_NO_MARK, AdapterRefused
from storage import policies
from storage.chain import LONGEST_TEXT
from storage.errors import CorruptData, KotaeError
from storage.people import SYSTEM
from storage.records import AuditEvent, Deployment, Json
from storage.store import Store

BEGINS, ENDS = "policy.quarantined", "policy.released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Why a policy is quarantined, and since when (Unix seconds)."""

    reason: str
    at: float


def quarantine_of(store: Store, policy_id: str) -> Quarantine | None:
    """Return why the policy is quarantined; None where it is not."""
    found = store.all(
        AuditEvent, "subject = ? AND action IN (?, ?)", [policy_id, BEGINS, ENDS], order="seq DESC", limit=1
    )
    if not found or found[0].action == ENDS:
        return None
    return Quarantine(reason=found[0].detail["reason"], at=found[0].at)


def quarantine(store: Store, policy_id: str, reason: str) -> None:
    """Mark the policy; the reason for which it is marked already is not told again. A long one is cut, as all in the log."""
    reason = reason if len(reason) <= LONGEST_TEXT else f"{reason[: LONGEST_TEXT - 1]}…"
    known = quarantine_of(store, policy_id)
    if known is None or known.reason != reason:
        with store.transaction(SYSTEM) as changes:
            changes.audit(BEGINS, policy_id, reason=reason)


def lift(store: Store, deployment: Deployment) -> None:
    """Take the mark away from a policy that passed both gates, if a person deployed it since it was marked.

    The gates see whether it answers as trained. What people made of its answers they do not see.
    """
    found = quarantine_of(store, deployment.policy_id)
    if found is not None and deployment.actor != SYSTEM and deployment.created_at > found.at:
        with store.transaction(SYSTEM) as changes:
            changes.audit(ENDS, deployment.policy_id)


@contextmanager
def refusals_kept(store: Store, policy_id: str) -> Iterator[None]:
    """Quarantine the policy when a gate refuses it in the block; the refusal goes on to whoever asked.

    What may be the engine's fault, as its want of memory, leaves no mark, nor does another `--model` than its base.
    """
    try:
        yield
    except LEAVES_NO_MARK:
        raise
    except (AdapterRefused, CorruptData) as refusal:
        with suppress(KotaeError):  # the refusal is what has to be told
            quarantine(store, policy_id, str(refusal))
        raise


def listed(store: Store) -> list[Json]:
    """Return every policy, oldest first, with its standing and the reason of its quarantine (None: it is not)."""
    rows = []
    for policy in policies.list_policies(store):
        found = quarantine_of(store, policy.id)
        reason = found.reason if found else None
        rows.append(
            {**asdict(policy), "standing": policies.standing(store, policy.id), "quarantined": reason}
        )
    return rows
