"""A chat over the fake engine and a real database, for the tests of what people and operators do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from assistant.chat import Chat
from assistant.engine.fake import FakeEngine
from assistant.release import Release
from storage import adapters, deployments, people, policies
from storage.digests import base_digest
from storage.records import Conversation, Deployment, Policy, Snapshot, new_id, now
from storage.runs import add_snapshot, close_run, open_run
from storage.store import Store
from storage_fixtures import (
    World,
    add_candidate,
    approve,
    deploy,
    make_evaluation,
    make_run,
    make_world,
    start_conversation,
)
from tiny_models import make_adapter, make_tiny_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """One support desk: its data, its engine, its chat."""

    world: World
    engine: FakeEngine
    release: Release
    chat: Chat
    conversation: Conversation


def make_desk(data: Path, *, world: World | None = None) -> Desk:
    world = make_world(data) if world is None else world
    engine = FakeEngine(base_name=world.base.id)
    release = Release(world.store, engine)
    return Desk(
        world=world,
        engine=engine,
        release=release,
        chat=Chat(world.store, engine, release),
        conversation=start_conversation(world),
    )


def put_beside(desk: Desk, role: str, *, share: float = 1.0) -> Deployment:
    """Deploy an approved candidate as canary or shadow; it has no files that could be checked, so the engine has it."""
    policy = add_candidate(desk.world)
    approve(desk.world, policy)
    row = deploy(desk.world, policy, role, share=share)
    asyncio.run(desk.engine.load(policy_id=policy.id, adapter=Path(str(policy.adapter_path))))
    asyncio.run(desk.release.sync())
    return row


def make_real_desk(folder: Path, *, model: Path | None = None) -> Desk:
    """Return a desk whose base model is a real folder, a tiny one by default, so that adapters can be checked against it."""
    store = Store(folder / "data")
    model = model or make_tiny_model(folder / "model")
    base = policies.register_base(store, base_path=str(model), base_sha256=base_digest(model))
    world = World(
        store=store,
        admin=people.add_person(store, name="Admin", role="admin", actor="system"),
        staff=people.add_person(store, name="Staff", role="staff", actor="system"),
        other=people.add_person(store, name="Other", role="staff", actor="system"),
        base=base,
        deployment=deployments.deploy(
            store, policy_id=base.id, role="stable", share=1.0, actor="system", reason="first start"
        ),
    )
    return make_desk(folder / "data", world=world)


def add_servable_candidate(
    world: World, adapter: Path, *, passed: bool = True, parent: Policy | None = None
) -> Policy:
    """Add a policy with a real adapter folder, as a finished run leaves it."""
    stored = adapters.import_adapter(world.store.data, adapter)
    run = make_run()
    open_run(world.store, run)
    snapshot = Snapshot(
        id=new_id("snapshot"),
        run_id=run.id,
        sha256="5" * 64,
        cut_off=now(),
        item_ids={"comparisons": []},
        counts={"comparisons": 0},
        created_at=now(),
    )
    add_snapshot(world.store, snapshot)
    policy = Policy(
        id=policies.new_policy_id(world.store),
        base_path=world.base.base_path,
        base_sha256=world.base.base_sha256,
        adapter_path=str(stored.path),
        adapter_sha256=stored.sha256,
        parent_id=(parent or world.base).id,
        run_id=run.id,
        created_at=now(),
    )
    policies.add_policy(world.store, policy)
    policies.add_evaluation(world.store, make_evaluation(world, policy, passed=passed))
    close_run(
        world.store, run.id, status="passed" if passed else "refused", message="done", cost={"wall_s": 1}
    )
    return policy


def add_random_candidate(world: World, folder: Path, *, seed: int, passed: bool = True) -> Policy:
    """Add a candidate with random LoRA weights over the world's base model."""
    adapter = make_adapter(folder / f"adapter-{seed}", Path(world.base.base_path), seed=seed)
    return add_servable_candidate(world, adapter, passed=passed)
