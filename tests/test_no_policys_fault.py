"""What a server cannot do for now, or one of several does wrong, is booked on no policy and withdraws none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import AdapterRefused, EngineAbsent, EngineBusy
from assistant.engine.vllm import VllmEngine
from assistant.quarantine import quarantine_of
from replica_fixtures import ONE, TWO, Pair, lose_adapters
from storage.failures import failures_since
from storage.records import Policy


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def policy(pair: Pair, tmp_path: Path) -> Policy:
    return pair.add_candidate(tmp_path)


def decide(pair: Pair, policy: Policy, **share: float) -> None:
    """Approve on the command line and let the server follow."""
    release.approve(pair.world.store, policy_id=policy.id, person=pair.world.admin, reason="better", **share)
    pair.sync()


def booked(pair: Pair, policy: Policy) -> int:
    """Return how many failures stand against the policy."""
    found = failures_since(pair.world.store, (policy.id, pair.world.base.id), since=0)
    return sum(failure.policy_id == policy.id for failure in found)


# -- a canary that the engine cannot load for now ---------------------------------------------------------------


def test_questions_for_a_canary_that_is_not_loaded_for_now_are_booked_on_nobody(
    pair: Pair, policy: Policy
) -> None:
    pair.approve(policy, canary_percent=50)
    lose_adapters(pair, load_status=500)
    by, errors = pair.chat(12)
    assert set(by) == {pair.world.base.id}
    assert {type(error) for error in errors} == {EngineAbsent}
    assert "CUDA out of memory" in str(errors[0])
    assert booked(pair, policy) == 0


def test_such_a_question_asks_the_engine_for_no_other_load(
    pair: Pair, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server tries again each second; each question would else read the files and load them on every replica."""
    pair.approve(policy)
    lose_adapters(pair, load_status=500)
    loads: list[str] = []
    load = VllmEngine.load

    async def counted(engine: VllmEngine, *, policy_id: str, adapter: Path) -> None:
        loads.append(policy_id)
        await load(engine, policy_id=policy_id, adapter=adapter)

    monkeypatch.setattr(VllmEngine, "load", counted)

    async def ask_at_once() -> None:
        asks = [pair.release.put_back(policy.id) for _ in range(7)]
        failed = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(error) for error in failed] == [EngineAbsent] * 7

    asyncio.run(ask_at_once())
    pair.chat(3)
    assert loads == [policy.id]
    lose_adapters(pair, load_status=200)
    pair.sync()
    assert pair.chat(1)[0] == [policy.id]


def test_people_get_other_answers_when_it_stays_so(
    pair: Pair, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.approve(policy)
    pair.chat(1)
    lose_adapters(pair, load_status=500)
    assert pair.chat(1)[0] == []
    monkeypatch.setattr(release, "WAITED_FOR_S", 0.0)
    pair.sync()
    assert pair.chat(1)[0] == [pair.world.base.id]
    assert any("was withdrawn" in alert for alert in pair.release.alerts)
    lose_adapters(pair, load_status=200)
    pair.sync()
    assert pair.chat(1)[0] == [pair.world.base.id], "nothing returns without a decision"
    pair.approve(policy)
    assert pair.chat(1)[0] == [policy.id]


# -- the replica that answers well is away ----------------------------------------------------------------------


def test_a_question_that_finds_the_good_replica_gone_is_booked_on_nobody(pair: Pair, policy: Policy) -> None:
    pair.two.ignores_adapters = True
    decide(pair, policy)
    pair.one.is_down = True
    by, errors = pair.chat(1)
    assert by == []
    assert isinstance(errors[0], EngineAbsent)
    assert booked(pair, policy) == 0


def test_a_probe_that_finds_the_good_replica_gone_says_so(pair: Pair, policy: Policy) -> None:
    pair.two.ignores_adapters = True
    decide(pair, policy)
    pair.one.is_down = True
    ask = [{"role": "user", "content": "Hello"}]
    with pytest.raises(EngineAbsent):
        asyncio.run(pair.engine.probe(policy_id=policy.id, messages=ask, max_tokens=2))


# -- a server of Kotae that starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("urls", [(ONE,), (ONE, TWO)])
def test_a_start_before_a_busy_engine_leaves_what_answered_before_answering(
    pair: Pair, policy: Policy, urls: tuple[str, ...]
) -> None:
    pair.start(urls)
    pair.approve(policy)
    pair.chat(1)
    pair.start(urls)
    pair.one.is_full = pair.two.is_full = True
    with pytest.raises(EngineBusy):
        pair.sync()
    pair.one.is_full = pair.two.is_full = False
    assert policy.id in asyncio.run(pair.engine.health()).policies
    assert pair.ask(policy) == str(policy.adapter_path)


def test_a_start_while_only_a_faulty_replica_is_there_withdraws_nothing_that_answered(
    pair: Pair, policy: Policy
) -> None:
    pair.two.ignores_adapters = True
    decide(pair, policy)
    pair.chat(1)
    pair.start()
    pair.one.is_down = True
    with pytest.raises(EngineAbsent, match="answers exactly like the base"):
        pair.sync()
    (errors,) = pair.chat(1)[1:]
    assert isinstance(errors[0], EngineAbsent)
    assert booked(pair, policy) == 0
    assert (pair.two.asked, quarantine_of(pair.world.store, policy.id)) == ([], None)
    pair.one.is_down = False
    pair.sync()
    assert release.serving(pair.world.store).stable.policy_id == policy.id
    assert pair.ask(policy) == str(policy.adapter_path)


def test_an_approval_refused_by_the_only_replica_that_is_there_leaves_no_mark(
    pair: Pair, policy: Policy
) -> None:
    pair.two.ignores_adapters = True
    pair.one.is_down = True
    with pytest.raises(AdapterRefused, match=r"answers exactly like the base.*away"):
        pair.approve(policy)
    assert quarantine_of(pair.world.store, policy.id) is None
    assert pair.two.adapters == {}
