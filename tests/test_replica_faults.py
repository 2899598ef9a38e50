"""Servers that misbehave: what they hold up, which is nothing, when they are asked again, and what is not withdrawn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assistant import release
from assistant.chat import Chat
from assistant.engine import vllm_replicas
from assistant.engine.errors import AdapterRefused, EngineError, EngineUnavailable
from chat_fixtures import add_random_candidate
from replica_fixtures import Pair, lose_adapters
from storage import policies
from storage.records import Policy


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def policy(pair: Pair, tmp_path: Path) -> Policy:
    return add_random_candidate(pair.world, tmp_path, seed=1)


# -- one that is away behind its proxy ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_replica_whose_proxy_answers_for_it_holds_nothing_up(
    pair: Pair, policy: Policy, status: int
) -> None:
    pair.one.status = status
    pair.sync()
    pair.approve(policy)
    assert pair.release.served.stable.policy_id == policy.id
    pair.two.restart()
    pair.sync()
    assert pair.ask(policy) == str(policy.adapter_path)
    asked = len(pair.two.asked)
    pair.one.status = 200
    pair.sync()  # it is back, and gets what it missed
    assert pair.one.adapters == pair.two.adapters
    pair.ask(policy)
    assert (pair.one.asked, len(pair.two.asked)) == ([policy.id], asked)


# -- one that takes an adapter and does not apply it ---------------------------------------------------------


def test_an_approval_wants_every_replica_that_answers_to_pass_the_probes(pair: Pair, policy: Policy) -> None:
    """Two takes the load and answers with the base: under the policy's name, had it not been probed too."""
    pair.two.ignores_adapters = True
    with pytest.raises(EngineUnavailable, match=r"http://two.*answers exactly like the base"):
        pair.approve(policy)
    assert policies.standing(pair.world.store, policy.id) == "candidate"
    assert {pair.ask(policy) for _ in range(4)} == {str(policy.adapter_path)}
    assert pair.two.asked == []


def test_a_policy_that_no_replica_applies_is_refused_as_that_of_one_server(
    pair: Pair, policy: Policy
) -> None:
    pair.one.ignores_adapters = pair.two.ignores_adapters = True
    with pytest.raises(AdapterRefused, match="answers exactly like the base"):
        pair.approve(policy)
    assert (pair.one.adapters, pair.two.adapters) == ({}, {})


def test_a_replica_that_comes_back_is_probed_before_it_is_asked(pair: Pair, policy: Policy) -> None:
    pair.approve(policy)
    pair.one.restart()
    pair.one.probed.clear()
    asyncio.run(pair.engine.load(policy_id=policy.id, adapter=Path(str(policy.adapter_path))))
    pair.ask(policy)  # one has the adapter, and comes first
    assert pair.one.asked == []
    pair.sync()
    assert policy.id in pair.one.probed
    pair.ask(policy)
    assert pair.one.asked == [policy.id]


def test_a_replica_that_comes_back_and_fails_is_told_of_and_never_asked(
    pair: Pair, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy itself answers elsewhere, so it stays, and nothing else waits for that replica."""
    pair.approve(policy)
    pair.two.restart()
    pair.two.ignores_adapters = True
    for _ in range(2):
        pair.sync()
    assert pair.release.served.stable.policy_id == policy.id
    assert [alert for alert in pair.release.alerts if "http://two" in alert] == pair.release.alerts
    assert len(pair.release.alerts) == 1
    pair.one.status = 503
    with pytest.raises(EngineError):
        pair.ask(policy)
    assert pair.two.asked == []
    pair.two.ignores_adapters = False  # somebody mended it
    monkeypatch.setattr(vllm_replicas, "PROBED_AGAIN_AFTER_S", 0.0)
    pair.sync()
    assert pair.ask(policy) == str(policy.adapter_path)


def test_a_replica_that_failed_is_probed_again_after_a_minute_or_another_load(
    pair: Pair, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at each look: every replica answers the probes then, so the good ones would do so for ever."""
    pair.two.ignores_adapters = True
    release.approve(pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="better")
    pair.sync()
    first = pair.two.probed.count(policy.id)
    for _ in range(3):
        pair.sync()
    assert [twin.probed.count(policy.id) for twin in (pair.one, pair.two)] == [first, first]
    pair.two.restart()
    pair.sync()
    assert pair.two.probed.count(policy.id) == 2 * first
    monkeypatch.setattr(vllm_replicas, "PROBED_AGAIN_AFTER_S", 0.0)
    pair.sync()
    assert pair.two.probed.count(policy.id) == 3 * first


def test_a_policy_that_is_left_on_a_faulty_replica_alone_is_not_said_to_answer(
    pair: Pair, policy: Policy
) -> None:
    pair.two.ignores_adapters = True
    release.approve(pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="better")
    pair.sync()
    pair.chat(1)
    pair.one.restart()
    pair.one.load_status = 500
    with pytest.raises(EngineUnavailable):
        pair.sync()
    waiting = pair.release.in_effect().waiting(release.serving(pair.world.store))
    assert [row.policy for row in waiting] == [policy.id]


def test_a_replica_that_was_too_busy_for_the_probes_is_probed_later(pair: Pair, policy: Policy) -> None:
    pair.two.is_full = True
    pair.approve(policy)
    assert pair.release.served.stable.policy_id == policy.id
    pair.ask(policy)
    assert (pair.two.probed, pair.two.asked) == ([], [])
    pair.two.is_full = False
    pair.sync()
    assert policy.id in pair.two.probed
    pair.one.status = 503
    assert pair.ask(policy) == str(policy.adapter_path)


def test_readiness_does_not_count_a_replica_that_did_not_pass(pair: Pair, policy: Policy) -> None:
    pair.approve(policy)
    pair.two.restart()
    pair.two.ignores_adapters = True
    pair.sync()
    assert policy.id in asyncio.run(pair.engine.health()).policies
    pair.one.status = 503
    assert asyncio.run(pair.engine.health()).policies == {pair.world.base.id}


# -- an engine that fails at loading what it has served before ------------------------------------------------


@pytest.mark.parametrize("status", [404, 500])
def test_a_policy_that_has_answered_outlives_an_engine_that_cannot_load_it_for_now(
    pair: Pair, policy: Policy, status: int
) -> None:
    """For want of memory beside a training, or of a volume that is not mounted yet: neither is the adapter's fault."""
    pair.approve(policy)
    lose_adapters(pair, load_status=status)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="CUDA out of memory"):
            pair.sync()
    assert "CUDA out of memory" in pair.release.alerts[0]
    assert len(pair.release.alerts) == 1
    lose_adapters(pair, load_status=200)
    pair.sync()
    assert pair.release.served.stable.policy_id == policy.id
    assert pair.ask(policy) == str(policy.adapter_path)


