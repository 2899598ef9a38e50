"""How people like each policy: thumbs and choices counted in storage, with Wilson intervals."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from assistant.web.pages.charts import Interval, intervals, wilson
from assistant.web.pages.html import table
from assistant.web.words import Words
from storage.tallies import Liking


def satisfaction_html(words: Words, rows: Sequence[Liking]) -> str:
    """Return a chart of the thumbs and a table of all counts."""
    if not rows:
        return f'<p class="k-hint">{escape(words("served.nothing_rated"))}</p>'
    chart = intervals(
        [_interval(row) for row in rows if row.rated], title=words("served.satisfaction"), marked=None
    )
    headers = [
        words.of("satisfaction", name)
        for name in ("policy", "answers", "up", "rated_up", "won", "first_token")
    ]
    body = [
        [
            f"<code>{escape(row.policy_id)}</code>",
            f"{row.turns:,}",
            f"{row.up:,} / {row.rated:,}",
            proportion(row.up, row.rated),
            proportion(row.won, row.compared),
            "–" if row.first_token_s is None else f"{row.first_token_s:.2f} s",
        ]
        for row in rows
    ]
    return (chart if any(row.rated for row in rows) else "") + table(headers, body)


def _interval(row: Liking) -> Interval:
    low, high = wilson(row.up, row.rated)
    return Interval(label=row.policy_id, value=row.up / row.rated, low=low, high=high)


def proportion(successes: int, n: int) -> str:
    """Return a share with its 95% interval, or a dash without observations."""
    if n == 0:
        return '<span class="k-hint">–</span>'
    low, high = wilson(successes, n)
    return f"<b>{successes / n:.0%}</b> <small class='k-hint'>{low:.0%} – {high:.0%}, n {n:,}</small>"
