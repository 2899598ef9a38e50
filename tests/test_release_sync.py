"""Syncing under trouble: what was not probed never answers, and nobody's policy is taken away before they are moved."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import AdapterRefused, EngineBusy
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


# -- the flip goes to what was loaded and checked, and comes before anything is unloaded -----------------------


def test_a_decision_during_a_load_is_followed_but_not_before_it_is_loaded_and_checked(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    decide(desk, first)
    load = desk.engine.load

    async def decide_meanwhile(*, policy_id: str, adapter: Path) -> None:
        await load(policy_id=policy_id, adapter=adapter)
        if policy_id == first.id:
            decide(desk, second)

    async def bad() -> ProbeResult:
        return NOT_FINITE

    monkeypatch.setattr(desk.engine, "load", decide_meanwhile)
    probed_by(desk, monkeypatch, second, bad)
    asyncio.run(desk.release.sync())
    assert desk.release.served.stable.policy_id == first.id  # the second was withdrawn at once
    assert second.id in desk.release.alerts[0]
    assert answered_by(desk) == first.id


def test_a_canary_answers_until_its_successor_does(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, successor = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, canary, canary_percent=99.9)
    decide(desk, successor)

    async def busy() -> ProbeResult:
        assert answered_by_canary() in await desk.engine.loaded()
        raise EngineBusy("full")

    def answered_by_canary() -> str:
        with desk.release.lease("conversation_1") as deployment:
            return deployment.policy_id

    assert answered_by_canary() == canary.id
    probed_by(desk, monkeypatch, successor, busy)
    with pytest.raises(EngineBusy):
        asyncio.run(desk.release.sync())
    assert answered_by_canary() == canary.id
    assert canary.id in asyncio.run(desk.engine.loaded())
    monkeypatch.undo()
    asyncio.run(desk.release.sync())
    assert answered_by_canary() == successor.id
    assert canary.id not in asyncio.run(desk.engine.loaded())


def test_an_answer_that_begins_while_others_are_unloaded_keeps_its_policy(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (candidate(desk, tmp_path, seed) for seed in (1, 2, 3))
    approve(desk, first)
    approve(desk, second)
    decide(desk, third)
    load, held = desk.engine.load, []

    async def ask_meanwhile(*, policy_id: str, adapter: Path) -> None:
        await load(policy_id=policy_id, adapter=adapter)
        leased = desk.release.using(deployments.deployments_of(desk.world.store, first.id)[0])
        leased.__enter__()
        held.append(leased)

    monkeypatch.setattr(desk.engine, "load", ask_meanwhile)
    asyncio.run(desk.release.sync())
    assert first.id in asyncio.run(desk.engine.loaded())
    held[0].__exit__(None, None, None)
    asyncio.run(desk.release.sync())
    assert first.id not in asyncio.run(desk.engine.loaded())


def test_what_was_prepared_is_not_unloaded_before_its_row_is_written(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    row_may_come, unloaded = threading.Event(), []
    write, unload = release.approve, desk.engine.unload

    def slowly(*args: object, **kwargs: object) -> object:
        row_may_come.wait(10)
        return write(*args, **kwargs)  # type: ignore[arg-type]

    async def noted(policy_id: str) -> None:
        unloaded.append(policy_id)
        await unload(policy_id)

    monkeypatch.setattr("assistant.release.approve", slowly)
    monkeypatch.setattr(desk.engine, "unload", noted)

    async def sync_between_preparation_and_row() -> None:
        approval = asyncio.create_task(
            desk.release.approve(policy_id=policy.id, person=desk.world.admin, reason="better")
        )
        while policy.id not in desk.release._checked:
            await asyncio.sleep(0.01)
        timer = asyncio.create_task(desk.release.sync())
        await asyncio.sleep(0.05)
        row_may_come.set()
        await asyncio.gather(approval, timer)

    asyncio.run(sync_between_preparation_and_row())
    assert unloaded == []
    assert answered_by(desk) == policy.id


def test_a_canary_counts_from_the_flip_and_a_restart_does_not_begin_it_anew(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy, canary_percent=50)
    store = desk.world.store

    async def busy() -> ProbeResult:
        raise EngineBusy("full")

    with monkeypatch.context() as patched:
        probed_by(desk, patched, policy, busy)
        with pytest.raises(EngineBusy):
            asyncio.run(desk.release.sync())
    assert release.serving(store).canary_since is None
    asyncio.run(desk.release.sync())
    assert desk.release.served == release.serving(store)
    since = desk.release.served.canary_since
    assert since is not None
    again = release.Release(store, desk.engine)
    asyncio.run(again.sync())
    assert again.served.canary_since == since


# -- what cannot be served ends at the base ------------------------------------------------------------------


def refusing(desk: Desk, monkeypatch: pytest.MonkeyPatch, *refused: Policy) -> None:
    """Let the engine refuse these adapters."""
    load = desk.engine.load

    async def instead(*, policy_id: str, adapter: Path) -> None:
        if policy_id in {policy.id for policy in refused}:
            raise AdapterRefused(f"{policy_id}: rank: got 999")
        await load(policy_id=policy_id, adapter=adapter)

    monkeypatch.setattr(desk.engine, "load", instead)


def test_two_policies_that_cannot_be_served_end_at_the_base(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    decide(desk, first)
    decide(desk, second)
    refusing(desk, monkeypatch, first, second)
    for _ in range(6):
        asyncio.run(desk.release.sync())
    assert desk.release.served.stable.policy_id == desk.world.base.id
    rows = deployments.history(desk.world.store)
    # Newest first: one step back, the two approvals, the first start.
    assert [row.policy_id for row in rows] == [desk.world.base.id, second.id, first.id, desk.world.base.id]
    assert len(desk.release.alerts) <= 3  # once for each: withdrawn, and no way back


def test_a_refused_policy_is_withdrawn_even_where_another_only_has_to_wait(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable, canary = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    decide(desk, stable)
    decide(desk, canary, canary_percent=50)
    refusing(desk, monkeypatch, canary)

    async def busy() -> ProbeResult:
        raise EngineBusy("full")

    probed_by(desk, monkeypatch, stable, busy)
    with pytest.raises(EngineBusy):
        asyncio.run(desk.release.sync())
    assert release.serving(desk.world.store).canary is None


def test_a_canary_that_fails_when_it_gets_another_share_is_withdrawn_and_not_cut_off(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=50)

    async def bad() -> ProbeResult:
        return NOT_FINITE

    probed_by(desk, monkeypatch, policy, bad)
    with pytest.raises(AdapterRefused):
        approve(desk, policy, canary_percent=80)
    assert policy.id in asyncio.run(desk.engine.loaded())  # people are still sent to it
    assert asyncio.run(desk.release.sync()).canary is None
    assert policy.id not in asyncio.run(desk.engine.loaded())


def test_alerts_are_the_latest_ones(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assistant.alerts.LATEST", 3)
    for number in range(5):
        desk.release.told.tell("withdrawn", f"policy {number}", f"alert {number}")
    desk.release.told.tell("withdrawn", "policy 3", "alert 3")
    assert desk.release.alerts == ["alert 2", "alert 4", "alert 3"]
