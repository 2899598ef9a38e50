"""An operator at a desk: candidates, approvals, and who answers then."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chat_fixtures import Desk, add_random_candidate
from storage.records import Policy


def candidate(desk: Desk, tmp_path: Path, seed: int = 1, *, passed: bool = True) -> Policy:
    return add_random_candidate(desk.world, tmp_path, seed=seed, passed=passed)


def approve(desk: Desk, policy: Policy, *, canary_percent: float | None = None) -> None:
    asyncio.run(
        desk.release.approve(
            policy_id=policy.id, person=desk.world.admin, reason="better", canary_percent=canary_percent
        )
    )


def answered_by(desk: Desk, question: str = "Hello?") -> str:
    ask = desk.chat.ask(desk.world.staff, desk.conversation, question)
    return asyncio.run(desk.chat.complete(ask)).policy_id
