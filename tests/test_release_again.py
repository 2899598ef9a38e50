"""Another share for a canary, a policy that was taken back and is approved anew, and no way back to it by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

import app
from assistant import release
from storage import deployments, policies
from storage.errors import Conflict, NotAllowed
from storage.records import Approval, Policy, Served
from storage_fixtures import World, add_candidate, approve, deploy, make_evaluation, make_world

SHARES = ({}, {"canary_percent": 10.0}, {"shadow_percent": 10.0})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("assistant.decisions.check_files", lambda *_: None)  # these adapters have none
    return make_world(tmp_path / "data")


def approved(world: World) -> Policy:
    policy = add_candidate(world)
    approve(world, policy)
    return policy


def approve_as(world: World, policy: Policy, **share: float) -> None:
    release.approve(world.store, policy_id=policy.id, person=world.admin, reason="better", **share)


def roll_back(world: World, expected: Policy | None = None) -> None:
    release.rollback(
        world.store, actor=world.admin.id, reason="worse", expected=expected.id if expected else None
    )


def served(world: World) -> Served:
    return release.serving(world.store)


def decisions(world: World, policy: Policy) -> int:
    return len(world.store.all(Approval, "policy_id = ?", [policy.id]))


# -- another share ----------------------------------------------------------------------------------------


def test_a_canary_gets_another_share_and_its_evidence_goes_on(world: World) -> None:
    policy = add_candidate(world)
    approve_as(world, policy, canary_percent=5)
    began = deployments.note_answering(world.store, served(world).canary)  # type: ignore[arg-type]
    approve_as(world, policy, canary_percent=25)
    now_served = served(world)
    assert now_served.canary is not None
    assert now_served.canary.share == 0.25
    assert now_served.canary_since == began
    assert [stage.share for stage in deployments.stages_of(world.store, now_served)] == [0.05, 0.25]
    assert decisions(world, policy) == 1  # the same evidence is decided on once


def test_a_canary_whose_evidence_changed_is_decided_on_again_before_it_gets_another_share(
    world: World,
) -> None:
    policy = add_candidate(world)
    approve_as(world, policy, canary_percent=5)
    policies.add_evaluation(world.store, make_evaluation(world, policy, passed=False))
    with pytest.raises(Conflict, match="refused by its gate"):
        approve_as(world, policy, canary_percent=25)
    policies.add_evaluation(world.store, make_evaluation(world, policy, passed=True))
    with pytest.raises(NotAllowed, match="no approval of exactly its present evidence"):
        deploy(world, policy, "canary", share=0.25)
    approve_as(world, policy, canary_percent=25)
    assert decisions(world, policy) == 2


def test_all_conversations_are_given_to_a_canary_by_promotion(world: World) -> None:
    policy = add_candidate(world)
    approve_as(world, policy, canary_percent=5)
    with pytest.raises(Conflict, match="is the canary already: promote it"):
        approve_as(world, policy)
    assert served(world).canary.policy_id == policy.id  # type: ignore[union-attr]


# -- approved anew ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_a_policy_that_was_rolled_back_is_approved_anew(world: World, share: dict[str, float]) -> None:
    policy = add_candidate(world)
    approve_as(world, policy)
    roll_back(world, policy)
    assert policies.standing(world.store, policy.id) == "previous"
    approve_as(world, policy, **share)
    role = "canary" if "canary_percent" in share else "shadow" if share else "stable"
    assert getattr(served(world), role).policy_id == policy.id
    assert decisions(world, policy) == 2  # it was taken back: somebody has to want it again, with a reason


@pytest.mark.parametrize("share", SHARES)
def test_a_canary_that_was_taken_back_is_approved_anew(world: World, share: dict[str, float]) -> None:
    policy = add_candidate(world)
    approve_as(world, policy, canary_percent=5)
    roll_back(world, policy)
    approve_as(world, policy, **share)
    assert decisions(world, policy) == 2


def test_the_stable_policy_is_not_approved_again(world: World) -> None:
    policy = add_candidate(world)
    approve_as(world, policy)
    for share in SHARES:
        with pytest.raises(Conflict):
            approve_as(world, policy, **share)
    assert decisions(world, policy) == 1


# -- no way back by accident --------------------------------------------------------------------------------


def test_a_second_rollback_without_a_name_does_not_bring_back_what_was_rolled_back(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = approved(world)
    deploy(world, policy)
    command = ["rollback", "--data", str(world.store.data), "--as", world.admin.name, "--reason", "worse"]
    assert app.main(command) == 0
    assert app.main(command) == 2
    message = capsys.readouterr().err
    assert f"{policy.id} was rolled back last" in message
    assert f"rollback {world.base.id}" in message
    assert served(world).stable.policy_id == world.base.id
    assert app.main([command[0], world.base.id, *command[1:]]) == 0
    assert served(world).stable.policy_id == policy.id
    assert app.main(command) == 2  # and no way back from there by accident either


def test_what_was_approved_anew_is_rolled_back_without_a_name(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    deploy(world, second)
    roll_back(world)
    approve_as(world, second)
    roll_back(world)
    assert served(world).stable.policy_id == first.id
    third = approved(world)
    deploy(world, third)
    approve_as(world, second)  # it was retired by now
    roll_back(world)
    assert served(world).stable.policy_id == third.id


def test_a_new_policy_after_a_rollback_is_rolled_back_without_a_name(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    roll_back(world)
    deploy(world, second)
    roll_back(world)
    assert served(world).stable.policy_id == world.base.id
