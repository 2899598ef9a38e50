"""Approval, hot swap, promotion and rollback: rows first in storage, then the running engine."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import AdapterRefused, EngineStarting, EngineUnavailable, PolicyNotLoaded
from assistant.engine.protocol import ProbeResult
from chat_fixtures import Desk, add_random_candidate, add_servable_candidate, make_real_desk
from storage import audit, deployments, policies
from storage.errors import Conflict, CorruptData, InvalidField, NotAllowed, NotFound
from storage.probes import ProbeRecord, RecordedProbe, write_probes
from storage.records import Approval, Policy
from tiny_models import make_adapter


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


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


def test_a_policy_with_infinite_log_probs_never_gets_a_row(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)

    async def broken(**_: object) -> ProbeResult:
        return ProbeResult(text="!", token_ids=(1,), logprobs=(float("nan"),))

    monkeypatch.setattr(desk.engine, "probe", broken)
    with pytest.raises(AdapterRefused, match="non-finite"):
        approve(desk, policy)
    assert policies.standing(desk.world.store, policy.id) == "candidate"
    assert policy.id not in asyncio.run(desk.engine.loaded())


def test_an_adapter_that_the_engine_ignores_is_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)

    async def same_as_base(**_: object) -> ProbeResult:
        return ProbeResult(text="hi", token_ids=(1, 2), logprobs=(-0.5, -0.25))

    monkeypatch.setattr(desk.engine, "probe", same_as_base)
    with pytest.raises(AdapterRefused, match="not applied"):
        approve(desk, policy)


def test_a_policy_that_the_engine_answers_otherwise_than_its_trainer_is_refused_or_withdrawn(
    desk: Desk, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", Path(desk.world.base.base_path))
    probe = RecordedProbe(ask="Hello", token_ids=(1,), logprobs=(-0.5,), margins=(9.0,))
    write_probes(adapter, ProbeRecord(dtype="float32", probes=(probe,)))
    policy = add_servable_candidate(desk.world, adapter)
    with pytest.raises(AdapterRefused, match="probe 'Hello', position 0"):
        approve(desk, policy)
    assert policies.standing(desk.world.store, policy.id) == "candidate"
    assert policy.id not in asyncio.run(desk.engine.loaded())
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="without a server")
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == desk.world.base.id
    assert "the trainer recorded token 1 with -0.5000" in desk.release.alerts[0]


def test_an_engine_that_restarted_does_not_get_files_that_changed_meanwhile(
    desk: Desk, tmp_path: Path
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()
    path = Path(str(policy.adapter_path)) / "adapter_model.safetensors"
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    asyncio.run(desk.release.sync())
    assert desk.engine.adapters == {}
    assert answered_by(desk) == desk.world.base.id
    assert "adapter_model.safetensors is not as it was stored" in desk.release.alerts[0]


def test_approving_on_the_command_line_reaches_a_running_server(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)

    async def watch_until_it_answers() -> None:
        watching = asyncio.create_task(desk.release.watch())
        await asyncio.sleep(0.1)
        release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
        for _ in range(100):
            if desk.release.served.stable.policy_id == policy.id:
                break
            await asyncio.sleep(0.05)
        watching.cancel()

    asyncio.run(watch_until_it_answers())
    assert answered_by(desk) == policy.id


def test_a_deployed_policy_that_turns_out_bad_is_withdrawn_with_the_reason(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")

    async def refuses(**_: object) -> None:
        raise AdapterRefused("rank: got 999; use at most 64")

    monkeypatch.setattr(desk.engine, "load", refuses)
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == desk.world.base.id
    assert "rank: got 999" in desk.release.alerts[0]
    assert deployments.history(desk.world.store)[0].actor == "system"


def test_an_engine_that_cannot_be_reached_withdraws_nothing(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")

    async def down(**_: object) -> None:
        raise EngineUnavailable("nobody answers")

    monkeypatch.setattr(desk.engine, "load", down)
    with pytest.raises(EngineUnavailable):
        asyncio.run(desk.release.sync())
    assert deployments.served(desk.world.store).stable.policy_id == policy.id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (EngineStarting("the model is starting (weights, 3 s)"), logging.INFO, "waiting for the engine"),
        (EngineUnavailable("nobody answers"), logging.WARNING, "not yet at what should be served"),
    ],
)
def test_an_engine_that_boots_is_progress_and_one_that_is_gone_a_warning(
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: EngineUnavailable,
    level: int,
    words: str,
) -> None:
    async def silent() -> set[str]:
        raise error

    async def watch_a_moment() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.release.watch(), timeout=0.1)

    monkeypatch.setattr(desk.engine, "loaded", silent)
    with caplog.at_level(logging.INFO):
        asyncio.run(watch_a_moment())
    assert [(record.levelno, words in record.message) for record in caplog.records] == [(level, True)]


def test_an_engine_that_restarted_gets_its_adapters_back_on_the_next_question(
    desk: Desk, tmp_path: Path
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()
    assert answered_by(desk) == policy.id


def test_a_policy_that_cannot_be_put_back_is_reported(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()

    async def forgets(**_: object) -> None:
        return None

    monkeypatch.setattr(desk.engine, "load", forgets)
    with pytest.raises((PolicyNotLoaded, AdapterRefused)):
        answered_by(desk)
