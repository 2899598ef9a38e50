"""Which policy answers this conversation: a pure function of its id and of what is served."""

from __future__ import annotations

import hashlib

from storage.records import Deployment, Served


def assign(conversation_id: str, served: Served) -> Deployment:
    """Return the deployment that answers `conversation_id`.

    The draw is a hash of the conversation and the canary's deployment, so it is sticky while this canary
    runs and independent between canaries (nobody is always the first to try).
    """
    canary = served.canary
    if canary is not None and draw(conversation_id, canary.id) < canary.share:
        return canary
    return served.stable


def draw(conversation_id: str, deployment_id: str) -> float:
    """Return a number in [0, 1) that looks random and depends only on the two ids."""
    digest = hashlib.sha256(f"{deployment_id}\0{conversation_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
