"""One run at a time, with an end that is always recorded, even when nobody was left to record it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from storage import audit, runs
from storage.errors import Busy, Conflict, InvalidField, NotFound
from storage.processes import name_of_process, process_started_at
from storage.records import RewardModel, Run, Snapshot, new_id, now
from storage_fixtures import World, make_run, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


@pytest.fixture
def run(world: World) -> Run:
    opened = make_run()
    runs.open_run(world.store, opened)
    return opened


def dead_run() -> Run:
    return make_run(pid=2**22 - 1)


def test_a_run_is_kept_as_it_was_opened(world: World, run: Run) -> None:
    assert runs.running(world.store) == run
    assert runs.list_runs(world.store) == [run]


def test_a_second_run_waits_for_the_first(world: World, run: Run) -> None:
    with pytest.raises(Busy, match=rf"{run.id}.*pid {os.getpid()}"):
        runs.open_run(world.store, make_run())
    runs.close_run(world.store, run.id, status="failed", message="stopped", cost={})
    runs.open_run(world.store, make_run())


def test_a_run_whose_process_died_does_not_block_the_next(world: World) -> None:
    dead = dead_run()
    runs.open_run(world.store, dead)
    runs.open_run(world.store, make_run())
    kept = runs.get_run(world.store, dead.id)
    assert kept.status == "failed"
    assert kept.message.startswith("the process died")
    assert kept.finished_at is not None


def test_dead_runs_are_marked_failed_once(world: World) -> None:
    dead = dead_run()
    runs.open_run(world.store, dead)
    assert [marked.id for marked in runs.mark_dead_runs(world.store)] == [dead.id]
    assert runs.mark_dead_runs(world.store) == []
    assert runs.running(world.store) is None


def test_a_run_of_a_living_process_is_left_alone(world: World, run: Run) -> None:
    assert runs.mark_dead_runs(world.store) == []
    assert runs.running(world.store) == run


def test_a_reused_pid_is_another_process(world: World) -> None:
    boot, pid, ticks = (name_of_process(os.getpid()) or "").split()
    runs.open_run(world.store, make_run(process=f"{boot} {pid} {int(ticks) - 1}"))
    assert len(runs.mark_dead_runs(world.store)) == 1


def test_a_run_outlives_a_clock_that_is_set(world: World) -> None:
    runs.open_run(world.store, make_run(pid_started_at=now() - 1e6))
    assert runs.mark_dead_runs(world.store) == []


def test_a_run_recorded_by_the_clock_alone_is_known_by_it(world: World) -> None:
    own_start = process_started_at(os.getpid())
    assert own_start is not None
    runs.open_run(world.store, make_run(process=None))
    assert runs.mark_dead_runs(world.store) == []
    reused = replace(make_run(process=None), pid_started_at=own_start - 60)
    assert not runs.is_alive(reused)


def test_the_start_time_of_a_process_is_known_until_it_ends() -> None:
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started_at = process_started_at(process.pid)
    assert started_at is not None
    assert abs(started_at - before) < 2
    process.kill()
    deadline = time.time() + 5
    while process_started_at(process.pid) is not None and time.time() < deadline:
        time.sleep(0.01)
    assert name_of_process(process.pid) is None
    assert process_started_at(process.pid) is None  # a zombie already, before it is waited for
    process.communicate()


def test_progress_is_merged_within_a_stage_and_starts_afresh_with_the_next(world: World, run: Run) -> None:
    def progress() -> object:
        return runs.get_run(world.store, run.id).progress

    runs.report_progress(world.store, run.id, stage="reward model", step=1, steps=10)
    runs.report_progress(world.store, run.id, step=2, eta_s=4.5)
    assert progress() == {"stage": "reward model", "step": 2, "steps": 10, "eta_s": 4.5}
    runs.report_progress(world.store, run.id, stage="policy")
    assert progress() == {"stage": "policy"}
    stages = [
        event.detail for event in audit.events(world.store, subject=run.id) if event.action == "run.stage"
    ]
    assert stages == [{"stage": "policy"}, {"stage": "reward model"}]


def test_unknown_progress_is_refused(world: World, run: Run) -> None:
    with pytest.raises(InvalidField, match=r"^percent"):
        runs.report_progress(world.store, run.id, percent=5)


def test_curves_come_back_by_step_and_a_repeated_step_counts_once(world: World, run: Run) -> None:
    for step, loss in ((2, 0.5), (1, 0.9), (2, 0.4)):
        runs.record_metrics(world.store, run.id, step=step, metrics={"loss": loss, "objective/kl": 0.0})
    assert runs.metrics(world.store, run.id) == {
        "loss": [(1, 0.9), (2, 0.4)],
        "objective/kl": [(1, 0.0), (2, 0.0)],
    }


def test_a_diverged_curve_is_kept_as_not_a_number(world: World, run: Run) -> None:
    runs.record_metrics(world.store, run.id, step=1, metrics={"loss": math.nan, "kl": math.inf})
    curves = runs.metrics(world.store, run.id)
    assert math.isnan(curves["loss"][0][1])
    assert math.isnan(curves["kl"][0][1])
    runs.close_run(world.store, run.id, status="failed", message="diverged", cost={})


def test_a_closed_run_takes_nothing_more(world: World, run: Run) -> None:
    closed = runs.close_run(world.store, run.id, status="passed", message="fine", cost={"wall_s": 3.5})
    assert (closed.status, closed.message, closed.cost) == ("passed", "fine", {"wall_s": 3.5})
    assert closed.finished_at is not None
    for late in (
        lambda: runs.report_progress(world.store, run.id, step=1),
        lambda: runs.record_metrics(world.store, run.id, step=1, metrics={"loss": 1.0}),
        lambda: runs.close_run(world.store, run.id, status="failed", message="x", cost={}),
    ):
        with pytest.raises(Conflict, match="over"):
            late()


def test_a_run_ends_in_an_end(world: World, run: Run) -> None:
    with pytest.raises(InvalidField, match=r"^status"):
        runs.close_run(world.store, run.id, status="running", message="", cost={})
    with pytest.raises(InvalidField, match=r"^status"):
        runs.open_run(world.store, make_run(status="passed"))


def test_a_snapshot_is_tied_to_its_run_once(world: World, run: Run) -> None:
    def snapshot() -> Snapshot:
        return Snapshot(
            id=new_id("snapshot"),
            run_id=run.id,
            sha256="a" * 64,
            cut_off=now(),
            item_ids={"ratings": ["rating_1"]},
            counts={"ratings": 1},
            created_at=now(),
        )

    first = snapshot()
    assert runs.snapshot_of(world.store, run.id) is None
    runs.add_snapshot(world.store, first)
    assert runs.snapshot_of(world.store, run.id) == first
    assert runs.get_run(world.store, run.id).snapshot_id == first.id
    with pytest.raises(Conflict):
        runs.add_snapshot(world.store, snapshot())


def test_reward_models_are_listed_by_run(world: World, run: Run) -> None:
    model = RewardModel(
        id=new_id("reward"),
        run_id=run.id,
        sha256="b" * 64,
        path="/data/reward",
        metrics={"accuracy": 0.75},
        created_at=now(),
    )
    runs.add_reward_model(world.store, model)
    assert runs.reward_models_of(world.store, run.id) == [model]


def test_the_end_of_a_run_is_audited_with_a_digest_of_its_curves(world: World, run: Run) -> None:
    runs.record_metrics(world.store, run.id, step=1, metrics={"loss": 1.0})
    runs.close_run(world.store, run.id, status="refused", message="gate", cost={})
    closed = audit.events(world.store, subject=run.id)[0]
    assert closed.action == "run.closed"
    assert len(closed.detail["curves_sha256"]) == 64


def test_an_unknown_run_is_named(world: World) -> None:
    with pytest.raises(NotFound, match="run_x"):
        runs.report_progress(world.store, "run_x", step=1)
