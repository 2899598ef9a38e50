"""Which policy answers this conversation: who answered it first, and a pure function of that, its id and what is served."""

from __future__ import annotations

import hashlib

from storage.conversations import first_answer_after
from storage.outcomes import CONCLUDED_AFTER_S
from storage.records import Deployment, Served
from storage.store import Store


def first_answer_by(store: Store, conversation_id: str, served: Served) -> str | None:
    """Return whose conversation it is while this canary runs; None if that is still to be drawn.

    One that was going on when the canary began is stable's: `storage.outcomes` leaves the same ones out of the evidence.
    """
    if served.canary_since is None:
        return None
    first = first_answer_after(store, conversation_id, served.canary_since - CONCLUDED_AFTER_S)
    if first is None:
        return None
    was_going_on = first.created_at - first.total_s < served.canary_since
    return served.stable.policy_id if was_going_on else first.policy_id


def assign(conversation_id: str, served: Served, *, first_answer_by: str | None = None) -> Deployment:
    """Return the deployment that answers `conversation_id`.

    The draw is a hash of the conversation and the canary's deployment, so it is independent between canaries (nobody
    is always the first to try). Once drawn, a conversation stays with its policy while this canary runs, also when the
    share is changed.

    Args:
        first_answer_by: the policy of the conversation's first answer since the canary began, None without one; the stable
            policy for one that was going on then.
    """
    canary = served.canary
    if canary is None or first_answer_by == served.stable.policy_id:
        return served.stable
    if first_answer_by == canary.policy_id or is_drawn(conversation_id, canary):
        return canary
    return served.stable


def is_drawn(conversation_id: str, deployment: Deployment) -> bool:
    """Tell whether the conversation is one of the share of a canary or a shadow."""
    return draw(conversation_id, deployment.id) < deployment.share


def draw(conversation_id: str, deployment_id: str) -> float:
    """Return a number in [0, 1) that looks random and depends only on the two ids."""
    digest = hashlib.sha256(f"{deployment_id}\0{conversation_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
