"""What the runs page shows, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from assistant.web.pages.html import HOUR_S, MINUTE_S, badge, empty, moment, when
from assistant.web.words import Words
from storage.records import Json, Run
from storage.runs import NextRun

STATUS_KINDS = {"passed": "good", "running": "live", "failed": "bad", "refused": "bad"}
MEBIBYTE = 1024 * 1024
STAGES = (
    "preparing",
    "reward model",
    "reward heads",
    "reference",
    "dpo",
    "kto",
    "ppo",
    "answers",
    "scores",
    "questions",
    "report",
)
"""In the order of a run; the record has them by name."""


def running_html(words: Words, run: Run | None, now: float) -> str:
    """Return the progress of the run going on, or that there is none."""
    if run is None:
        return f'<p class="k-note quiet">{escape(words("runs.idle"))}</p>'
    fraction = _fraction(run.progress)
    left_s = run.progress.get("eta_s")
    spans = [words("runs.since", time=duration(now - run.started_at))]
    if isinstance(left_s, (int, float)):
        spans.append(words("runs.left", time=duration(left_s)))
    stage = words.of("stage", str(run.progress.get("stage") or "starting"))
    return (
        f'<article class="k-card run"><header>{badge(words.of("run_status", "running"), "live")}'
        f"<b>{escape(run.method)} · {escape(stage)}</b><span>{fraction:.0%}</span></header>"
        f'<div class="k-bar" role="progressbar" aria-valuenow="{fraction * 100:.0f}" aria-valuemin="0"'
        f' aria-valuemax="100"><i style="width:{fraction:.1%}"></i></div>'
        f'<p class="k-hint">{escape(str(run.progress.get("message") or ""))}</p>'
        f'<p class="k-hint">{escape(" · ".join(spans))}</p>'
        "</article>"
    )


def _fraction(progress: Json) -> float:
    """Return how much is done, 0 to 1."""
    fraction = progress.get("fraction")
    if not isinstance(fraction, (int, float)):
        steps = progress.get("steps") or 0
        fraction = progress.get("step", 0) / steps if steps else 0.0
    return min(1.0, max(0.0, float(fraction)))


def next_run_text(words: Words, coming: NextRun) -> str:
    """Return one sentence on what starts the next run."""
    facts = {"when": coming.when, "labels": coming.labels, "problem": coming.problem}
    return words.of("next_run", coming.kind, **facts)


def run_list(words: Words, runs: Sequence[Run], *, current: str, now: float) -> str:
    """Return the runs, the newest first."""
    if not runs:
        return empty(words("runs.none"), words("runs.none_text"))
    return "".join(
        f'<button type="button" class="k-item" data-act="open" data-id="{escape(run.id)}"'
        f"{' aria-current=true' if run.id == current else ''}>"
        f"<b>{escape(run.method)} {badge(words.of('run_status', run.status), STATUS_KINDS.get(run.status, 'quiet'))}</b>"
        f"<small>{escape(words.of('trigger', run.trigger))} · {escape(when(words, run.started_at, now))}</small></button>"
        for run in runs
    )


def run_detail(words: Words, run: Run) -> str:
    """Return how a run ended, what it cost and how it can be repeated."""
    facts = [
        (words("runs.started_at"), moment(run.started_at)),
        (words("runs.took"), duration(run.finished_at - run.started_at) if run.finished_at else "–"),
        (words("runs.seed"), str(run.seed)),
        (words("runs.code"), run.code_version),
        *cost_facts(words, run.cost),
    ]
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    status = badge(words.of("run_status", run.status), STATUS_KINDS.get(run.status, "quiet"))
    message = f'<p class="k-message">{escape(run.message)}</p>' if run.message else ""
    times = stage_times(words, run.cost.get("stages_s"))
    return f'<h2>{escape(run.method)} {status}</h2>{message}<dl class="k-list-of-facts">{rows}</dl>{times}'


def stage_times(words: Words, stages: Any) -> str:
    """Return how long each stage took as bars, the longest full; nothing when that was not recorded."""
    if not isinstance(stages, dict) or not all(isinstance(each, (int, float)) for each in stages.values()):
        return ""
    longest = max(stages.values(), default=0) or 1
    rows = "".join(
        f"<div><dt>{escape(words.of('stage', name))}</dt>"
        f'<dd class="k-bar"><i style="width:{seconds / longest:.1%}"></i></dd><dd>{duration(seconds)}</dd></div>'
        for name, seconds in sorted(stages.items(), key=lambda item: _place(item[0]))
    )
    return f'<h3>{escape(words("runs.times"))}</h3><dl class="k-times">{rows}</dl>' if rows else ""


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def cost_facts(words: Words, cost: Json) -> list[tuple[str, str]]:
    """Return a run's cost: known parts with their units, others as they stand; not its duration and times, shown apart."""
    shown = {name: value for name, value in cost.items() if not isinstance(value, dict) and name != "wall_s"}
    if not shown.get("peak_device_bytes", 1):  # without a GPU
        del shown["peak_device_bytes"]
    return [(words.of("cost", name), _cost(name, value)) for name, value in shown.items()]


def _cost(name: str, value: Any) -> str:
    if name.endswith("_s") and isinstance(value, (int, float)):
        return duration(value)
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / MEBIBYTE:,.0f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return a time span in its two largest units."""
    whole = max(0, round(seconds))
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        return f"{whole // MINUTE_S} min {whole % MINUTE_S} s"
    return f"{whole // HOUR_S} h {whole % HOUR_S // MINUTE_S} min"
