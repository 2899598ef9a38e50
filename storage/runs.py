"""Alignment runs: at most one at a time, with progress, curves and an end that is always recorded.

A run is its own process, known by a name that no other process gets (`storage.processes`); a run whose process is gone
is marked failed by whoever notices. Progress inside a stage and curve points are readings, not changes of the facts:
they have no audit event, but a run's new stage, start and end do (the end with a digest of its curves).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.digests import sha256_of
from storage.errors import Busy, Conflict, InvalidField
from storage.people import SYSTEM
from storage.processes import name_of_process, process_started_at
from storage.records import Json, RewardModel, Run, RunMetric, RunStatus, Snapshot, now
from storage.store import Store, Transaction

PROGRESS_KEYS = ("stage", "step", "steps", "message", "fraction", "eta_s")
START_TIME_TOLERANCE_S = 2.0
"""Of runs recorded by the clock, which time servers may nudge."""
DIED = "the process died without saying why (killed, out of memory, or the machine stopped)"


NextRunKind = Literal["time", "labels", "time_or_labels", "running", "paused", "never", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRun:
    """What starts the next run by itself, if anything does."""

    kind: NextRunKind
    """running: one is under way; never: the schedule is empty; broken: it cannot be read."""
    when: str = ""
    """Of "time": when it comes, in the machine's time zone; of "running": since when."""
    labels: int = 0
    """Of "labels": how many new ones must still come."""
    problem: str = ""
    """Of "broken"."""


def open_run(store: Store, run: Run) -> None:
    """Start a run, after marking one whose process died as failed.

    Raises:
        Busy: a run is under way.
        InvalidField: the run does not start as running.
    """
    if run.status != "running":
        raise InvalidField("status", run.status, "open a run as running")
    with store.transaction(SYSTEM) as changes:
        _mark_dead(store, changes)
        other = running(store)
        if other is not None:
            raise Busy(f"run {other.id} is under way (pid {other.pid}); wait for its end or cancel it")
        changes.insert(run)
        changes.audit("run.opened", run.id, method=run.method, trigger=run.trigger, seed=run.seed)


def get_run(store: Store, run_id: str) -> Run:
    """Return the run.

    Raises:
        NotFound: there is none.
    """
    return store.get(Run, run_id)


def report_progress(store: Store, run_id: str, **progress: Any) -> None:
    """Update the run's progress; a new `stage` starts it afresh.

    Raises:
        InvalidField: an unknown key.
        Conflict: the run is over (it was cancelled, or taken for dead).
    """
    for key in progress:
        if key not in PROGRESS_KEYS:
            raise InvalidField(key, progress[key], f"report one of {', '.join(PROGRESS_KEYS)}")
    with store.transaction(SYSTEM, audited=False) as changes:
        run = _still_running(store, run_id)
        new_stage = "stage" in progress and progress["stage"] != run.progress.get("stage")
        changes.update(Run, run_id, progress=progress if new_stage else {**run.progress, **progress})
        if new_stage:
            changes.audit("run.stage", run_id, stage=progress["stage"])


def record_metrics(store: Store, run_id: str, *, step: int, metrics: Mapping[str, float]) -> None:
    """Keep points of the run's curves. A resumed run repeats steps: the last value counts.

    What is not finite comes back as NaN, so that a run that diverges still shows its curve.
    """
    at = now()
    with store.transaction(SYSTEM, audited=False) as changes:
        _still_running(store, run_id)
        for name, value in metrics.items():
            point = RunMetric(run_id=run_id, name=name, step=step, value=_finite(value), created_at=at)
            changes.replace_key(point, "run_id, name, step")


def close_run(
    store: Store, run_id: str, *, status: RunStatus, message: str, cost: Json, actor: str = SYSTEM
) -> Run:
    """End the run.

    Raises:
        InvalidField: `status` is no end.
        Conflict: the run is over already.
    """
    if status == "running":
        raise InvalidField(
            "status", status, "end a run as passed, refused, not_enough_data, failed or cancelled"
        )
    with store.transaction(actor) as changes:
        _still_running(store, run_id)
        changes.update(Run, run_id, status=status, message=message, cost=cost, finished_at=now())
        changes.audit("run.closed", run_id, status=status, curves_sha256=_curves_sha256(store, run_id))
    return get_run(store, run_id)


def running(store: Store) -> Run | None:
    """Return the run that is under way, as far as is recorded."""
    found = store.all(Run, "status = 'running'")
    return found[0] if found else None


def mark_dead_runs(store: Store) -> list[Run]:
    """Mark runs whose process is gone as failed, and return them."""
    run = running(store)
    if run is None or is_alive(run):
        return []
    with store.transaction(SYSTEM) as changes:
        return _mark_dead(store, changes)


def list_runs(store: Store, *, limit: int | None = None) -> list[Run]:
    """Return the runs, newest first."""
    return store.all(Run, order="seq DESC", limit=limit)


def metrics(store: Store, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return the run's curves: for each name its (step, value), by step."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in store.all(RunMetric, "run_id = ?", [run_id], order="step"):
        curves.setdefault(point.name, []).append(
            (point.step, math.nan if point.value is None else point.value)
        )
    return curves


def add_snapshot(store: Store, snapshot: Snapshot) -> None:
    """Keep which labels the run learns from, and tie them to the run.

    Raises:
        Conflict: the run has a snapshot already.
    """
    with store.transaction(SYSTEM) as changes:
        changes.insert(snapshot)
        changes.update(Run, snapshot.run_id, snapshot_id=snapshot.id)
        changes.audit("run.snapshot", snapshot.run_id, snapshot_id=snapshot.id, sha256=snapshot.sha256)


def snapshot_of(store: Store, run_id: str) -> Snapshot | None:
    """Return which labels the run learns from."""
    found = store.all(Snapshot, "run_id = ?", [run_id])
    return found[0] if found else None


def add_reward_model(store: Store, reward_model: RewardModel) -> None:
    """Keep a trained scorer."""
    with store.transaction(SYSTEM) as changes:
        changes.insert(reward_model)
        changes.audit("run.reward_model", reward_model.run_id, reward_model_id=reward_model.id)


def reward_models_of(store: Store, run_id: str) -> list[RewardModel]:
    """Return the run's scorers, oldest first."""
    return store.all(RewardModel, "run_id = ?", [run_id])


def is_alive(run: Run) -> bool:
    """Tell whether the process that opened the run still exists."""
    if run.process is not None:
        return name_of_process(run.pid) == run.process
    started_at = process_started_at(run.pid)  # a run of before
    return started_at is not None and abs(started_at - run.pid_started_at) <= START_TIME_TOLERANCE_S


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _still_running(store: Store, run_id: str) -> Run:
    run = get_run(store, run_id)
    if run.status != "running":
        raise Conflict(f"run {run_id} is over ({run.status}): nothing more can be recorded for it")
    return run


def _mark_dead(store: Store, changes: Transaction) -> list[Run]:
    run = running(store)
    if run is None or is_alive(run):
        return []
    changes.update(Run, run.id, status="failed", message=DIED, finished_at=now())
    changes.audit("run.closed", run.id, status="failed", curves_sha256=_curves_sha256(store, run.id))
    return [get_run(store, run.id)]


def _curves_sha256(store: Store, run_id: str) -> str:
    """Return the digest of the run's curves; numbers as text, because JSON has no NaN."""
    curves = metrics(store, run_id)
    return sha256_of({name: [[step, repr(value)] for step, value in curves[name]] for name in curves})