def test_that_it_has_answered_is_known_to_the_next_process(pair: Pair, policy: Policy) -> None:
    pair.approve(policy)
    chat = Chat(pair.world.store, pair.engine, pair.release)
    question = chat.ask(pair.world.staff, pair.desk.conversation, "Hello?")
    assert asyncio.run(chat.complete(question)).policy_id == policy.id
    pair.start()
    lose_adapters(pair, load_status=500)
    with pytest.raises(EngineUnavailable):
        pair.sync()
    assert release.serving(pair.world.store).stable.policy_id == policy.id


def test_a_policy_that_never_answered_is_withdrawn_when_the_engine_fails_at_it(
    pair: Pair, policy: Policy
) -> None:
    release.approve(pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="without a server")
    lose_adapters(pair, load_status=500)
    pair.sync()
    assert pair.release.served.stable.policy_id == pair.world.base.id
    assert "was withdrawn" in pair.release.alerts[0]


def test_nobody_waits_for_a_way_back_that_cannot_be_loaded_for_now(
    pair: Pair, policy: Policy, tmp_path: Path
) -> None:
    pair.approve(policy)
    newer = add_random_candidate(pair.world, tmp_path, seed=2)
    pair.approve(newer)
    for twin in (pair.one, pair.two):
        del twin.adapters[policy.id]
        twin.load_status = 500
    pair.sync()
    assert pair.release.served.stable.policy_id == newer.id
    assert policy.id in pair.release.alerts[0]


def test_a_replica_that_cannot_load_holds_up_no_rollback(pair: Pair, policy: Policy, tmp_path: Path) -> None:
    newer = add_random_candidate(pair.world, tmp_path, seed=2)
    pair.approve(policy)
    pair.approve(newer)
    pair.two.restart()
    pair.two.load_status = 500
    pair.sync()
    assert ["http://two" in alert for alert in pair.release.alerts] == [True, True]
    release.rollback(pair.world.store, actor=pair.world.admin.id, reason="worse")
    pair.sync()
    assert pair.release.served.stable.policy_id == policy.id
    assert pair.ask(policy) == str(policy.adapter_path)
    third = add_random_candidate(pair.world, tmp_path, seed=3)
    with pytest.raises(EngineUnavailable, match="refuses what another took"):
        pair.approve(third)  # that wants every replica


# -- what only one of them has ---------------------------------------------------------------------------------


def test_what_nobody_needs_is_unloaded_though_only_one_replica_has_it(pair: Pair, policy: Policy) -> None:
    pair.one.adapters["policy-0404-cccccc"] = "/left/by/an/earlier/process"
    pair.approve(policy)
    assert pair.one.adapters == pair.two.adapters == {policy.id: str(policy.adapter_path)}


# -- what the operator hears of them ---------------------------------------------------------------------------


def test_a_replica_that_refuses_a_load_is_an_alert_from_the_first_look_and_one_line_of_the_log(
    pair: Pair, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    pair.two.load_status = 500
    release.approve(pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="better")
    for _ in range(4):
        pair.sync()
        assert ["http://two" in alert for alert in pair.release.alerts] == [True]
    assert sum("http://two" in record.message for record in caplog.records) == 1
    pair.two.load_status = 200
    pair.sync()
    assert pair.release.alerts == []


def test_a_replicas_answers_are_no_alert_after_the_policy_was_taken_back(pair: Pair, policy: Policy) -> None:
    pair.two.ignores_adapters = True
    release.approve(
        pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="better", canary_percent=50
    )
    pair.sync()
    assert len(pair.release.alerts) == 1
    release.rollback(pair.world.store, actor=pair.world.admin.id, reason="enough")
    pair.sync()
    assert pair.release.alerts == []
