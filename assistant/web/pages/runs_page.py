"""Runs: the one going on with its progress and curves, those before, and when the next one starts."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from apscheduler.triggers.cron import CronTrigger

from assistant.web.pages.candidate_view import curves
from assistant.web.pages.frame import Frame, clickable, clicked, markup
from assistant.web.pages.html import note
from assistant.web.pages.runs_view import next_run_text, run_detail, run_list, running_html
from storage import runs, settings
from storage.errors import InvalidField
from storage.records import Json, Run, now
from storage.store import Store

QUICK: Json = {"queue": False, "show_progress": "hidden"}
REFRESH_S = 2.0
LISTED_RUNS = 50
DEFAULT_SCHEDULE: Json = {"cron": "0 3 * * *", "after_labels": 200, "paused": False}
MOST_LABELS = 1_000_000
Updates = dict[Any, Any]


class RunsPage:
    """Components and handlers of the runs; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store

    def build(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Add the page and connect its events."""
        words = self.words
        self.selected = gr.State("")
        self.running = markup(elem_id="run-now")
        with gr.Row(elem_classes="k-inline"):
            self.start = gr.Button(words("runs.start"), variant="primary", scale=0, min_width=150)
            self.pause = gr.Button(words("runs.pause"), scale=0, min_width=190)
            self.when = markup(elem_id="run-schedule")
        self.message = markup(elem_id="run-message")
        with gr.Accordion(words("runs.schedule"), open=False), gr.Row(elem_classes="k-inline"):
            self.cron = gr.Textbox(
                "", label=words("runs.cron"), info=words("runs.cron_help"), max_lines=1, scale=2
            )
            self.labels = gr.Number(
                label=words("runs.labels"), info=words("runs.labels_help"), precision=0, minimum=1, scale=2
            )
            self.keep = gr.Button(words("runs.keep"), scale=0, min_width=110)
        with gr.Row(elem_classes="k-two"):
            with gr.Column(scale=0, min_width=300, elem_classes="k-list"):
                self.listing = clickable(elem_id="run-list")
            with gr.Column(elem_classes="k-detail"):
                self.detail = markup(elem_id="run-detail")
                self.curves = markup(elem_id="run-curves")
        self._wire(blocks, tab, gr.Timer(REFRESH_S))

    def _wire(self, blocks: gr.Blocks, tab: gr.Tab, timer: gr.Timer) -> None:
        live = [self.running, self.when, self.pause, self.listing, self.detail, self.curves]
        shown = [*live, self.selected, self.message, self.cron, self.labels]
        gr.on([blocks.load, tab.select], self.refresh, self.selected, shown, **QUICK)
        timer.tick(self.tick, self.selected, live, **QUICK)
        self.listing.click(self.open, None, shown, **QUICK)
        self.start.click(self.on_start, self.selected, shown, **QUICK)
        self.pause.click(self.on_pause, self.selected, shown, **QUICK)
        self.keep.click(self.on_keep, [self.selected, self.cron, self.labels], shown, **QUICK)

    # -- handlers -------------------------------------------------------------------------------------

    def refresh(self, selected: str, request: gr.Request) -> Updates:
        """Show everything, the form as the schedule has it."""
        with self.frame.told():
            self.frame.person(request)
            schedule = schedule_of(self.store)
            form = {self.cron: schedule["cron"], self.labels: schedule["after_labels"]}
            return self._shown(selected) | form

    def tick(self, selected: str, request: gr.Request) -> Updates:
        """Refresh what moves; while no run goes on nothing does."""
        with self.frame.told():
            self.frame.person(request)
            return self._shown(selected)

    def open(self, request: gr.Request, event: gr.EventData) -> Updates:
        """Show the run that was clicked."""
        with self.frame.told():
            self.frame.person(request)
            run_id = clicked(event)["id"]
            return self._shown(run_id) | {self.selected: run_id}

    def on_start(self, selected: str, request: gr.Request) -> Updates:
        """Start a run now; refused while one is under way."""
        with self.frame.told():
            self.services.launch_run("manual", self.frame.person(request))
            return self._shown(selected) | {self.message: note(self.words("runs.started"), "good")}

    def on_pause(self, selected: str, request: gr.Request) -> Updates:
        """Pause the schedule, or let it go on; a run under way is not touched."""
        with self.frame.told():
            person, schedule = self.frame.person(request), schedule_of(self.store)
            changed = {**schedule, "paused": not schedule["paused"]}
            settings.put(self.store, "schedule", changed, person.id)
            return self._shown(selected)

    def on_keep(self, selected: str, cron: str, labels: float | None, request: gr.Request) -> Updates:
        """Keep when runs start: cron times, a number of new labels, or both."""
        with self.frame.told():
            person = self.frame.person(request)
            changed = {**schedule_of(self.store), **checked_schedule(cron, labels)}
            settings.put(self.store, "schedule", changed, person.id)
            return self._shown(selected) | {self.message: note(self.words("runs.kept"), "good")}

    # -- what is shown --------------------------------------------------------------------------------

    def _shown(self, selected: str) -> Updates:
        words, store = self.words, self.store
        listed = runs.list_runs(store, limit=LISTED_RUNS)
        run = _one_of(listed, selected)
        is_paused = schedule_of(store)["paused"]
        return {
            self.running: running_html(words, runs.running(store), now()),
            self.when: f'<p class="k-hint">{escape(next_run_text(words, self.services.next_run()))}</p>',
            self.pause: gr.Button(words("runs.resume") if is_paused else words("runs.pause")),
            self.listing: run_list(words, listed, current=run.id if run else "", now=now()),
            self.detail: run_detail(words, run) if run else "",
            self.curves: curves(words, runs.metrics(store, run.id)) if run else "",
        }


def _one_of(listed: list[Run], selected: str) -> Run | None:
    """Return the chosen run, else the latest one."""
    chosen = [run for run in listed if run.id == selected]
    return next(iter(chosen or listed), None)


def schedule_of(store: Store) -> Json:
    """Return the schedule, complete."""
    return {**DEFAULT_SCHEDULE, **settings.get(store, "schedule", {})}


def checked_schedule(cron: str, labels: float | None) -> Json:
    """Return the part of the schedule that a person types.

    Raises:
        InvalidField: names what cannot be used and how to write it.
    """
    try:
        CronTrigger.from_crontab(cron.strip())
    except ValueError as error:
        fix = "use five fields: minute hour day month weekday, such as 0 3 * * * for every night at three"
        raise InvalidField("cron", cron, fix) from error
    if labels is None or not 1 <= labels <= MOST_LABELS:
        raise InvalidField("labels", labels, f"use a whole number from 1 to {MOST_LABELS:,}")
    return {"cron": cron.strip(), "after_labels": int(labels)}
