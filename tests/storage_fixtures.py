"""A small world for tests of what is stored: an admin, a member of staff, a base policy that is served."""

from __future__ import annotations

import itertools
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage import conversations, deployments, feedback, people, policies
from storage.processes import name_of_process, process_started_at
from storage.records import (
    Conversation,
    Deployment,
    Evaluation,
    Judgement,
    Person,
    Policy,
    RewardModel,
    Rubric,
    Run,
    ShadowAnswer,
    Snapshot,
    Turn,
    new_id,
    now,
)
from storage.runs import add_reward_model, add_snapshot, close_run, open_run
from storage.store import Store

BASE_SHA256 = "ba5e" * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What nearly every test of storage needs."""

    store: Store
    admin: Person
    staff: Person
    other: Person
    base: Policy
    deployment: Deployment


def make_world(data: Path) -> World:
    store = Store(data)
    base = policies.register_base(store, base_path="/models/base", base_sha256=BASE_SHA256)
    return World(
        store=store,
        admin=people.add_person(store, name="Admin", role="admin", actor="system"),
        staff=people.add_person(store, name="Staff", role="staff", actor="system"),
        other=people.add_person(store, name="Other", role="staff", actor="system"),
        base=base,
        deployment=deployments.deploy(
            store, policy_id=base.id, role="stable", share=1.0, actor="system", reason="first start"
        ),
    )


def start_conversation(world: World) -> Conversation:
    return conversations.create_conversation(world.store, person_id=world.staff.id)


def make_turn(world: World, conversation: Conversation, **changes: Any) -> Turn:
    """Return a turn that is not recorded yet."""
    fields: dict[str, Any] = {
        "id": new_id("turn"),
        "conversation_id": conversation.id,
        "parent_turn_id": None,
        "person_id": world.staff.id,
        "source": "chat",
        "messages": [{"role": "user", "content": "Where is my parcel?"}],
        "answer": "It is on its way.",
        "prompt_token_ids": [1, 2, 3],
        "answer_token_ids": [4, 5],
        "policy_id": world.base.id,
        "deployment_id": world.deployment.id,
        "sampling": {"temperature": 0.7},
        "finish_reason": "stop",
        "first_token_s": 0.1,
        "total_s": 0.5,
        "created_at": now(),
    }
    return Turn(**{**fields, **changes})


def record(world: World, conversation: Conversation, **changes: Any) -> Turn:
    turn = make_turn(world, conversation, **changes)
    conversations.record_turn(world.store, turn)
    return turn


def ask(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def make_run(**changes: Any) -> Run:
    pid = os.getpid()
    fields: dict[str, Any] = {
        "id": new_id("run"),
        "method": "dpo",
        "trigger": "manual",
        "config": {"beta": 0.1},
        "seed": 7,
        "code_version": "test",
        "pid": pid,
        "pid_started_at": process_started_at(pid),
        "process": name_of_process(pid),
        "started_at": now(),
    }
    return Run(**{**fields, **changes})


_numbers = itertools.count(1)


def add_candidate(world: World, *, passed: bool | None = True) -> Policy:
    """Add a policy as a finished run leaves it; `passed=None` leaves its evaluation out."""
    run = make_run()
    open_run(world.store, run)
    snapshot = Snapshot(
        id=new_id("snapshot"),
        run_id=run.id,
        sha256="5" * 64,
        cut_off=now(),
        item_ids={"ratings": []},
        counts={"ratings": 0},
        created_at=now(),
    )
    add_snapshot(world.store, snapshot)
    sha256 = f"{next(_numbers):064x}"
    policy = Policy(
        id=policies.new_policy_id(world.store),
        base_path=world.base.base_path,
        base_sha256=world.base.base_sha256,
        adapter_path=f"/data/adapters/{sha256}",
        adapter_sha256=sha256,
        parent_id=world.base.id,
        run_id=run.id,
        created_at=now(),
    )
    policies.add_policy(world.store, policy)
    if passed is not None:
        policies.add_evaluation(world.store, make_evaluation(world, policy, passed=passed))
    close_run(
        world.store, run.id, status="passed" if passed else "refused", message="done", cost={"wall_s": 1}
    )
    return policy


def make_evaluation(world: World, policy: Policy, *, passed: bool) -> Evaluation:
    return Evaluation(
        id=new_id("evaluation"),
        run_id=str(policy.run_id),
        policy_id=policy.id,
        incumbent_id=world.base.id,
        numbers={"win_rate": {"value": 0.6, "low": 0.52, "high": 0.68, "threshold": 0.5, "passed": passed}},
        samples=[{"question": "q", "incumbent": "a", "candidate": "b"}],
        passed=passed,
        reasons=[] if passed else ["win rate too low"],
        created_at=now(),
    )


def approve(world: World, policy: Policy) -> None:
    policies.decide(
        world.store, policy_id=policy.id, person_id=world.admin.id, decision="approve", reason="better"
    )


def judge(world: World, left: Turn, right: Turn) -> tuple[Rubric, Judgement]:
    """Keep an AI judge's choice and the rubric it followed."""
    rubric = Rubric(
        id=new_id("rubric"),
        name="helpful",
        version=1,
        template={"criteria": ["correct"]},
        person_id=world.admin.id,
        created_at=now(),
    )
    judgement = Judgement(
        id=new_id("judgement"),
        left_turn_id=left.id,
        right_turn_id=right.id,
        judge="judge-1",
        rubric_id=rubric.id,
        choice="left",
        created_at=now(),
    )
    with world.store.transaction(world.admin.id) as changes:
        changes.insert(rubric)
        changes.insert(judgement)
        changes.audit("turns.judged", judgement.id)
    return rubric, judgement


