"""Syncing under trouble: what was not probed never answers, and nobody's policy is taken away before they are moved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import EngineBusy
from assistant.engine.protocol import ProbeResult
from chat_fixtures import Desk, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage import deployments
from storage.errors import InvalidField
from storage.records import Policy

NOT_FINITE = ProbeResult(text="!", token_ids=(1,), logprobs=(float("nan"),))
Probe = Callable[[], Awaitable[ProbeResult]]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def decide(desk: Desk, policy: Policy, *, canary_percent: float | None = None) -> None:
    """Approve on the command line: rows, which a running server has to follow."""
    release.approve(
        desk.world.store,
        policy_id=policy.id,
        person=desk.world.admin,
        reason="better",
        canary_percent=canary_percent,
    )


def probed_by(desk: Desk, monkeypatch: pytest.MonkeyPatch, policy: Policy, act: Probe) -> None:
    """Let `act` answer the probes of one policy in the engine's place."""
    probe = desk.engine.probe

    async def instead(*, policy_id: str, **ask: object) -> ProbeResult:
        return await (act() if policy_id == policy.id else probe(policy_id=policy_id, **ask))  # type: ignore[arg-type]

    monkeypatch.setattr(desk.engine, "probe", instead)


# -- every policy is probed -------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [EngineBusy("full"), InvalidField("base", "x", "give another")])
def test_a_policy_whose_probes_were_not_answered_is_probed_again_before_it_answers(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy)
    asked: list[Exception] = [trouble] * 2

    async def busy_then_bad() -> ProbeResult:
        if len(asked) > 0:
            raise asked.pop()
        return NOT_FINITE

    monkeypatch.setattr("assistant.engine.behaviour_gate.DEFAULT_ASKS", [("Hello", 4)])
    probed_by(desk, monkeypatch, policy, busy_then_bad)
    for _ in range(2):
        with pytest.raises(type(trouble)):
            asyncio.run(desk.release.sync())
    asyncio.run(desk.release.sync())
    assert desk.release.served.stable.policy_id == desk.world.base.id
    assert "non-finite" in desk.release.alerts[0]


def test_a_policy_that_passed_is_not_probed_at_every_look(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)

    async def never() -> ProbeResult:
        raise AssertionError("probed again")

    probed_by(desk, monkeypatch, policy, never)
    asyncio.run(desk.release.sync())
    desk.engine.adapters.clear()  # an engine that restarted is another matter
    with pytest.raises(AssertionError, match="probed again"):
        asyncio.run(desk.release.sync())


def test_what_an_earlier_process_left_in_the_engine_is_probed(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    asyncio.run(desk.engine.load(policy_id=policy.id, adapter=Path(str(policy.adapter_path))))
    decide(desk, policy)

    async def bad() -> ProbeResult:
        return NOT_FINITE

    probed_by(desk, monkeypatch, policy, bad)
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == desk.world.base.id
    assert deployments.history(desk.world.store)[0].actor == "system"
