"""A policy never changes, and a decision on it is worth exactly the bytes that were decided on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from storage import audit, people, policies
from storage.errors import Conflict, InvalidField, NotAllowed, NotFound
from storage.records import Approval, Policy
from storage.store import Store
from storage_fixtures import (
    BASE_SHA256,
    World,
    add_candidate,
    approve,
    deploy,
    make_evaluation,
    make_world,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def decide(world: World, policy: Policy, decision: str) -> Approval:
    return policies.decide(
        world.store,
        policy_id=policy.id,
        person_id=world.admin.id,
        decision=decision,  # type: ignore[arg-type]
        reason="because",
    )


def test_a_base_is_registered_once_under_a_name_of_its_digest(world: World) -> None:
    again = policies.register_base(world.store, base_path="/models/base", base_sha256=BASE_SHA256)
    assert again == world.base
    assert again.id == f"policy-base-{BASE_SHA256[:8]}"
    assert policies.list_policies(world.store) == [world.base]


def test_a_base_that_was_moved_takes_its_policies_along_and_the_evidence_still_holds(world: World) -> None:
    policy = add_candidate(world)
    approve(world, policy)
    moved = policies.register_base(world.store, base_path="/elsewhere", base_sha256=BASE_SHA256)
    assert moved.id == world.base.id
    assert {policy.base_path for policy in policies.list_policies(world.store)} == {"/elsewhere"}
    assert policies.is_approved(world.store, policy.id)
    assert audit.verify(world.store).ok


def test_restored_adapters_are_found_in_the_new_folder(world: World) -> None:
    policy = add_candidate(world)
    folder = world.store.data / "adapters" / str(policy.adapter_sha256)
    folder.mkdir(parents=True)
    [moved] = policies.relocate_adapters(world.store)
    assert moved.adapter_path == str(folder)
    assert policies.relocate_adapters(world.store) == []
    assert audit.verify(world.store).ok


def test_policy_ids_are_numbered_and_never_given_twice(world: World) -> None:
    other = Store(world.store.data)
    ids = [policies.new_policy_id(store) for store in (world.store, other, world.store)]
    assert [name[:12] for name in ids] == ["policy-0001-", "policy-0002-", "policy-0003-"]
    assert len(set(ids)) == 3


def test_an_id_that_was_used_is_refused(world: World) -> None:
    policy = add_candidate(world)
    with pytest.raises(Conflict):
        policies.add_policy(world.store, dataclasses.replace(policy, adapter_sha256="9" * 64))
    assert policies.get_policy(world.store, policy.id) == policy


def test_a_policy_is_added_only_as_it_can_be_served(world: World) -> None:
    policy = add_candidate(world)
    named = dataclasses.replace(policy, id=policies.new_policy_id(world.store))
    refused: list[tuple[str, Policy]] = [
        ("adapter_sha256", dataclasses.replace(named, adapter_sha256=None, adapter_path=None)),
        ("adapter_sha256", dataclasses.replace(named, adapter_sha256="short")),
        ("adapter_path", dataclasses.replace(named, adapter_path="relative/path")),
        ("base_sha256", dataclasses.replace(named, base_sha256="c" * 64)),
        ("parent_id", dataclasses.replace(named, parent_id="policy-x")),
        ("run_id", dataclasses.replace(named, run_id="run-x")),
    ]
    for field, wrong in refused:
        with pytest.raises(InvalidField, match=rf"^{field}"):
            policies.add_policy(world.store, wrong)


def test_an_approval_holds_the_digest_of_the_evidence(world: World) -> None:
    policy = add_candidate(world)
    approval = decide(world, policy, "approve")
    assert approval.sha256 == policies.evidence_sha256(world.store, policy.id)
    assert policies.approval_of(world.store, policy.id) == approval
    assert policies.is_approved(world.store, policy.id)


def test_a_later_evaluation_voids_an_approval_until_it_is_given_again(world: World) -> None:
    policy = add_candidate(world)
    approve(world, policy)
    policies.add_evaluation(world.store, make_evaluation(world, policy, passed=True))
    assert not policies.is_approved(world.store, policy.id)
    approve(world, policy)
    assert policies.is_approved(world.store, policy.id)


def test_the_digest_of_the_evidence_differs_between_policies(world: World) -> None:
    digests = {policies.evidence_sha256(world.store, add_candidate(world).id) for _ in range(2)}
    assert len(digests) == 2


@pytest.mark.parametrize("passed", [False, None])
def test_only_a_candidate_that_passed_its_gate_may_be_approved(world: World, passed: bool | None) -> None:
    policy = add_candidate(world, passed=passed)
    with pytest.raises(Conflict, match=policy.id):
        decide(world, policy, "approve")
    assert decide(world, policy, "reject").decision == "reject"


def test_a_base_needs_no_decision(world: World) -> None:
    with pytest.raises(Conflict, match="base"):
        decide(world, world.base, "approve")


def test_the_same_decision_twice_is_a_conflict_and_a_changed_mind_is_not(world: World) -> None:
    policy = add_candidate(world)
    decide(world, policy, "approve")
    with pytest.raises(Conflict, match="already"):
        decide(world, policy, "approve")
    decide(world, policy, "reject")
    assert not policies.is_approved(world.store, policy.id)
    decide(world, policy, "approve")
    assert policies.is_approved(world.store, policy.id)


@pytest.mark.parametrize("role", ["staff", "reviewer"])
def test_only_operators_decide(world: World, role: str) -> None:
    policy = add_candidate(world)
    people.set_role(world.store, world.other.id, role=role, actor="system")  # type: ignore[arg-type]
    with pytest.raises(NotAllowed, match="operator"):
        policies.decide(
            world.store, policy_id=policy.id, person_id=world.other.id, decision="approve", reason="x"
        )
    people.set_role(world.store, world.other.id, role="operator", actor="system")
    policies.decide(
        world.store, policy_id=policy.id, person_id=world.other.id, decision="approve", reason="x"
    )


@pytest.mark.parametrize("reason", ["", " \n"])
def test_a_decision_needs_a_reason(world: World, reason: str) -> None:
    policy = add_candidate(world)
    with pytest.raises(InvalidField, match=r"^reason"):
        policies.decide(
            world.store, policy_id=policy.id, person_id=world.admin.id, decision="approve", reason=reason
        )


def test_standing_follows_a_policy_from_candidate_to_retired(world: World) -> None:
    def standing(policy: Policy) -> str:
        return policies.standing(world.store, policy.id)

    assert standing(world.base) == "stable"
    first, second, third = (add_candidate(world) for _ in range(3))
    assert standing(first) == "candidate"
    assert standing(add_candidate(world, passed=None)) == "candidate"
    assert standing(add_candidate(world, passed=False)) == "refused"
    approve(world, first)
    assert standing(first) == "approved"
    deploy(world, first, "shadow")
    assert standing(first) == "shadow"
    deploy(world, first, "canary")
    assert standing(first) == "canary"
    deploy(world, first)
    assert (standing(first), standing(world.base)) == ("stable", "previous")
    for policy in (second, third):
        approve(world, policy)
        deploy(world, policy)
    assert [standing(policy) for policy in (first, second, third, world.base)] == [
        "retired", "previous", "stable", "base"]  # fmt: skip
    decide(world, first, "reject")
    assert standing(first) == "rejected"


def test_an_unknown_policy_is_named(world: World) -> None:
    with pytest.raises(NotFound, match="policy-x"):
        policies.standing(world.store, "policy-x")
