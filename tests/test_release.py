"""Approval, hot swap, promotion and rollback: rows first in storage, then the running engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from assistant import release
from assistant.engine.errors import AdapterRefused, EngineUnavailable
from chat_fixtures import Desk, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage import audit, deployments, policies
from storage.errors import Conflict, CorruptData, InvalidField, NotAllowed, NotFound
from storage.records import Approval, Policy


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def test_after_an_approval_the_next_answer_comes_from_the_new_policy(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    assert answered_by(desk) == desk.world.base.id
    approve(desk, policy)
    assert answered_by(desk) == policy.id
    assert policies.standing(desk.world.store, policy.id) == "stable"
    assert audit.verify(desk.world.store).ok


def test_a_rollback_goes_back_in_one_flip_because_the_previous_policy_stays_loaded(
    desk: Desk, tmp_path: Path
) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, first)
    approve(desk, second)
    assert {first.id, second.id} <= asyncio.run(desk.engine.loaded())
    release.rollback(desk.world.store, actor=desk.world.admin.id, reason="complaints")
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == first.id


def test_the_way_back_waits_neither_for_the_engine_nor_for_a_policy_that_is_being_loaded(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (candidate(desk, tmp_path, seed) for seed in (1, 2, 3))
    approve(desk, first)
    approve(desk, second)

    async def go_back_while_the_third_is_being_loaded() -> None:
        free = asyncio.Event()

        async def busy(**_: object) -> None:
            await free.wait()

        monkeypatch.setattr(desk.engine, "load", busy)
        approval = asyncio.create_task(
            desk.release.approve(policy_id=third.id, person=desk.world.admin, reason="better")
        )
        await asyncio.sleep(0.05)
        release.rollback(desk.world.store, actor=desk.world.admin.id, reason="complaints")
        way_back = asyncio.create_task(desk.release.sync())
        await asyncio.sleep(0)
        assert desk.release.served.stable.policy_id == first.id
        assert not way_back.done()  # what nobody uses is unloaded later
        approval.cancel()
        await way_back

    asyncio.run(go_back_while_the_third_is_being_loaded())
    assert answered_by(desk) == first.id


def test_a_policy_older_than_the_previous_one_is_unloaded(desk: Desk, tmp_path: Path) -> None:
    first, second, third = (candidate(desk, tmp_path, seed) for seed in (1, 2, 3))
    for policy in (first, second, third):
        approve(desk, policy)
    loaded = asyncio.run(desk.engine.loaded())
    assert first.id not in loaded
    assert {second.id, third.id} <= loaded


def test_a_policy_that_still_answers_is_not_unloaded(desk: Desk, tmp_path: Path) -> None:
    first, second, third = (candidate(desk, tmp_path, seed) for seed in (1, 2, 3))

    async def swap_twice_during_an_answer() -> str:
        await desk.release.approve(policy_id=first.id, person=desk.world.admin, reason="better")
        events = desk.chat.reply(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
        await anext(events)
        for policy in (second, third):
            await desk.release.approve(policy_id=policy.id, person=desk.world.admin, reason="better")
        assert first.id in await desk.engine.loaded()
        last = [event async for event in events][-1]
        await desk.release.sync()
        assert first.id not in await desk.engine.loaded()
        return last.policy_id  # type: ignore[union-attr]

    assert asyncio.run(swap_twice_during_an_answer()) == first.id


def test_a_canary_answers_its_share_and_is_promoted_or_withdrawn(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=25)
    served = desk.release.served
    assert served.canary is not None
    assert (served.canary.policy_id, served.canary.share) == (policy.id, 0.25)
    assert served.stable.policy_id == desk.world.base.id
    release.promote(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="good")
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == policy.id
    assert desk.release.served.canary is None


def test_a_rollback_withdraws_the_canary_first(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=50)
    release.rollback(desk.world.store, actor=desk.world.admin.id, reason="worse")
    asyncio.run(desk.release.sync())
    assert desk.release.served.canary is None
    assert answered_by(desk) == desk.world.base.id
    assert policies.standing(desk.world.store, policy.id) == "retired"


def shade(desk: Desk, policy: Policy, percent: float = 100) -> None:
    asyncio.run(
        desk.release.approve(
            policy_id=policy.id, person=desk.world.admin, reason="a look first", shadow_percent=percent
        )
    )


def test_a_shadow_is_loaded_answers_nobody_and_goes_on_to_canary(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    shade(desk, policy, 25)
    shadow = desk.release.served.shadow
    assert shadow is not None
    assert (shadow.policy_id, shadow.share) == (policy.id, 0.25)
    assert policy.id in asyncio.run(desk.engine.loaded())
    assert answered_by(desk) == desk.world.base.id
    approve(desk, policy, canary_percent=10)
    assert desk.release.served.shadow is None
    assert desk.release.served.canary.policy_id == policy.id  # type: ignore[union-attr]
    decisions = desk.world.store.all(Approval, "policy_id = ?", [policy.id])
    assert len(decisions) == 1  # the same evidence is decided on once


def test_a_shadow_is_withdrawn_and_a_rollback_does_not_touch_it(desk: Desk, tmp_path: Path) -> None:
    canary, policy = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    shade(desk, policy)
    approve(desk, canary, canary_percent=10)
    release.rollback(desk.world.store, actor=desk.world.admin.id, reason="worse")
    served = asyncio.run(desk.release.sync())
    assert (served.canary, served.shadow.policy_id) == (None, policy.id)  # type: ignore[union-attr]
    with pytest.raises(Conflict, match="nothing to go back to"):
        release.rollback(desk.world.store, actor=desk.world.admin.id, reason="worse")
    release.withdraw(desk.world.store, actor=desk.world.admin.id, reason="seen enough")
    asyncio.run(desk.release.sync())
    assert desk.release.served.shadow is None
    assert policy.id not in asyncio.run(desk.engine.loaded())
    with pytest.raises(Conflict, match="no policy is in the shadow"):
        release.withdraw(desk.world.store, actor=desk.world.admin.id, reason="again")


def test_a_second_shadow_is_neither_approved_nor_deployed(desk: Desk, tmp_path: Path) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    shade(desk, first)
    with pytest.raises(Conflict, match=f"{first.id} is in the shadow already"):
        shade(desk, second)
    assert policies.standing(desk.world.store, second.id) == "candidate"


def test_a_second_canary_is_neither_approved_nor_deployed(desk: Desk, tmp_path: Path) -> None:
    first, second = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, first, canary_percent=10)
    with pytest.raises(Conflict, match=f"{first.id} is the canary already"):
        approve(desk, second, canary_percent=10)
    assert policies.standing(desk.world.store, second.id) == "candidate"


def test_a_rejected_shadow_is_withdrawn(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    shade(desk, policy)
    release.reject(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="too curt")
    assert asyncio.run(desk.release.sync()).shadow is None
    assert policies.standing(desk.world.store, policy.id) == "rejected"


@pytest.mark.parametrize("error", [EngineUnavailable("no memory for it"), AdapterRefused("rank: got 999")])
def test_a_shadow_that_cannot_be_loaded_keeps_no_other_policy_from_answering(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    policy, shadow = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    release.approve(
        desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better", canary_percent=50
    )
    release.approve(
        desk.world.store, policy_id=shadow.id, person=desk.world.admin, reason="a look", shadow_percent=50
    )
    load = desk.engine.load

    async def refuses(*, policy_id: str, adapter: Path) -> None:
        if policy_id == shadow.id:
            raise error
        await load(policy_id=policy_id, adapter=adapter)

    monkeypatch.setattr(desk.engine, "load", refuses)
    served = asyncio.run(desk.release.sync())
    assert served.canary.policy_id == policy.id  # type: ignore[union-attr]
    assert desk.release.shadow_of("conversation_1") is None
    refused = isinstance(error, AdapterRefused)
    assert (served.shadow is None) == refused
    assert bool(desk.release.alerts) == refused  # refused for good: withdrawn, with the reason


def test_without_a_canary_and_a_previous_policy_there_is_nothing_to_roll_back(desk: Desk) -> None:
    with pytest.raises(Conflict, match="nothing to go back to"):
        release.rollback(desk.world.store, actor=desk.world.admin.id, reason="worse")


def test_only_the_canary_is_promoted(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    with pytest.raises(Conflict, match="not the canary"):
        release.promote(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="good")


def test_what_the_gate_refused_is_not_approved(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path, passed=False)
    with pytest.raises(Conflict):
        approve(desk, policy)
    assert deployments.served(desk.world.store).stable.policy_id == desk.world.base.id  # type: ignore[union-attr]


def test_staff_do_not_approve(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    with pytest.raises(NotAllowed):
        release.approve(desk.world.store, policy_id=policy.id, person=desk.world.staff, reason="mine")
    assert policies.standing(desk.world.store, policy.id) == "candidate"


def test_adapter_bytes_that_changed_after_the_evaluation_are_refused(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)
    path = Path(str(policy.adapter_path)) / "adapter_model.safetensors"
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptData):
        approve(desk, policy)
    assert policy.id not in asyncio.run(desk.engine.loaded())
    assert policies.standing(desk.world.store, policy.id) == "candidate"


@pytest.mark.parametrize(
    "shares", [{"shadow_percent": 0}, {"shadow_percent": 101}, {"shadow_percent": 5, "canary_percent": 5}]
)
def test_the_share_of_a_shadow_is_above_zero_and_the_only_one(
    desk: Desk, tmp_path: Path, shares: dict[str, float]
) -> None:
    policy = candidate(desk, tmp_path)
    with pytest.raises(InvalidField, match="shadow"):
        release.approve(
            desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="a look", **shares
        )
    assert policies.standing(desk.world.store, policy.id) == "candidate"


@pytest.mark.parametrize("share", [0, 100, -5, 250])
def test_a_share_outside_the_open_range_is_named(desk: Desk, tmp_path: Path, share: float) -> None:
    policy = candidate(desk, tmp_path)
    with pytest.raises(InvalidField, match="canary"):
        release.approve(
            desk.world.store,
            policy_id=policy.id,
            person=desk.world.admin,
            reason="better",
            canary_percent=share,
        )
    assert policies.standing(desk.world.store, policy.id) == "candidate"


def test_an_unknown_policy_is_named(desk: Desk) -> None:
    with pytest.raises(NotFound, match="policy-9999"):
        release.approve(
            desk.world.store, policy_id="policy-9999-abcdef", person=desk.world.admin, reason="better"
        )


# -- nothing is loaded beside live users that may not be approved --------------------------------------------------


async def never(**_: object) -> None:
    raise AssertionError("loaded")


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"reason": " "}, InvalidField),
        ({"canary_percent": 100}, InvalidField),
        ({"shadow_percent": 5, "canary_percent": 5}, InvalidField),
        ({"canary_percent": 10}, Conflict),  # another one is the canary
    ],
)
def test_an_approval_that_is_refused_loads_nothing(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], error: type[Exception]
) -> None:
    canary, policy = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, canary, canary_percent=10)
    monkeypatch.setattr(desk.engine, "load", never)
    asked = {"person": desk.world.admin, "reason": "better", **asked}
    with pytest.raises(error):
        asyncio.run(desk.release.approve(policy_id=policy.id, **asked))
    assert policies.standing(desk.world.store, policy.id) == "candidate"


def test_neither_staff_nor_a_gate_that_refused_lets_anything_be_loaded(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, refused = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2, passed=False)
    monkeypatch.setattr(desk.engine, "load", never)
    with pytest.raises(Conflict, match="refused by its gate"):
        approve(desk, refused)
    with pytest.raises(NotAllowed):
        asyncio.run(
            desk.release.approve(
                policy_id=passed.id, person=desk.world.staff, reason="mine", canary_percent=5
            )
        )
