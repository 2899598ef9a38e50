"""When a run starts by itself: at the times of a cron line, or after so many new labels; one at a time.

One APScheduler job looks every ten seconds at the setting "schedule" ({"cron", "after_labels", "paused"}), so that a change
on a page counts at once. Everything that must survive a restart is in storage: the last run's start, and the setting
"schedule_state" with the time from which missed cron times count. A time missed while nothing ran is made up for once.
Starting the run is the caller's business. No torch here: this lives in the web process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, tzinfo
from typing import Any

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from tzlocal import get_localzone

from storage import feedback, runs, settings
from storage.errors import InvalidField
from storage.people import SYSTEM
from storage.records import Json, RunTrigger, now
from storage.runs import NextRun
from storage.store import Store

POLL_S = 10
KEY, STATE_KEY = "schedule", "schedule_state"
DEFAULT_SCHEDULE: Json = {"cron": "0 3 * * *", "after_labels": 200, "paused": False}
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")
"""By cron's numbers: 0 and 7 are Sunday. APScheduler 3 counts from Monday (its issue 286), so names are used."""
Launch = Callable[[RunTrigger], object]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The setting, checked."""

    cron: str
    """Five fields in the machine's time zone; "" for none. Day of month and weekday must both fit."""
    after_labels: int
    """New labels since the last run that start one; 0 for never."""
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the scheduler remembers across restarts."""

    cron: str
    paused: bool
    cron_since: float
    """Cron times before this moment (Unix seconds) do not count: the line was changed or paused then."""
    launched_at: float
    """When a run was last launched from here, whether or not it ever opened."""


def read_schedule(value: Any) -> Schedule:
    """Check the setting "schedule"; fields that are missing have their default.

    Raises:
        InvalidField: naming the field.
    """
    if not isinstance(value, dict):
        raise InvalidField("schedule", value, 'use {"cron", "after_labels", "paused"}')
    unknown = sorted(set(value) - set(DEFAULT_SCHEDULE))
    if unknown:
        raise InvalidField(f"schedule.{unknown[0]}", value[unknown[0]], "use cron, after_labels and paused")
    table = {**DEFAULT_SCHEDULE, **value}
    cron, labels, paused = table["cron"], table["after_labels"], table["paused"]
    if not isinstance(cron, str):
        raise InvalidField("schedule.cron", cron, 'use a text such as "0 3 * * *", or "" for never')
    if isinstance(labels, bool) or not isinstance(labels, int) or labels < 0:
        raise InvalidField("schedule.after_labels", labels, "use a whole number, 0 for never")
    if not isinstance(paused, bool):
        raise InvalidField("schedule.paused", paused, "use true or false")
    if cron.strip():
        cron_trigger(cron, get_localzone())
    return Schedule(cron=cron.strip(), after_labels=labels, paused=paused)


def cron_trigger(cron: str, zone: tzinfo) -> CronTrigger:
    """Return the times of a cron line with cron's own weekday numbers.

    Raises:
        InvalidField: it is no cron line.
    """
    fields = cron.split()
    try:
        if len(fields) != 5:
            raise ValueError(f"{len(fields)} fields")
        minute, hour, day, month, weekday = fields
        return CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=weekday_names(weekday), timezone=zone
        )
    except (ValueError, TypeError) as error:
        fix = f'use minute, hour, day, month and weekday such as "0 3 * * *" ({error})'
        raise InvalidField("schedule.cron", cron, fix) from error


def weekday_names(field: str) -> str:
    """Return a cron weekday field with names for numbers: "1-5" is "mon,tue,wed,thu,fri", "5-7" ends on Sunday.

    Raises:
        ValueError: a number above 7, or a range that runs backwards.
    """
    if field.startswith("*") or not any(character.isdigit() for character in field):
        return field if field != "*/1" else "*"
    names: list[str] = []
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        low = int(first)
        high = int(last) if last else (6 if step else low)
        if not 0 <= low <= high <= 7:
            raise ValueError(f"weekday {part}")
        names += [WEEKDAYS[day] for day in range(low, high + 1, int(step or 1))]
    return ",".join(dict.fromkeys(names))


def next_cron_time(cron: str, *, after: float, zone: tzinfo) -> float | None:
    """Return the first time of the line after `after`, in Unix seconds; None when it never comes."""
    start = datetime.fromtimestamp(after, zone)
    found: datetime | None = cron_trigger(cron, zone).get_next_fire_time(start, start)
    return found.timestamp() if found else None


def due(
    schedule: Schedule, state: State, *, last_run: float, new_labels: int, at: float, zone: tzinfo
) -> RunTrigger | None:
    """Return what should start a run at the moment `at`, if anything. Pure."""
    if schedule.paused:
        return None
    if schedule.after_labels and new_labels >= schedule.after_labels:
        return "labels"
    if schedule.cron:
        fire = next_cron_time(schedule.cron, after=cron_reference(state, last_run), zone=zone)
        if fire is not None and fire <= at:
            return "cron"
    return None


def cron_reference(state: State, last_run: float) -> float:
    """Return the moment after which a cron time is still owed."""
    return max(state.cron_since, state.launched_at, last_run)


class Scheduler:
    """Looks at the schedule and calls `launch(trigger)`, which must start a run in a process of its own."""

    def __init__(self, store: Store, launch: Launch) -> None:
        self._store = store
        self._launch = launch
        self._zone: tzinfo = get_localzone()
        self._scheduler = BackgroundScheduler(
            timezone=self._zone,
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def start(self) -> None:
        """Begin to look, in a thread."""
        first = datetime.fromtimestamp(now(), self._zone)
        trigger = IntervalTrigger(seconds=POLL_S, timezone=self._zone)
        self._scheduler.add_job(self._tick_safely, trigger, id="align", next_run_time=first)
        self._scheduler.start()

    def stop(self) -> None:
        """Stop looking; a run that was launched goes on."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)

    def tick(self) -> RunTrigger | None:
        """Look once, and launch a run if one is due; return what started it.

        Raises:
            InvalidField: the setting is not a schedule.
        """
        schedule = self._schedule()
        state = self._state(schedule)
        self._remember(state)
        runs.mark_dead_runs(self._store)
        if runs.running(self._store) is not None:
            return None
        last_run = self._last_run()
        labels = feedback.count_labels(self._store, since=max(last_run, state.launched_at))
        trigger = due(schedule, state, last_run=last_run, new_labels=labels, at=now(), zone=self._zone)
        if trigger is not None:
            # Remembered first: a launch that fails waits for the next time instead of failing every ten seconds.
            self._remember(replace(state, launched_at=now()))
            logger.info("starting an alignment run (%s)", trigger)
            self._launch(trigger)
        return trigger

    def next_run(self) -> NextRun:
        """Return what starts the next run."""
        try:
            schedule = self._schedule()
        except InvalidField as error:
            return NextRun(kind="broken", problem=str(error))
        running = runs.running(self._store)
        if running is not None:
            return NextRun(kind="running", when=self._when(running.started_at))
        if schedule.paused:
            return NextRun(kind="paused")
        fire, missing = self._next_fire(schedule), self._missing_labels(schedule)
        if fire is None:
            return NextRun(kind="never") if missing is None else NextRun(kind="labels", labels=missing)
        if missing is None:
            return NextRun(kind="time", when=self._when(fire))
        return NextRun(kind="time_or_labels", when=self._when(fire), labels=missing)

    def _next_fire(self, schedule: Schedule) -> float | None:
        """Return when the next cron time comes, now at the earliest."""
        if not schedule.cron:
            return None
        reference = cron_reference(self._state(schedule), self._last_run())
        fire = next_cron_time(schedule.cron, after=reference, zone=self._zone)
        return None if fire is None else max(fire, now())

    def _missing_labels(self, schedule: Schedule) -> int | None:
        if not schedule.after_labels:
            return None
        since = max(self._last_run(), self._state(schedule).launched_at)
        return max(0, schedule.after_labels - feedback.count_labels(self._store, since=since))

    def _when(self, at: float) -> str:
        return datetime.fromtimestamp(at, self._zone).strftime("%Y-%m-%d %H:%M %Z")

    def _tick_safely(self) -> None:
        try:
            self.tick()
        except Exception:  # the next tick must still come
            logger.exception("the schedule could not be followed")

    def _schedule(self) -> Schedule:
        return read_schedule(settings.get(self._store, KEY, DEFAULT_SCHEDULE))

    def _last_run(self) -> float:
        latest = runs.list_runs(self._store, limit=1)
        return latest[0].started_at if latest else 0.0

    def _state(self, schedule: Schedule) -> State:
        """Return what is remembered; a new cron line, or the end of a pause, starts counting now."""
        kept = settings.get(self._store, STATE_KEY)
        if not kept:
            return State(cron=schedule.cron, paused=schedule.paused, cron_since=now(), launched_at=0.0)
        known = State(**kept)
        if (known.cron, known.paused) == (schedule.cron, schedule.paused):
            return known
        return replace(known, cron=schedule.cron, paused=schedule.paused, cron_since=now())

    def _remember(self, state: State) -> None:
        if settings.get(self._store, STATE_KEY) != asdict(state):
            settings.put(self._store, STATE_KEY, asdict(state), SYSTEM)
