"""Charts as SVG text that takes the page's colours, so that they read in light and dark and need no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LABEL_WIDTH, ROW_HEIGHT = 480, 180, 32
CURVE_WIDTH, CURVE_HEIGHT, MARGIN, SCALE_WIDTH = 300, 130, 8, 46
MOST_POINTS = 200
"""More points than pixels only cost time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number between 0 and 1 with its interval; `threshold` is what it must reach."""

    label: str
    value: float
    low: float
    high: float
    threshold: float | None = None
    is_good: bool | None = None


def wilson(successes: float, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; (0, 1) without observations.

    Wilson (1927), with z = 1.96 for 95%.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def intervals(rows: Sequence[Interval], *, title: str, marked: float | None = 0.5) -> str:
    """Return proportions as dots with their intervals on one scale from 0 to 100%."""
    height = ROW_HEIGHT * len(rows) + 26
    lines = "".join(
        _scale_line(share, height, is_marked=share == marked) for share in (0, 0.25, 0.5, 0.75, 1)
    )
    drawn = "".join(_interval_row(row, index) for index, row in enumerate(rows))
    return (
        f'<div class="k-scroll"><svg class="k-chart wide" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{lines}{drawn}</svg></div>'
    )


def _x(share: float) -> float:
    return LABEL_WIDTH + min(1.0, max(0.0, share)) * (WIDTH - LABEL_WIDTH - 24)


def _scale_line(share: float, height: int, *, is_marked: bool) -> str:
    x, kind = _x(share), "mark" if is_marked else "grid"
    return (
        f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 20}"/>'
        f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{share:.0%}</text>'
    )


def _interval_row(row: Interval, index: int) -> str:
    y = ROW_HEIGHT * index + ROW_HEIGHT / 2 + 2
    kind = {True: "good", False: "bad", None: "plain"}[row.is_good]
    wall = ""
    if row.threshold is not None:
        x = _x(row.threshold)
        wall = f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 11:.1f}" y2="{y + 11:.1f}"/>'
    return (
        f'<g class="{kind}"><text class="label" x="0" y="{y + 4:.1f}">{escape(row.label)}</text>'
        f'<line class="bar" x1="{_x(row.low):.1f}" x2="{_x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle cx="{_x(row.value):.1f}" cy="{y:.1f}" r="5"/>{wall}'
        f"<title>{row.value:.1%} ({row.low:.1%} – {row.high:.1%})</title></g>"
    )


def curve(points: Sequence[tuple[int, float]], *, title: str) -> str:
    """Return one curve over steps with its last value; what is not finite leaves a gap."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return ""
    kept = finite[:: max(1, len(finite) // MOST_POINTS)]
    if kept[-1] != finite[-1]:
        kept.append(finite[-1])
    low, high = min(value for _, value in kept), max(value for _, value in kept)
    first, last = kept[0][0], kept[-1][0]
    path = " ".join(
        f"{_between(step, first, last, MARGIN, CURVE_WIDTH - SCALE_WIDTH):.1f},"
        f"{_between(value, low, high, CURVE_HEIGHT - 22, MARGIN):.1f}"
        for step, value in kept
    )
    end_x, end_y = path.split(" ")[-1].split(",")
    return (
        f'<figure class="k-curve"><figcaption>{escape(title)} <b>{kept[-1][1]:.4g}</b></figcaption>'
        f'<svg class="k-chart" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<line class="grid" x1="0" x2="{CURVE_WIDTH - SCALE_WIDTH}" y1="{MARGIN}" y2="{MARGIN}"/>'
        f'<line class="grid" x1="0" x2="{CURVE_WIDTH - SCALE_WIDTH}" y1="{CURVE_HEIGHT - 22}" y2="{CURVE_HEIGHT - 22}"/>'
        f'<polyline class="line" points="{path}"/><circle class="line" cx="{end_x}" cy="{end_y}" r="3"/>'
        f'<text class="tick" x="0" y="{CURVE_HEIGHT - 6}">{first}</text>'
        f'<text class="tick" x="{CURVE_WIDTH - SCALE_WIDTH}" y="{CURVE_HEIGHT - 6}" text-anchor="end">{last}</text>'
        f'<text class="tick" x="{CURVE_WIDTH}" y="{MARGIN + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text class="tick" x="{CURVE_WIDTH}" y="{CURVE_HEIGHT - 18}" text-anchor="end">{low:.3g}</text>'
        "</svg></figure>"
    )


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    """Return where `value` of [low, high] lies between `start` and `end`."""
    return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)