def shadow_answer(turn: Turn, shadow: Deployment, **changes: Any) -> ShadowAnswer:
    """Return what the shadow answered to the question of a turn, not recorded yet."""
    fields: dict[str, Any] = {
        "id": new_id("shadow"),
        "turn_id": turn.id,
        "deployment_id": shadow.id,
        "answer": "It is on its way.",
        "prompt_token_ids": [1, 2, 3],
        "answer_token_ids": [4, 5],
        "finish_reason": "stop",
        "first_token_s": 0.1,
        "total_s": 1.0,
        "created_at": now(),
    }
    return ShadowAnswer(**{**fields, **changes})


def fill_evidence(world: World) -> None:
    """Put at least one row into each evidence table."""
    store, person_id = world.store, world.staff.id
    conversation = start_conversation(world)
    left, right = (record(world, conversation, answer=answer) for answer in ("first", "second"))
    feedback.rate(store, turn_id=left.id, person_id=person_id, verdict="up", comment="fine")
    feedback.compare(store, left_turn_id=left.id, right_turn_id=right.id, person_id=person_id, choice="left")
    feedback.correct(store, turn_id=left.id, person_id=person_id, edited="better")
    judge(world, left, right)
    policy = add_candidate(world)
    approve(world, policy)
    scorer = RewardModel(
        id=new_id("reward"),
        run_id=str(policy.run_id),
        sha256="6" * 64,
        path="/data/reward",
        metrics={"accuracy": 0.8},
        created_at=now(),
    )
    add_reward_model(store, scorer)


def deploy(world: World, policy: Policy, role: str = "stable", share: float | None = None) -> Deployment:
    shares = {"stable": 1.0, "canary": 0.1, "shadow": 0.1, "retired": 0.0}
    return deployments.deploy(
        world.store,
        policy_id=policy.id,
        role=role,  # type: ignore[arg-type]
        share=shares[role] if share is None else share,
        actor=world.admin.id,
        reason="test",
    )


def outside(world: World) -> sqlite3.Connection:
    """Return a connection of a tool that knows nothing of Kotae."""
    return sqlite3.connect(world.store.data / "kotae.db", isolation_level=None)
