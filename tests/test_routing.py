"""Which policy answers a conversation."""

from __future__ import annotations

import asyncio
from pathlib import Path

from assistant.routing import assign, draw
from chat_fixtures import Desk, make_desk, put_beside
from storage.outcomes import CONCLUDED_AFTER_S
from storage.records import Conversation, Deployment, Served, now
from storage_fixtures import record, start_conversation


def deployment(id: str, *, role: str = "stable", share: float = 1.0) -> Deployment:
    return Deployment(
        id=id,
        policy_id=f"policy-of-{id}",
        role=role,  # type: ignore[arg-type]
        share=share,
        actor="system",
        reason="test",
        created_at=0.0,
    )


STABLE = deployment("dep_1")
CANARY = deployment("dep_2", role="canary", share=0.1)
CONVERSATIONS = [f"conv_{number}" for number in range(20_000)]


def test_without_a_canary_everybody_gets_the_stable_policy() -> None:
    assert {assign(id, Served(stable=STABLE)).id for id in CONVERSATIONS} == {"dep_1"}


def test_a_canary_gets_its_share_of_the_conversations() -> None:
    served = Served(stable=STABLE, canary=CANARY)
    hits = sum(assign(id, served) is CANARY for id in CONVERSATIONS)
    # Binomial(20000, 0.1): sd = sqrt(20000 * 0.1 * 0.9) = 42.4; five of them on either side of 2000.
    assert 1788 <= hits <= 2212


def test_a_conversation_stays_where_it_is() -> None:
    served = Served(stable=STABLE, canary=CANARY)
    assert all(assign(id, served) is assign(id, served) for id in CONVERSATIONS[:100])


def test_a_conversation_keeps_its_first_policy_when_the_share_changes() -> None:
    more = Served(stable=STABLE, canary=deployment("dep_3", role="canary", share=0.5))
    for drawn in (STABLE, CANARY):
        arm = STABLE if drawn is STABLE else more.canary
        by = arm.policy_id if arm else None
        assert {assign(id, more, first_answer_by=by) for id in CONVERSATIONS[:200]} == {arm}
    other = {assign(id, more, first_answer_by="policy-before").role for id in CONVERSATIONS[:200]}
    assert other == {"stable", "canary"}  # the policy that answered it is neither: drawn again


def test_another_canary_asks_other_conversations() -> None:
    both = sum(draw(id, "dep_2") < 0.1 and draw(id, "dep_3") < 0.1 for id in CONVERSATIONS)
    # Independent draws: 1% of 20000 = 200, sd 14.
    assert 130 <= both <= 270


def test_a_full_share_leaves_nobody_out_and_an_empty_one_takes_nobody() -> None:
    everyone = Served(stable=STABLE, canary=deployment("dep_2", role="canary", share=1.0))
    nobody = Served(stable=STABLE, canary=deployment("dep_2", role="canary", share=0.0))
    assert all(assign(id, everyone).id == "dep_2" for id in CONVERSATIONS[:200])
    assert all(assign(id, nobody).id == "dep_1" for id in CONVERSATIONS[:200])


# -- conversations that were going on when the canary began, which its evidence leaves out too -----------------------


def answered_by(desk: Desk, conversation: Conversation) -> str:
    with desk.release.lease(conversation.id) as deployment:
        return deployment.policy_id


def ask(desk: Desk, conversation: Conversation) -> str:
    question = desk.chat.ask(desk.world.staff, conversation, "And then?")
    return asyncio.run(desk.chat.complete(question)).policy_id


def test_a_conversation_that_was_going_on_when_the_canary_began_stays_with_stable(tmp_path: Path) -> None:
    desk = make_desk(tmp_path / "data")
    going_on = [start_conversation(desk.world) for _ in range(30)]
    assert {ask(desk, conversation) for conversation in going_on} == {desk.world.base.id}
    put_beside(desk, "canary", share=0.5)
    for _ in range(2):  # also when stable has answered it since
        assert {ask(desk, conversation) for conversation in going_on} == {desk.world.base.id}
    assert len({answered_by(desk, start_conversation(desk.world)) for _ in range(30)}) == 2


def test_an_answer_that_was_under_way_when_the_canary_began_keeps_its_conversation_with_stable(
    tmp_path: Path,
) -> None:
    desk = make_desk(tmp_path / "data")
    put_beside(desk, "canary")
    conversation = start_conversation(desk.world)
    record(desk.world, conversation, total_s=60.0)  # it ended after that, and is recorded then
    assert answered_by(desk, conversation) == desk.world.base.id


def test_a_conversation_that_rested_for_half_an_hour_before_the_canary_is_drawn_as_a_new_one(
    tmp_path: Path,
) -> None:
    desk = make_desk(tmp_path / "data")
    conversation = start_conversation(desk.world)
    record(desk.world, conversation, created_at=now() - CONCLUDED_AFTER_S - 60)
    canary = put_beside(desk, "canary")
    assert answered_by(desk, conversation) == canary.policy_id
