"""A canary that was up for days is judged at the first look after a restart, and the memory that it takes stays small."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from assistant.canary import CanaryConfig
from assistant.canary_watch import CanaryWatch
from storage import deployments, outcomes
from storage.failures import record_failure
from storage.records import Deployment, new_id, now
from storage.tables import encode
from storage_fixtures import (
    World,
    add_candidate,
    approve,
    deploy,
    make_turn,
    make_world,
    outside,
    record,
    start_conversation,
)

EVERY_S = 30.0
"""Seconds from one answer to the next."""
CONCLUDED_S = 3600.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path / "data")
    policy = add_candidate(world)
    approve(world, policy)
    deployments.note_answering(world.store, deploy(world, policy, "canary", share=0.25))
    return world


def insert(to: sqlite3.Connection, table: str, rows: list[dict[str, Any]]) -> None:
    """Insert as a tool beside Kotae would: by its own way, a day of answers takes minutes to record."""
    names = [*rows[0]]
    marks = ", ".join("?" * len(names))
    to.executemany(
        f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", [[*row.values()] for row in rows]
    )


def answer(world: World, *, conversations: int, began_at: float) -> None:
    """Record two answers and a comparison between them in each conversation, every fourth of the canary."""
    stable, canary = served_by(world)
    template = start_conversation(world)
    known, turns, comparisons = [], [], []
    for number in range(conversations):
        row = canary if number % 4 == 0 else stable
        conversation = {**encode(template), "id": f"{template.id}-{number}"}
        known.append(conversation)
        pair = [
            make_turn(
                world,
                template,
                policy_id=row.policy_id,
                deployment_id=row.id,
                source="compare",
                total_s=0.0,
                created_at=began_at + (2 * number + place) * EVERY_S,
            )
            for place in (0, 1)
        ]
        turns += [{**encode(turn), "conversation_id": conversation["id"]} for turn in pair]
        comparisons.append(
            {
                "id": new_id("comparison"),
                "left_turn_id": pair[0].id,
                "right_turn_id": pair[1].id,
                "person_id": world.staff.id,
                "choice": "both_bad" if number % 10 == 0 else "left",
                "propensity": 0.5,
                "reasons": "[]",
                "created_at": pair[1].created_at,
            }
        )
    with closing(outside(world)) as to:
        to.execute("BEGIN")
        insert(to, "conversations", known)
        insert(to, "turns", turns)
        insert(to, "comparisons", comparisons)
        to.execute("COMMIT")


def served_by(world: World) -> tuple[Deployment, Deployment]:
    """Return the rows of stable and the canary."""
    served = deployments.served(world.store)
    assert served is not None
    assert served.canary is not None
    return served.stable, served.canary


def test_the_first_look_after_a_restart_of_20_000_answers_takes_seconds_and_not_minutes(world: World) -> None:
    began_at = now()
    answer(world, conversations=10_000, began_at=began_at)
    until = began_at + 20_000 * EVERY_S + CONCLUDED_S
    began = time.process_time()
    verdict = CanaryWatch(world.store).look(at=until)
    assert (
        time.process_time() - began < 5.0
    )  # it took 24 when each conversation walked all answers of its policy
    assert verdict is not None
    assert (verdict.evidence.canary, verdict.evidence.stable) == (2_500, 7_500)
    # Every tenth conversation is lost: those whose number 20 divides (0, 20, 40 …) are the canary's, the others stable's.
    assert (verdict.evidence.canary_negative, verdict.evidence.stable_negative) == (500, 500)


def test_the_watch_remembers_only_the_answers_that_a_stop_still_looks_at(world: World) -> None:
    began_at, config = now(), CanaryConfig()
    answer(world, conversations=1_000, began_at=began_at)
    watch = CanaryWatch(world.store)
    at = began_at + 2_000 * EVERY_S
    watch.look(at=at)
    # The latency windows are of the last 60 canary answers, with those of stable in between: three for each at a quarter.
    assert len(watch._seen) <= 4 * config.latency_windows * config.latency_answers


def test_answers_that_were_slow_are_remembered_until_three_windows_are_full(world: World) -> None:
    """What is forgotten at each look must change nothing: the stop fires as if all had been read at once."""
    (stable, canary), began_at = served_by(world), now()
    watch = CanaryWatch(world.store)
    conversation = start_conversation(world)
    for number in range(60):
        verdict = watch.look(at=began_at + number * 600)
        assert verdict is not None
        assert verdict.status == "Inconclusive"
        for row, total_s in ((stable, 0.1), (stable, 0.1), (canary, 1.0)):
            record(
                world,
                conversation,
                policy_id=row.policy_id,
                deployment_id=row.id,
                total_s=total_s,
                created_at=began_at + number * 600,
            )
    verdict = watch.look(at=began_at + 60 * 600)
    assert verdict is not None
    assert verdict.status == "Failed"
    assert "10.0 times as long" in verdict.reasons[0]


def test_a_hard_stop_does_not_wait_for_the_conversations_to_be_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, canary = served_by(world)
    record_failure(world.store, policy_id=canary.policy_id, kind="wrong_policy")
    monkeypatch.setattr(outcomes, "outcomes", lambda *_, **__: pytest.fail("conversations were read first"))
    verdict = CanaryWatch(world.store).look()
    assert verdict is not None
    assert verdict.status == "Failed"
    assert "another policy answered" in verdict.reasons[0]


def test_a_clock_that_was_wrong_for_a_day_counts_no_conversation_twice(world: World) -> None:
    began_at = now()
    answer(world, conversations=40, began_at=began_at)
    watch = CanaryWatch(world.store)
    day_s, at = 86_400.0, began_at + 80 * EVERY_S + CONCLUDED_S
    for clock in (at, at - day_s, at, at + day_s, at):
        verdict = watch.look(at=clock)
        assert verdict is not None
        assert verdict.evidence.canary + verdict.evidence.stable == 40
    answer(world, conversations=20, began_at=at)
    verdict = watch.look(at=at + 40 * EVERY_S + CONCLUDED_S)
    assert verdict is not None
    assert verdict.evidence.canary + verdict.evidence.stable == 60
