"""Which policy answers a conversation."""

from __future__ import annotations

from assistant.routing import assign, draw
from storage.records import Deployment, Served


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
