"""A decision is about a policy that somebody saw: when another has taken its place meanwhile, nothing is done."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest

import app
from assistant import release
from assistant.canary_watch import CanaryWatch
from assistant.web.pages.frame import Frame
from assistant.web.pages.served_page import ServedPage
from assistant.web.words import Words
from storage import deployments, policies
from storage.errors import Conflict, InvalidField, NotAllowed
from storage.records import Policy, Served
from storage.store import Store
from storage_fixtures import World, add_candidate, approve, deploy, make_world
from web_fixtures import make_site, start_canary


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def approved(world: World) -> Policy:
    policy = add_candidate(world)
    approve(world, policy)
    return policy


def served(world: World) -> Served:
    return release.serving(world.store)


def roll_back(world: World, expected: Policy | None) -> None:
    release.rollback(
        world.store, actor=world.admin.id, reason="worse", expected=expected.id if expected else None
    )


def kotae(world: World, *arguments: str) -> int:
    """Run a command as the administrator."""
    command = [*arguments, "--data", str(world.store.data), "--as", world.admin.name, "--reason", "worse"]
    return app.main(command)


# -- a rollback takes back what it was meant for ---------------------------------------------------------------


def test_a_rollback_of_a_canary_that_is_gone_already_leaves_stable_alone(world: World) -> None:
    stable, canary = approved(world), approved(world)
    deploy(world, stable)
    deploy(world, canary, "canary")
    release.retire(world.store, policy_id=canary.id, actor="system", reason="canary failed")
    with pytest.raises(Conflict, match=f"{stable.id} is stable"):
        roll_back(world, canary)
    assert served(world).stable.policy_id == stable.id


def test_two_rollbacks_of_one_policy_do_not_bring_it_back(world: World) -> None:
    good, bad = approved(world), approved(world)
    deploy(world, good)
    deploy(world, bad)
    roll_back(world, bad)
    with pytest.raises(Conflict, match=f"{good.id} is stable"):
        roll_back(world, bad)
    assert served(world).stable.policy_id == good.id


def test_stable_is_not_taken_back_over_the_head_of_a_canary(world: World) -> None:
    stable, canary = approved(world), approved(world)
    deploy(world, stable)
    deploy(world, canary, "canary")
    with pytest.raises(Conflict, match=f"{canary.id} is the canary"):
        roll_back(world, stable)
    roll_back(world, canary)
    roll_back(world, stable)
    assert served(world).stable.policy_id == world.base.id


def test_without_a_name_a_rollback_takes_back_what_is_newest(world: World) -> None:
    stable, canary = approved(world), approved(world)
    deploy(world, stable)
    deploy(world, canary, "canary")
    roll_back(world, None)
    assert served(world).canary is None
    roll_back(world, None)
    assert served(world).stable.policy_id == world.base.id


def between_reading_and_writing(monkeypatch: pytest.MonkeyPatch, world: World, happens: object) -> None:
    """Let something be decided after a decision was read, and before it is written."""
    write = deployments.deploy

    def late(store: Store, **row: object) -> object:
        monkeypatch.setattr(deployments, "deploy", write)
        happens()  # type: ignore[operator]
        return write(store, **row)  # type: ignore[arg-type]

    monkeypatch.setattr(deployments, "deploy", late)


def test_the_expectation_is_compared_where_the_row_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first)
    deploy(world, second)
    between_reading_and_writing(monkeypatch, world, lambda: deploy(world, first))
    with pytest.raises(Conflict, match=f"{first.id} is stable"):
        roll_back(world, None)
    assert served(world).stable.policy_id == first.id


def test_a_canary_that_is_taken_back_meanwhile_is_not_promoted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = approved(world)
    deploy(world, canary, "canary")
    between_reading_and_writing(monkeypatch, world, lambda: deploy(world, canary, "retired"))
    with pytest.raises(Conflict, match=f"{world.base.id} is stable"):
        release.promote(world.store, policy_id=canary.id, person=world.admin, reason="good")
    assert served(world).stable.policy_id == world.base.id


@pytest.mark.parametrize("role", ["stable", "retired"])
def test_the_watcher_takes_back_the_canary_it_judged_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    stable, canary = approved(world), approved(world)
    deploy(world, stable)
    deploy(world, canary, "canary")
    watch = CanaryWatch(world.store)
    keep = watch._keep

    def decide_meanwhile(policy_id: str, verdict: object) -> None:
        keep(policy_id, verdict)  # type: ignore[arg-type]
        deploy(world, canary, role)

    monkeypatch.setattr(watch, "_keep", decide_meanwhile)
    monkeypatch.setattr("assistant.canary_watch.hard_stops", lambda *_, **__: ["it is on fire"])
    verdict = watch.look()
    assert verdict is not None
    assert verdict.status == "Failed"
    assert served(world).stable.policy_id == (canary if role == "stable" else stable).id


def test_another_shadow_is_not_withdrawn_in_the_place_of_the_one_that_was_meant(world: World) -> None:
    first, second = approved(world), approved(world)
    deploy(world, first, "shadow")
    deploy(world, first, "retired")
    deploy(world, second, "shadow")
    with pytest.raises(Conflict, match=f"{second.id} is the shadow"):
        release.withdraw(world.store, actor=world.admin.id, reason="worse", expected=first.id)
    with pytest.raises(Conflict, match="neither the canary nor the shadow"):
        release.retire(world.store, policy_id=first.id, actor=world.admin.id, reason="worse")
    release.withdraw(world.store, actor=world.admin.id, reason="worse", expected=second.id)
    assert served(world).shadow is None


def test_the_command_takes_the_policy_to_take_back(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    stable, canary = approved(world), approved(world)
    deploy(world, stable)
    deploy(world, canary, "canary")
    assert kotae(world, "rollback", canary.id) == 0
    assert kotae(world, "rollback", canary.id) == 2
    assert f"{stable.id} is stable" in capsys.readouterr().err
    assert kotae(world, "rollback") == 0
    assert served(world).stable.policy_id == world.base.id


def test_the_page_takes_back_what_it_showed(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    canary = start_canary(site, share=0.25)
    page = ServedPage(
        Frame(services=site.services, words=Words("en"), app="operator", role="operator")  # type: ignore[arg-type]
    )

    async def build() -> None:
        with gr.Blocks() as blocks, gr.Tab() as tab:
            page.build(blocks, tab)

    asyncio.run(build())  # outside a running loop Gradio makes one that it never closes
    request = SimpleNamespace(username=site.people["admin"].id)
    seen = page.refresh(request)[page.seen]  # type: ignore[arg-type]
    assert seen["canary"] == canary
    asyncio.run(page.on_promote("good", seen, request))  # type: ignore[arg-type]
    for outdated in (page.on_rollback, page.on_promote):
        with pytest.raises(gr.Error, match=f"{canary} is stable now|not the canary"):
            asyncio.run(outdated("worse", {**seen, "canary": "policy-x"}, request))  # type: ignore[arg-type]
    assert release.serving(site.store).stable.policy_id == canary
    asyncio.run(page.on_rollback("worse", page.refresh(request)[page.seen], request))  # type: ignore[arg-type]
    assert release.serving(site.store).stable.policy_id == seen["stable"]


# -- what is rejected answers nobody -----------------------------------------------------------------------


def reject(world: World, policy: Policy) -> str:
    release.reject(world.store, policy_id=policy.id, person=world.admin, reason="too curt")
    return policies.standing(world.store, policy.id)


@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_what_is_rejected_beside_stable_is_withdrawn(world: World, role: str) -> None:
    policy = approved(world)
    deploy(world, policy, role)
    assert reject(world, policy) == "rejected"
    assert served(world) == Served(stable=world.deployment)


def test_the_stable_policy_is_rolled_back_before_it_is_rejected(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = approved(world)
    deploy(world, policy)
    assert kotae(world, "reject", policy.id) == 2
    assert "roll it back first" in capsys.readouterr().err
    assert policies.standing(world.store, policy.id) == "stable"
    assert policies.is_approved(world.store, policy.id)
    roll_back(world, policy)
    assert kotae(world, "reject", policy.id) == 0
    assert f"{policy.id} is rejected" in capsys.readouterr().out


def test_a_rejected_policy_is_no_way_back(world: World) -> None:
    first, second, third = approved(world), approved(world), approved(world)
    for policy in (first, second, third):
        deploy(world, policy)
    assert reject(world, second) == "rejected"
    assert served(world).previous.policy_id == first.id  # type: ignore[union-attr]
    roll_back(world, third)
    assert served(world).stable.policy_id == first.id
    approve(world, second)  # a changed mind
    deploy(world, second)
    deploy(world, first)
    assert served(world).previous.policy_id == second.id  # type: ignore[union-attr]


def test_the_command_says_where_a_rejected_policy_stands(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = approved(world)
    deploy(world, policy, "canary")
    assert kotae(world, "reject", policy.id, "--json") == 0
    assert '"standing": "rejected"' in capsys.readouterr().out
    assert served(world).canary is None


class PowerCut(Exception):
    """The process ends here."""


def test_a_rejection_that_was_cut_off_leaves_no_rejected_canary_answering_and_is_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = approved(world)
    deploy(world, policy, "canary")
    for module, step in ((deployments, "deploy"), (policies, "decide")):

        def cut_off(*_: object, **__: object) -> None:
            raise PowerCut

        with monkeypatch.context() as patched:
            patched.setattr(module, step, cut_off)
            with pytest.raises(PowerCut):
                reject(world, policy)
        now_served = served(world)
        assert now_served.canary is None or policies.is_approved(world.store, policy.id)
    assert reject(world, policy) == "rejected"
    assert served(world).canary is None


def test_a_rejection_that_is_refused_withdraws_nothing(world: World) -> None:
    policy = approved(world)
    deploy(world, policy, "canary")
    with pytest.raises(NotAllowed):
        release.reject(world.store, policy_id=policy.id, person=world.staff, reason="too curt")
    with pytest.raises(InvalidField, match="reason"):
        release.reject(world.store, policy_id=policy.id, person=world.admin, reason=" ")
    assert served(world).canary is not None


def test_a_rejected_shadow_that_is_also_the_way_back_is_withdrawn(world: World) -> None:
    policy = approved(world)
    deploy(world, policy)
    deploy(world, world.base)
    deploy(world, policy, "shadow")
    assert reject(world, policy) == "rejected"
    assert served(world) == Served(stable=served(world).stable)
