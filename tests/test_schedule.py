"""When a run starts by itself, and that it survives restarts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from alignment import schedule
from alignment.config import AlignmentConfig
from alignment.run_record import new_run
from alignment.schedule import Schedule, Scheduler, State, due, next_cron_time, read_schedule, weekday_names
from storage import runs, settings
from storage.errors import InvalidField
from storage.people import SYSTEM
from storage.records import RunTrigger
from storage.runs import NextRun
from storage.store import Store

MONDAY_3AM = datetime(2026, 11, 23, 3, 0, tzinfo=UTC).timestamp()
HOUR = 3600.0
NIGHTLY = Schedule(cron="0 3 * * *", after_labels=200, paused=False)


def state(*, cron_since: float = 0.0, launched_at: float = 0.0) -> State:
    return State(cron="0 3 * * *", paused=False, cron_since=cron_since, launched_at=launched_at)


def verdict(
    plan: Schedule, known: State, *, at: float, last_run: float = 0.0, new_labels: int = 0
) -> RunTrigger | None:
    return due(plan, known, last_run=last_run, new_labels=new_labels, at=at, zone=UTC)


def test_cron_time_starts_a_run_and_not_a_second_before() -> None:
    known = state(cron_since=MONDAY_3AM - HOUR)
    assert verdict(NIGHTLY, known, at=MONDAY_3AM - 1) is None
    assert verdict(NIGHTLY, known, at=MONDAY_3AM) == "cron"


def test_times_missed_while_nothing_ran_are_made_up_for_once() -> None:
    known = state(cron_since=MONDAY_3AM - HOUR)
    three_days_later = MONDAY_3AM + 73 * HOUR
    assert verdict(NIGHTLY, known, at=three_days_later) == "cron"
    assert verdict(NIGHTLY, known, at=three_days_later + 1, last_run=three_days_later) is None


def test_a_cron_line_changed_at_noon_does_not_owe_this_morning() -> None:
    known = state(cron_since=MONDAY_3AM + 9 * HOUR)
    assert verdict(NIGHTLY, known, at=MONDAY_3AM + 10 * HOUR, last_run=MONDAY_3AM - 24 * HOUR) is None


def test_enough_new_labels_start_a_run() -> None:
    known = state(cron_since=MONDAY_3AM)
    assert verdict(NIGHTLY, known, at=MONDAY_3AM + 1, new_labels=199) is None
    assert verdict(NIGHTLY, known, at=MONDAY_3AM + 1, new_labels=200) == "labels"


def test_zero_labels_means_never() -> None:
    plan = Schedule(cron="", after_labels=0, paused=False)
    assert verdict(plan, state(), at=MONDAY_3AM, new_labels=10_000) is None


def test_a_paused_schedule_starts_nothing() -> None:
    plan = Schedule(cron="0 3 * * *", after_labels=1, paused=True)
    assert verdict(plan, state(), at=MONDAY_3AM + HOUR, new_labels=10_000) is None


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("*", "*"),
        ("0", "sun"),
        ("7", "sun"),
        ("1-5", "mon,tue,wed,thu,fri"),
        ("5-7", "fri,sat,sun"),
        ("1,3", "mon,wed"),
        ("mon-fri", "mon-fri"),
        ("0-6/2", "sun,tue,thu,sat"),
    ],
)
def test_weekday_numbers_are_crons_and_not_apschedulers(field: str, expected: str) -> None:
    assert weekday_names(field) == expected


def test_sunday_of_a_cron_line_is_a_sunday() -> None:
    found = next_cron_time("30 4 * * 0", after=MONDAY_3AM, zone=UTC)
    assert found == datetime(2026, 11, 29, 4, 30, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"cron": "0 3 * *"}, "schedule.cron"),
        ({"cron": "0 25 * * *"}, "schedule.cron"),
        ({"cron": "0 3 * * 8"}, "schedule.cron"),
        ({"cron": 3}, "schedule.cron"),
        ({"after_labels": -1}, "schedule.after_labels"),
        ({"after_labels": True}, "schedule.after_labels"),
        ({"paused": "no"}, "schedule.paused"),
        ({"every": "day"}, "schedule.every"),
        ("nightly", "schedule"),
    ],
)
def test_a_wrong_schedule_is_refused_by_field(value: object, named: str) -> None:
    with pytest.raises(InvalidField, match=rf"^{named}: got "):
        read_schedule(value)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def put(store: Store, **value: object) -> None:
    settings.put(store, schedule.KEY, {"cron": "", "after_labels": 0, "paused": False, **value}, SYSTEM)


def owed(store: Store, *, since: float) -> None:
    """Pretend that the scheduler has known the every-minute line since `since`."""
    kept = {"cron": "* * * * *", "paused": False, "cron_since": since, "launched_at": 0.0}
    settings.put(store, schedule.STATE_KEY, kept, SYSTEM)


def test_a_missed_time_is_found_by_the_next_process_and_run_once(store: Store) -> None:
    put(store, cron="* * * * *")
    owed(store, since=time.time() - 3 * HOUR)
    launched: list[RunTrigger] = []
    assert Scheduler(store, launched.append).tick() == "cron"
    assert Scheduler(store, launched.append).tick() is None  # another process, right after
    assert launched == ["cron"]


def test_nothing_starts_while_a_run_is_alive(store: Store) -> None:
    put(store, cron="* * * * *")
    owed(store, since=time.time() - HOUR)
    runs.open_run(store, new_run(AlignmentConfig(), trigger="manual"))
    scheduler = Scheduler(store, pytest.fail)
    assert scheduler.tick() is None
    assert scheduler.next_run().kind == "running"
    assert scheduler.next_run().when.startswith("2")


def test_a_run_whose_process_died_is_marked_failed_and_does_not_block(store: Store) -> None:
    put(store, cron="* * * * *")
    owed(store, since=time.time() - HOUR)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    from dataclasses import replace

    dead = replace(new_run(AlignmentConfig(), trigger="manual"), pid=pid, started_at=time.time() - 2 * HOUR)
    runs.open_run(store, dead)
    launched: list[RunTrigger] = []
    assert Scheduler(store, launched.append).tick() == "cron"
    assert runs.get_run(store, dead.id).status == "failed"


def test_a_launch_that_fails_is_not_tried_again_at_every_tick(store: Store) -> None:
    put(store, cron="* * * * *")
    owed(store, since=time.time() - HOUR)

    def broken(trigger: RunTrigger) -> None:
        raise OSError("no memory")

    scheduler = Scheduler(store, broken)
    with pytest.raises(OSError, match="no memory"):
        scheduler.tick()
    assert scheduler.tick() is None


def test_the_job_looks_by_itself_and_stops(store: Store) -> None:
    put(store, cron="* * * * *")
    owed(store, since=time.time() - HOUR)
    launched: list[RunTrigger] = []
    scheduler = Scheduler(store, launched.append)
    scheduler.start()
    until = time.monotonic() + 10
    while not launched and time.monotonic() < until:
        time.sleep(0.02)
    scheduler.stop()
    assert launched == ["cron"]


def test_what_starts_the_next_run_is_known(store: Store) -> None:
    scheduler = Scheduler(store, pytest.fail)
    put(store, after_labels=3)
    assert scheduler.next_run() == NextRun(kind="labels", labels=3)
    put(store, cron="0 3 * * *", after_labels=1)
    both = scheduler.next_run()
    assert (both.kind, both.labels) == ("time_or_labels", 1)
    assert re.match(r"20\d\d-\d\d-\d\d 03:00 ", both.when)
    put(store, paused=True, cron="0 3 * * *")
    assert scheduler.next_run() == NextRun(kind="paused")
    put(store)
    assert scheduler.next_run() == NextRun(kind="never")
    put(store, cron="whenever")
    broken = scheduler.next_run()
    assert broken.kind == "broken"
    assert "schedule.cron" in broken.problem


def test_ending_a_pause_does_not_make_up_for_the_paused_nights(store: Store) -> None:
    put(store, cron="* * * * *", paused=True)
    owed(store, since=time.time() - HOUR)
    scheduler = Scheduler(store, pytest.fail)
    assert scheduler.tick() is None
    put(store, cron="* * * * *")
    assert scheduler.tick() is None  # counts from now; the next minute is not there yet
