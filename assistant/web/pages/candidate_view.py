"""The evidence about a candidate as HTML: verdict, numbers, charts, answers side by side, what it learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from assistant.quarantine import Quarantine
from assistant.web.pages.charts import Interval, curve, intervals
from assistant.web.pages.html import badge, difference, icon, moment, note, table, when
from assistant.web.words import Words
from storage.records import Approval, Evaluation, Json, Policy, Snapshot

SHOWN_SAMPLES = 6
MOST_CURVES = 8
STANDING_KINDS = {
    "candidate": "live",
    "stable": "good",
    "canary": "live",
    "shadow": "live",
    "refused": "bad",
    "rejected": "bad",
}
UNIT_INTERVAL_NAMES = ("rate", "accuracy", "share")
"""Numbers with these words in their names are proportions, drawn on one scale."""


def candidate_list(
    words: Words,
    candidates: Sequence[tuple[Policy, str, Evaluation | None]],
    *,
    current: str | None,
    now: float,
) -> str:
    """Return the policies, newest first, each with its standing."""
    return "".join(
        f'<button type="button" class="k-item" data-act="open" data-id="{escape(policy.id)}"'
        f"{' aria-current=true' if policy.id == current else ''}><b>{escape(policy.id)}</b>"
        f"<small>{standing_badge(words, standing)} {escape(_headline(words, evaluation))}"
        f" {escape(when(words, policy.created_at, now))}</small></button>"
        for policy, standing, evaluation in candidates
    )


def standing_badge(words: Words, standing: str) -> str:
    """Return a policy's standing as a label."""
    return badge(words.of("standing", standing), STANDING_KINDS.get(standing, "quiet"))


def _headline(words: Words, evaluation: Evaluation | None) -> str:
    number = headline_number(evaluation.numbers) if evaluation else None
    return words("candidates.wins", percent=f"{number['value']:.0%}") if number else ""


def headline_number(numbers: Mapping[str, Json]) -> Json | None:
    """Return the win rate that the verdict rests on, if there is one."""
    for name in ("win_rate_length_controlled", "win_rate"):
        number = numbers.get(name)
        if number and isinstance(number.get("value"), (int, float)):
            return number
    return None


def verdict(words: Words, policy: Policy, standing: str, evaluation: Evaluation | None) -> str:
    """Return whether the gate passed the candidate, and if not, every reason."""
    head = f"<h2>{escape(policy.id)} {standing_badge(words, standing)}</h2>"
    if evaluation is None:
        return f'{head}<p class="k-hint">{escape(words("candidates.not_evaluated"))}</p>'
    kind, title = (
        ("good", words("candidates.passed")) if evaluation.passed else ("bad", words("candidates.refused"))
    )
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in evaluation.reasons)
    against = words("candidates.against", policy=evaluation.incumbent_id, at=moment(evaluation.created_at))
    return (
        f'{head}<div class="k-verdict {kind}">{icon("check" if evaluation.passed else "cross")}<div>'
        f"<b>{escape(title)}</b><p>{escape(against)}</p><ul>{reasons}</ul></div></div>"
    )


def quarantined(words: Words, found: Quarantine | None) -> str:
    """Return why the policy is quarantined and since when; nothing where it is not."""
    if found is None:
        return ""
    return note(words("candidates.quarantined", reason=found.reason), "bad", at=f" · {moment(found.at)}")


def decision(words: Words, approval: Approval | None, name: str) -> str:
    """Return what was decided before, by whom and why."""
    if approval is None:
        return ""
    text = words.of("decision", approval.decision)
    return (
        f'<p class="k-hint">{escape(text)} · {escape(name)} · {moment(approval.created_at)} · '
        f"“{escape(approval.reason)}”</p>"
    )


def numbers_table(words: Words, numbers: Mapping[str, Json]) -> str:
    """Return every number with its interval, what it had to reach and whether it did."""
    headers = [
        words.of("evidence", name) for name in ("measure", "value", "interval", "required", "n", "result")
    ]
    rows = [
        [
            escape(_measure(words, name)),
            f"<b>{_shown(number.get('value'))}</b>",
            f"{_shown(number.get('low'))} – {_shown(number.get('high'))}",
            _required(words, number),
            _shown(number.get("n")),
            _result(words, number),
        ]
        for name, number in in_order(numbers)
    ]
    return table(headers, rows, kind="numbers")


