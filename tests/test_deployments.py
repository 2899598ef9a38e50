"""What is served follows from the rows alone; nothing unapproved gets there; a rollback is one more row."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import deployments, policies
from storage.errors import Conflict, InvalidField, NotAllowed, NotFound
from storage.records import Deployment, Policy, new_id, now
from storage.store import Store
from storage_fixtures import World, add_candidate, approve, deploy, make_evaluation, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def approved(world: World) -> Policy:
    policy = add_candidate(world)
    approve(world, policy)
    return policy


def served(world: World) -> tuple[str, str | None, str | None]:
    """Return the ids of the stable, the previous and the canary policy."""
    now_served = deployments.served(world.store)
    assert now_served is not None
    previous, canary = now_served.previous, now_served.canary
    return (
        now_served.stable.policy_id,
        previous.policy_id if previous else None,
        canary.policy_id if canary else None,
    )


def test_nothing_is_served_before_the_first_deployment(tmp_path: Path) -> None:
    assert deployments.served(Store(tmp_path)) is None


def test_the_latest_stable_row_is_served_and_the_one_before_is_kept(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    assert served(world) == (first.id, world.base.id, None)
    deploy(world, second)
    assert served(world) == (second.id, first.id, None)


def test_a_rollback_is_one_more_row(world: World) -> None:
    policy = approved(world)
    deploy(world, policy)
    deploy(world, world.base)
    assert served(world) == (world.base.id, policy.id, None)
    assert [row.policy_id for row in deployments.history(world.store)] == [
        world.base.id,
        policy.id,
        world.base.id,
    ]
    assert len(deployments.history(world.store, limit=2)) == 2


def test_there_is_no_way_back_to_a_policy_of_another_base(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    other = policies.register_base(world.store, base_path="/models/other", base_sha256="07" * 32)
    deploy(world, other)
    assert served(world) == (other.id, None, None)
    deploy(world, second)
    assert served(world) == (second.id, first.id, None)


def test_the_previous_policy_is_another_one_even_after_deploying_twice(world: World) -> None:
    policy = approved(world)
    deploy(world, policy)
    deploy(world, policy)
    assert served(world) == (policy.id, world.base.id, None)


def test_a_canary_serves_its_share_until_it_is_promoted_or_retired(world: World) -> None:
    first, second = approved(world), approved(world)
    row = deploy(world, first, "canary", share=0.25)
    assert served(world) == (world.base.id, None, first.id)
    assert row.share == 0.25
    deploy(world, first, "retired")
    assert served(world) == (world.base.id, None, None)
    deploy(world, second, "canary")
    deploy(world, second)
    assert served(world) == (second.id, world.base.id, None)


def test_a_rollback_ends_a_canary(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    deploy(world, second, "canary")
    deploy(world, world.base)
    assert served(world) == (world.base.id, first.id, None)


def test_there_is_at_most_one_canary(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first, "canary")
    with pytest.raises(Conflict, match=f"{first.id} is the canary already: roll it back or promote it first"):
        deploy(world, second, "canary")
    deploy(world, first, "canary", share=0.5)  # the same one may get another share
    assert served(world)[2] == first.id


def put(world: World, policy: Policy, role: str, share: float) -> Deployment:
    """Write a row as an earlier version did, which let a second canary take the place of the first."""
    fields = {"actor": "system", "reason": "before", "created_at": now()}
    row = Deployment(id=new_id("deployment"), policy_id=policy.id, role=role, share=share, **fields)  # type: ignore[arg-type]
    with world.store.transaction("system") as changes:
        changes.insert(row)
        changes.audit("policy.deployed", policy.id)
    return row


def test_a_canary_that_was_superseded_does_not_come_back_by_itself(world: World) -> None:
    first, second = approved(world), approved(world)
    put(world, first, "canary", 0.1)
    put(world, second, "canary", 0.1)
    assert served(world)[2] == second.id
    deploy(world, second, "retired")
    assert served(world)[2] is None


def stage_ids(world: World) -> list[str]:
    now_served = deployments.served(world.store)
    assert now_served is not None
    return [stage.deployment.id for stage in deployments.stages_of(world.store, now_served)]


def test_the_stay_of_a_canary_is_only_the_present_one(world: World) -> None:
    first, second = approved(world), approved(world)
    assert stage_ids(world) == []
    deploy(world, first, "canary")
    deploy(world, second)  # ends the canary
    again = deploy(world, first, "canary")
    assert stage_ids(world) == [again.id]
    put(world, second, "canary", 0.2)  # another one's time is not the first one's
    third = put(world, first, "canary", 0.3)
    fourth = deploy(world, first, "canary", share=0.4)
    assert stage_ids(world) == [third.id, fourth.id]


def test_a_canary_answers_since_the_server_says_so_and_not_since_its_row(world: World) -> None:
    def since() -> float | None:
        now_served = deployments.served(world.store)
        assert now_served is not None
        return now_served.canary_since

    policy = approved(world)
    row = deploy(world, policy, "canary")
    assert since() is None
    noted = deployments.note_answering(world.store, row)
    assert since() == noted
    assert noted > row.created_at
    assert deployments.note_answering(world.store, row) == noted  # a server that starts again
    larger = deploy(world, policy, "canary", share=0.5)
    assert since() == noted
    deployments.note_answering(world.store, larger)
    assert since() == noted
    now_served = deployments.served(world.store)
    assert now_served is not None
    assert [stage.share for stage in deployments.stages_of(world.store, now_served)] == [0.1, 0.5]
    deploy(world, policy, "retired")
    assert since() is None
    deploy(world, policy, "canary")
    assert since() is None


def shadow(world: World) -> str | None:
    now_served = deployments.served(world.store)
    assert now_served is not None
    return now_served.shadow.policy_id if now_served.shadow else None


def test_a_shadow_stands_beside_what_answers_until_it_is_retired_or_answers_itself(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first, "shadow", share=0.5)
    deploy(world, second, "canary")
    assert (*served(world), shadow(world)) == (world.base.id, None, second.id, first.id)
    deploy(world, second, "retired")
    assert (*served(world), shadow(world)) == (world.base.id, None, None, first.id)
    deploy(world, first, "canary")
    assert (*served(world), shadow(world)) == (world.base.id, None, first.id, None)
    deploy(world, second, "shadow")
    deploy(world, second, "retired")
    assert (*served(world), shadow(world)) == (world.base.id, None, first.id, None)


def test_another_stable_policy_ends_a_shadow_because_it_was_held_against_the_one_before(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first, "shadow")
    deploy(world, second)
    assert (*served(world), shadow(world)) == (second.id, world.base.id, None, None)


def test_there_is_at_most_one_shadow(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first, "shadow")
    with pytest.raises(Conflict, match=f"{first.id} is in the shadow already"):
        deploy(world, second, "shadow")
    deploy(world, first, "shadow", share=1.0)  # the same one may get another share
    assert shadow(world) == first.id


@pytest.mark.parametrize("role", ["stable", "canary", "shadow"])
def test_an_unapproved_policy_is_never_deployed(world: World, role: str) -> None:
    never, revoked, changed = add_candidate(world), approved(world), approved(world)
    policies.decide(
        world.store,
        policy_id=revoked.id,
        person_id=world.admin.id,
        decision="reject",
        reason="second thoughts",
    )
    policies.add_evaluation(world.store, make_evaluation(world, changed, passed=True))
    for policy in (never, revoked, changed, add_candidate(world, passed=False)):
        with pytest.raises(NotAllowed, match=policy.id):
            deploy(world, policy, role)
    assert served(world) == (world.base.id, None, None)


@pytest.mark.parametrize(
    ("role", "share"),
    [
        ("stable", 0.5),
        ("canary", 0.0),
        ("canary", 1.1),
        ("canary", -0.1),
        ("canary", float("nan")),
        ("shadow", 0.0),
        ("shadow", 1.1),
        ("retired", 1.0),
    ],
)
def test_a_share_must_fit_its_role(world: World, role: str, share: float) -> None:
    with pytest.raises(InvalidField, match=r"^share"):
        deploy(world, approved(world), role, share=share)


def test_an_unknown_role_or_policy_is_named(world: World) -> None:
    with pytest.raises(InvalidField, match=r"^role"):
        deployments.deploy(
            world.store,
            policy_id=world.base.id,
            role="blue",
            share=1,
            actor="system",
            reason="x",  # type: ignore[arg-type]
        )
    with pytest.raises(NotFound, match="policy-x"):
        deployments.deploy(
            world.store, policy_id="policy-x", role="stable", share=1, actor="system", reason="x"
        )


def test_the_stable_policy_is_no_canary_and_cannot_be_retired(world: World) -> None:
    for role in ("canary", "shadow", "retired"):
        with pytest.raises(Conflict, match=world.base.id):
            deploy(world, world.base, role)


def test_the_first_deployment_is_stable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = policies.register_base(store, base_path="/b", base_sha256="b" * 64)
    with pytest.raises(Conflict, match="stable first"):
        deployments.deploy(store, policy_id=base.id, role="canary", share=0.1, actor="system", reason="x")


def test_only_operators_and_the_system_deploy_and_they_say_why(world: World) -> None:
    with pytest.raises(NotAllowed, match="operator"):
        deployments.deploy(
            world.store, policy_id=world.base.id, role="stable", share=1, actor=world.staff.id, reason="x"
        )
    with pytest.raises(NotAllowed, match="nobody"):
        deployments.deploy(
            world.store, policy_id=world.base.id, role="stable", share=1, actor="person_x", reason="x"
        )
    with pytest.raises(InvalidField, match=r"^reason"):
        deployments.deploy(
            world.store, policy_id=world.base.id, role="stable", share=1, actor="system", reason=" "
        )
