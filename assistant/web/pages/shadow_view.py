"""What is known of a shadow as HTML, beside the served policy's answers to the same questions."""

from __future__ import annotations

from html import escape

from assistant.shadow_evidence import Estimate
from assistant.shadow_watch import ShadowEvidence
from assistant.web.pages.html import note, table
from assistant.web.words import Words

ROWS = (
    ("failed", "failed", None, None),
    ("empty", "empty", "served_empty", "empty_difference"),
    ("hand_over", "hand_over", "served_hand_over", "hand_over_difference"),
    ("length", None, None, "length_ratio"),
    ("latency", None, None, "latency_ratio"),
    ("agreement", None, None, "agreement"),
)
"""Each row's name and which measures stand in it: the shadow's, the served policy's, one against the other."""


def shadow_html(words: Words, evidence: ShadowEvidence | None) -> str:
    """Return the counts and measures of a shadow; nothing before the first."""
    if evidence is None:
        return ""
    counts = words(
        "shadow.counts",
        policy=evidence.policy_id,
        stable=evidence.stable_id,
        answered=f"{evidence.answered:,}",
        failed=f"{evidence.failed:,}",
        skipped=f"{evidence.skipped:,}",
    )
    stopped = f"{words('shadow.stopped')} · {evidence.policy_id}: {'; '.join(evidence.stops)}"
    headers = [words.of("evidence", "measure"), words("shadow.shadow"), words("shadow.served")]
    body = [
        [escape(words.of("shadow_measure", name)), *(shown(evidence, measure) for measure in measures)]
        for name, *measures in ROWS
    ]
    return (
        f'<h3>{escape(words("shadow.title"))}</h3><p class="k-hint">{escape(counts)}</p>'
        + (note(stopped, "bad") if evidence.stops else "")
        + table([*headers, words("shadow.beside")], body, kind="numbers")
    )


def shown(evidence: ShadowEvidence, measure: str | None) -> str:
    """Return a measure with its interval; a dash where there is none."""
    estimate = evidence.measures[measure] if measure else Estimate(value=None, low=None, high=None)
    if measure is None or estimate.value is None:
        return '<span class="k-hint">–</span>'

    def number(value: float) -> str:
        if measure.endswith("_ratio"):
            return f"{value:.2f}×"
        return f"{value:+.1%}" if measure.endswith("_difference") else f"{value:.1%}"

    text = f"<b>{number(estimate.value)}</b>"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} <small class='k-hint'>{number(estimate.low)} – {number(estimate.high)}</small>"