def in_order(numbers: Mapping[str, Json]) -> list[tuple[str, Json]]:
    """Return the numbers with the win rates, on which most depends, first."""
    return sorted(numbers.items(), key=lambda item: (not item[0].startswith("win_rate"), item[0]))


def _measure(words: Words, name: str) -> str:
    """Return what a number measures, in words; those of the served policy are named after the candidate's."""
    ours = name.removesuffix("_incumbent")
    text = words.of("number", ours)
    return text if ours == name else words("evidence.of_served", measure=text)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _required(words: Words, number: Json) -> str:
    if number.get("threshold") is None:
        return '<span class="k-hint">–</span>'
    part, _, side = str(number.get("rule") or "").partition(" ")
    sign = {"at least": "≥", "at most": "≤"}.get(side, "")
    which = (
        f' <small class="k-hint">{escape(words.of("part", part))}</small>' if part in ("low", "high") else ""
    )
    return f"{sign} {_shown(number['threshold'])}{which}"


def _result(words: Words, number: Json) -> str:
    passed = number.get("passed")
    if passed is None:
        return '<span class="k-hint">–</span>'
    return badge(words("evidence.yes"), "good") if passed else badge(words("evidence.no"), "bad")


def number_chart(words: Words, numbers: Mapping[str, Json]) -> str:
    """Return the proportions among the numbers as one chart with thresholds."""
    rows = [
        Interval(
            label=_measure(words, name),
            value=number["value"],
            low=number["low"],
            high=number["high"],
            threshold=number.get("threshold"),
            is_good=number.get("passed"),
        )
        for name, number in in_order(numbers)
        if _is_proportion(name, number)
    ]
    return intervals(rows, title=words("candidates.chart")) if rows else ""


def _is_proportion(name: str, number: Json) -> bool:
    parts = [number.get(part) for part in ("value", "low", "high")]
    is_known = all(isinstance(part, (int, float)) and 0 <= part <= 1 for part in parts)
    return is_known and not name.endswith("_change") and any(word in name for word in UNIT_INTERVAL_NAMES)


def curves(words: Words, metrics: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Return a run's curves side by side, and what was measured once as plain facts."""
    once = {name: points[0][1] for name, points in metrics.items() if len(points) == 1}
    drawn = [
        curve(points, title=words.of("metric", name)) for name, points in metrics.items() if name not in once
    ]
    drawn = [figure for figure in drawn if figure][:MOST_CURVES]
    if not drawn and not once:
        return f'<p class="k-hint">{escape(words("runs.no_curves"))}</p>'
    facts = "".join(
        f"<div><dt>{escape(words.of('metric', name))}</dt><dd>{value:.4g}</dd></div>"
        for name, value in once.items()
    )
    return f'<div class="k-curves">{"".join(drawn)}</div><dl class="k-list-of-facts">{facts}</dl>'


def samples(words: Words, pairs: Sequence[Json]) -> str:
    """Return answers of both policies to the same questions, with the differences marked."""
    if not pairs:
        return f'<p class="k-hint">{escape(words("candidates.no_samples"))}</p>'
    return "".join(_sample(words, pair) for pair in pairs[:SHOWN_SAMPLES])


def _sample(words: Words, pair: Json) -> str:
    before, after = difference(str(pair.get("incumbent", "")), str(pair.get("candidate", "")))
    return (
        f'<div class="k-sample"><p class="k-asked">{escape(str(pair.get("question", "")))}</p><div class="k-pair">'
        f'<article class="k-card"><h4>{escape(words("candidates.now"))}</h4><div class="k-text">{before}</div></article>'
        f'<article class="k-card"><h4>{escape(words("candidates.new"))}</h4><div class="k-text">{after}</div></article>'
        "</div></div>"
    )


def learnt_from(words: Words, snapshot: Snapshot | None) -> str:
    """Return how many labels of which kind the candidate was trained on."""
    if snapshot is None:
        return f'<p class="k-hint">{escape(words("candidates.no_snapshot"))}</p>'
    facts = "".join(
        f"<div><b>{escape(_shown(count) if isinstance(count, (int, float)) else str(count))}</b>"
        f"<span>{escape(words.of('count', name))}</span></div>"
        for name, count in snapshot.counts.items()
        if not isinstance(count, (dict, list))
    )
    return (
        f'<div class="k-facts">{facts}</div><p class="k-hint">{escape(words("candidates.snapshot"))} '
        f"<code>{escape(snapshot.id)}</code> · sha256 <code>{escape(snapshot.sha256[:16])}…</code></p>"
    )
