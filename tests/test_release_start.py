"""A server that starts: what was decided while it was down answers nobody before it is loaded and checked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import EngineBusy
from assistant.engine.protocol import ProbeResult
from assistant.routing import is_drawn
from chat_fixtures import Desk, make_desk, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage.records import Policy
from storage_fixtures import deploy


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def decide(desk: Desk, policy: Policy, *, canary_percent: float | None = None) -> None:
    """Approve on the command line while no server runs."""
    release.approve(
        desk.world.store,
        policy_id=policy.id,
        person=desk.world.admin,
        reason="better",
        canary_percent=canary_percent,
    )


def start(desk: Desk) -> Desk:
    """Return the desk of a server that starts on the same data; its engine has only the base."""
    return make_desk(desk.world.store.data, world=desk.world)


def sync_while_busy(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server load what is wanted with an engine that is too busy to answer its probes."""

    async def busy(**_: object) -> ProbeResult:
        raise EngineBusy("full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.engine, "probe", busy)
        with pytest.raises(EngineBusy):
            asyncio.run(desk.release.sync())


def test_what_was_approved_while_no_server_ran_answers_only_after_its_probes(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy)
    again = start(desk)
    assert answered_by(again) == desk.world.base.id
    sync_while_busy(again, monkeypatch)
    assert policy.id in asyncio.run(again.engine.loaded())
    assert answered_by(again) == desk.world.base.id
    asyncio.run(again.release.sync())
    assert answered_by(again) == policy.id


def test_the_policy_before_answers_meanwhile_and_the_base_where_that_never_answered(
    desk: Desk, tmp_path: Path
) -> None:
    first, second, third = (candidate(desk, tmp_path, seed) for seed in (1, 2, 3))
    approve(desk, first)
    assert answered_by(desk) == first.id
    decide(desk, second)
    assert start(desk).release.served.stable.policy_id == first.id
    decide(desk, third)
    assert start(desk).release.served.stable.policy_id == desk.world.base.id


def test_a_canary_is_not_drawn_before_it_is_checked(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy, canary_percent=99.9)
    again = start(desk)
    sync_while_busy(again, monkeypatch)
    assert answered_by(again) == desk.world.base.id
    asyncio.run(again.release.sync())
    served = again.release.served
    assert served.canary is not None
    assert served.canary_since is not None
    assert is_drawn("conversation_1", served.canary)
    with again.release.lease("conversation_1") as deployment:
        assert deployment.policy_id == policy.id


def test_what_answered_before_a_restart_answers_at_once(desk: Desk, tmp_path: Path) -> None:
    stable, canary = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, stable)
    assert answered_by(desk) == stable.id
    assert start(desk).release.served == desk.release.served
    approve(desk, canary, canary_percent=50)
    before = desk.release.served
    assert start(desk).release.served == before
    deploy(
        desk.world, canary, "canary", share=0.8
    )  # this share is drawn with when the server has flipped to it
    assert start(desk).release.served == before


def test_a_way_back_while_no_server_ran_is_followed_at_once(desk: Desk, tmp_path: Path) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, first)
    assert answered_by(desk) == first.id
    approve(desk, second)
    assert answered_by(desk) == second.id
    release.rollback(desk.world.store, actor=desk.world.admin.id, reason="worse", expected=second.id)
    assert start(desk).release.served.stable.policy_id == first.id
