"""The judgement of a canary: Failed, Successful or Inconclusive, with the numbers and the reasons in plain words.

The names are those of Argo Rollouts' analysis. Failed is meant to take the canary back by itself, Successful only allows a
person to promote it, Inconclusive goes on. Pure functions; the evidence is `canary_evidence`, the feed `storage.outcomes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from assistant.canary_evidence import Arms, Null, difference_bounds, log_e_value

Status = Literal["Successful", "Failed", "Inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryConfig:
    """Every threshold of the judgement with its source."""

    rollback_alpha: float = 0.01
    """Most probability of ever taking back, for its conversations, a canary that is no worse: the product's promise."""
    promotion_alpha: float = 0.05
    """Most probability of ever calling a canary Successful that is worse by the margin: the usual 5%."""
    margin: float = 0.05
    """Difference of the rates of negative conversations that promotion must rule out. A choice of this project: a doubling
    at a rate of 5% or more lies outside."""
    stop_alpha: float = 0.001
    """The same for lengths and hand-overs: four bounds of it stay well below `rollback_alpha`."""
    empty_answers: int = 3
    empty_share: float = 0.01
    """So many empty answers in one window, and more than this share: the gate's own `empty_rate_rise_max`."""
    window_s: float = 300.0
    errors: int = 3
    error_share: float = 0.05
    """Failed requests in one window: Argo Rollouts' example analysis (every 5 minutes, success 0.95, failure limit 3)."""
    error_ratio: float = 2.0
    """An error burst must be the canary's own: so many times stable's share. A choice of this project."""
    deaths: int = 2
    deaths_window_s: float = 1800.0
    """An engine that dies once may be bad luck; twice in half an hour it is what is new in it. This project's choice."""
    latency_ratio: float = 1.5
    latency_windows: int = 3
    latency_answers: int = 20
    """Median seconds an answer, in so many windows in a row of so many canary answers: with log-normal times (sigma 0.5) the
    ratio of medians has a standard error of 0.15, so that three windows by chance are below one in a million."""
    band: float = 0.5
    """Lengths and hand-overs may differ from stable's by half: beyond it the gate's evaluation was of something else."""
    length_conversations: int = 50
    """Conversations of each arm before lengths are compared: the bound rests on the central limit theorem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the verdict rests on. Rates are shares of concluded conversations with a negative event."""

    e_value: float
    canary: int
    canary_negative: int
    stable: int
    stable_negative: int
    difference_low: float
    difference_high: float
    """Bounds of the difference of the rates, canary minus stable, that hold at all times (99% and 95%)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is to be done with the canary, and why."""

    status: Status
    evidence: Evidence
    reasons: tuple[str, ...]


def judge(stages: Sequence[Arms], *, stops: Sequence[str], config: CanaryConfig) -> Verdict:
    """Return the verdict on the conversations of each share the canary had, and on the hard stops that fired."""
    evidence = evidence_of(stages, config)
    if stops:
        return Verdict(status="Failed", evidence=evidence, reasons=tuple(stops))
    if not evidence.canary:  # whatever stable's conversations seem to say of it
        return Verdict(status="Inconclusive", evidence=evidence, reasons=(_rates(evidence),))
    if evidence.e_value >= 1 / config.rollback_alpha:
        return Verdict(
            status="Failed", evidence=evidence, reasons=(f"worse than stable: {_rates(evidence)}",)
        )
    ruled_out = log_e_value(stages, Null(offset=config.margin, above=True)) >= -math.log(
        config.promotion_alpha
    )
    if ruled_out:
        reason = f"not worse than stable by {config.margin:.0%} of the conversations: {_rates(evidence)}"
        return Verdict(status="Successful", evidence=evidence, reasons=(reason,))
    reason = f"neither worse nor shown to be as good: {_rates(evidence)}"
    return Verdict(status="Inconclusive", evidence=evidence, reasons=(reason,))


def evidence_of(stages: Sequence[Arms], config: CanaryConfig) -> Evidence:
    """Return the numbers behind a verdict."""
    low, high = difference_bounds(stages, low_alpha=config.rollback_alpha, high_alpha=config.promotion_alpha)
    return Evidence(
        e_value=math.exp(min(700.0, log_e_value(stages))),  # exp(710) is beyond float64
        canary=sum(arms.canary for arms in stages),
        canary_negative=sum(arms.canary_bad for arms in stages),
        stable=sum(arms.stable for arms in stages),
        stable_negative=sum(arms.stable_bad for arms in stages),
        difference_low=low,
        difference_high=high,
    )


def _rates(evidence: Evidence) -> str:
    if not evidence.canary:
        return "no conversation of the canary has concluded yet"
    return (
        f"{evidence.canary_negative} of {evidence.canary} conversations were negative on the canary, "
        f"{evidence.stable_negative} of {evidence.stable} on stable (difference {evidence.difference_low:+.1%} to "
        f"{evidence.difference_high:+.1%}, e-value {evidence.e_value:.3g})"
    )
