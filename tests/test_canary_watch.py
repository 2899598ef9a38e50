"""A canary that does worse is taken back without anybody asking, with the reason in the audit log; a good one stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from assistant.canary_watch import CanaryWatch, last_verdict
from assistant.engine.errors import ContextTooLong, EngineBusy, EngineUnavailable, WrongPolicy
from assistant.engine.protocol import Piece
from assistant.web.pages.served_page import verdict_html
from assistant.web.words import Words
from chat_fixtures import make_desk
from storage import audit, deployments, feedback
from storage.failures import failures_since, record_failure
from storage.records import AuditEvent, FailureKind, now
from storage_fixtures import World, add_candidate, approve, deploy, make_world, record, start_conversation

LATER = 1800.0 + 60


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def talk(world: World, *, canary: int, canary_bad: int, stable: int) -> None:
    """Let so many conversations be answered by the canary, `canary_bad` of them badly, and by stable."""
    served = deployments.served(world.store)
    assert served is not None
    assert served.canary is not None
    for number in range(canary + stable):
        row = served.canary if number < canary else served.stable
        turn = record(
            world, start_conversation(world), policy_id=row.policy_id, deployment_id=row.id, total_s=0.0
        )
        if number < canary_bad:
            feedback.rate(world.store, turn_id=turn.id, person_id=world.staff.id, verdict="down")


def start_canary(world: World) -> str:
    policy = add_candidate(world)
    approve(world, policy)
    deployments.note_answering(world.store, deploy(world, policy, "canary", share=0.25))
    return policy.id


def test_without_a_canary_there_is_nothing_to_judge(world: World) -> None:
    assert CanaryWatch(world.store).look() is None


def test_a_bad_canary_is_taken_back_and_the_audit_log_says_why(world: World) -> None:
    policy_id = start_canary(world)
    watch = CanaryWatch(world.store)
    talk(world, canary=10, canary_bad=9, stable=20)
    assert watch.look().status == "Inconclusive"  # type: ignore[union-attr]  # nothing has concluded yet
    verdict = watch.look(at=now() + LATER)
    assert verdict is not None
    assert verdict.status == "Failed"
    served = deployments.served(world.store)
    assert served is not None
    assert served.canary is None
    row = deployments.history(world.store, 1)[0]
    assert (row.policy_id, row.role, row.actor) == (policy_id, "retired", "system")
    assert "9 of 10 conversations" in row.reason
    assert last_verdict(world.store) == (policy_id, "Failed", list(verdict.reasons))
    judged = world.store.all(AuditEvent, "action = 'canary.judged'", order="seq")
    assert [event.detail["status"] for event in judged] == ["Inconclusive", "Failed"]
    assert audit.verify(world.store).ok


def test_a_good_canary_stays_and_a_restart_counts_the_same(world: World) -> None:
    policy_id = start_canary(world)
    watch = CanaryWatch(world.store)
    talk(world, canary=10, canary_bad=0, stable=20)
    first = watch.look(at=now() + LATER)
    assert first is not None
    assert (first.status, first.evidence.canary, first.evidence.stable) == ("Inconclusive", 10, 20)
    assert watch.look(at=now() + LATER + 10) == first
    assert CanaryWatch(world.store).look(at=now() + LATER) == first
    assert deployments.served(world.store).canary.policy_id == policy_id  # type: ignore[union-attr]


def test_the_evidence_begins_where_the_canary_is_served_and_not_with_its_row(world: World) -> None:
    policy = add_candidate(world)
    approve(world, policy)
    row = deploy(world, policy, "canary", share=0.25)
    talk(
        world, canary=0, canary_bad=0, stable=100
    )  # the engine is still loading it: all are stable's, undrawn
    watch = CanaryWatch(world.store)
    verdict = watch.look(at=now() + LATER)
    assert verdict is not None
    assert (verdict.status, verdict.evidence.e_value, verdict.evidence.stable) == ("Inconclusive", 1.0, 0)
    deployments.note_answering(world.store, row)
    talk(world, canary=2, canary_bad=0, stable=4)
    for one in (watch, CanaryWatch(world.store)):
        verdict = one.look(at=now() + LATER)
        assert verdict is not None
        assert (verdict.evidence.canary, verdict.evidence.stable) == (2, 4)


def test_an_engine_that_dies_while_it_loads_the_canary_stops_it(world: World) -> None:
    policy = add_candidate(world)
    approve(world, policy)
    deploy(world, policy, "canary", share=0.25)
    for _ in range(2):
        record_failure(world.store, policy_id=policy.id, kind="engine_died")
    verdict = CanaryWatch(world.store).look()
    assert verdict is not None
    assert verdict.status == "Failed"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"answer": ""}, "were empty"),
        ({"finish_reason": "error"}, "requests failed"),
        ({"total_s": 0.8}, "times"),
    ],
)
def test_a_hard_stop_needs_no_feedback_and_no_waiting(
    world: World, changes: dict[str, object], word: str
) -> None:
    start_canary(world)
    served = deployments.served(world.store)
    assert served is not None
    assert served.canary is not None
    conversation = start_conversation(world)
    for row, more in ((served.stable, {}), (served.stable, {}), (served.canary, changes)) * 60:
        fields = {"policy_id": row.policy_id, "deployment_id": row.id, **more}
        record(world, conversation, **fields)
    verdict = CanaryWatch(world.store).look()
    assert verdict is not None
    assert verdict.status == "Failed"
    assert word in verdict.reasons[0]


@pytest.mark.parametrize(
    ("kind", "times", "word"),
    [
        ("wrong_policy", 1, "another policy answered 1 questions"),
        ("engine_died", 2, "the engine died 2 times"),
        ("error", 4, "4 of the canary's 64 requests failed"),
    ],
)
def test_what_left_no_turn_stops_a_canary_too(world: World, kind: FailureKind, times: int, word: str) -> None:
    policy_id = start_canary(world)
    served = deployments.served(world.store)
    assert served is not None
    assert served.canary is not None
    conversation = start_conversation(world)
    for row in (served.stable, served.canary) * 60:
        record(world, conversation, policy_id=row.policy_id, deployment_id=row.id)
    watch = CanaryWatch(world.store)
    for _ in range(times):
        verdict = watch.look()
        assert verdict is not None
        assert verdict.status != "Failed"
        record_failure(world.store, policy_id=policy_id, kind=kind)
    verdict = watch.look()
    assert verdict is not None
    assert verdict.status == "Failed"
    assert word in verdict.reasons[0]


def test_a_question_that_the_engine_does_not_begin_to_answer_is_booked_on_its_policy(tmp_path: Path) -> None:
    desk = make_desk(tmp_path)
    ask = desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")

    def fail(error: Exception) -> list[str]:
        async def nothing(**_: object) -> AsyncIterator[Piece]:
            raise error
            yield

        desk.engine.stream = nothing  # type: ignore[assignment,method-assign]
        with pytest.raises(type(error)):
            asyncio.run(desk.chat.complete(ask))
        found = failures_since(desk.world.store, (desk.world.base.id, ""), since=0)
        return [one.kind for one in found]

    assert fail(EngineUnavailable("gone")) == ["error"]
    assert fail(EngineBusy("full")) == ["error"]  # nobody's fault
    assert fail(ContextTooLong(9, 8)) == ["error"]  # the question's


def test_an_answer_of_another_policy_is_booked_on_the_one_that_was_asked(tmp_path: Path) -> None:
    desk = make_desk(tmp_path)

    async def another(**_: object) -> AsyncIterator[Piece]:
        yield Piece(
            text="Hi", token_ids=(1,), served_by="policy-other", prompt_token_ids=(1,), finish_reason=None
        )

    desk.engine.stream = another  # type: ignore[assignment,method-assign]
    with pytest.raises(WrongPolicy, match="policy-other"):
        asyncio.run(desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?")))
    (failure,) = failures_since(desk.world.store, (desk.world.base.id, ""), since=0)
    assert failure.kind == "wrong_policy"


def test_the_operator_reads_the_verdict_in_both_languages(world: World) -> None:
    assert verdict_html(Words("en"), world.store) == ""
    policy_id = start_canary(world)
    talk(world, canary=10, canary_bad=9, stable=20)
    CanaryWatch(world.store).look(at=now() + LATER)
    shown = verdict_html(Words("en"), world.store)
    assert "taken back" in shown
    assert policy_id in shown
    assert "9 of 10 conversations" in shown
    assert "取り下げ" in verdict_html(Words("ja"), world.store)
