"""Hard stops of a canary: what takes it back at once, whatever people think of its answers. Pure functions of what was seen.

Each returns the reasons that hold now, in plain words; none holds: an empty list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance
from typing import Literal

from assistant.canary import CanaryConfig
from assistant.canary_evidence import Arms, Null, log_e_value, mean_exceeds

Event = Literal["answer", "empty", "error", "wrong_policy", "engine_died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One answer, or what came instead of it."""

    at: float
    """Unix seconds."""
    canary: bool
    """Of the policy that is watched; False is stable's."""
    event: Event = "answer"
    total_s: float = 0.0


def hard_stops(seen: Sequence[Seen], *, now: float, config: CanaryConfig) -> list[str]:
    """Return what stops the canary, from answers in the order of time."""
    return [*faults(seen, now=now, config=config), *latency(seen, config)]


def still_needed(seen: Sequence[Seen], *, now: float, config: CanaryConfig) -> list[Seen]:
    """Return the answers that the stops look at now or later: of the last window, and as far back as latency reads."""
    canary = sorted(one.at for one in seen if one.canary and one.event == "answer")
    since = min([now - config.window_s, *canary[-config.latency_windows * config.latency_answers :]])
    return [one for one in seen if one.at >= since]


def faults(seen: Sequence[Seen], *, now: float, config: CanaryConfig, who: str = "canary") -> list[str]:
    """Return what is wrong with the answers themselves, of the canary or of `who` is watched like one."""
    asked = [one for one in seen if one.event != "engine_died"]
    window = [one for one in asked if one.at > now - config.window_s]
    return [
        *wrong_policy(seen, who),
        *engine_deaths(seen, who, now=now, config=config),
        *empty_answers(window, who, config),
        *error_burst(window, who, config),
    ]


def wrong_policy(seen: Sequence[Seen], who: str) -> list[str]:
    """Return a reason when another policy ever answered in the canary's place: nothing it is judged by holds then."""
    wrong = sum(one.event == "wrong_policy" for one in seen if one.canary)
    return [f"another policy answered {wrong} questions in the {who}'s place"] if wrong else []


def engine_deaths(seen: Sequence[Seen], who: str, *, now: float, config: CanaryConfig) -> list[str]:
    """Return a reason when the engine died again and again while the canary was there, whoever was answering."""
    died = sum(one.event == "engine_died" and one.at > now - config.deaths_window_s for one in seen)
    if died < config.deaths:
        return []
    return [f"the engine died {died} times in {config.deaths_window_s / 60:.0f} minutes with the {who} in it"]


def empty_answers(window: Sequence[Seen], who: str, config: CanaryConfig) -> list[str]:
    """Return a reason when the canary's answers of one window were empty."""
    canary = [one for one in window if one.canary]
    empty = sum(one.event == "empty" for one in canary)
    if empty < config.empty_answers or empty <= config.empty_share * len(canary):
        return []
    return [f"{empty} of the {who}'s {len(canary)} answers of the last {config.window_s:.0f} s were empty"]


def error_burst(window: Sequence[Seen], who: str, config: CanaryConfig) -> list[str]:
    """Return a reason when the canary failed in one window more than it may and much more than stable."""
    canary, stable = ([one for one in window if one.canary is arm] for arm in (True, False))
    errors = sum(one.event == "error" for one in canary)
    of_stable = sum(one.event == "error" for one in stable) / max(1, len(stable))
    least = max(config.error_share, config.error_ratio * of_stable) * len(canary)
    if errors < config.errors or errors <= least:
        return []
    return [f"{errors} of the {who}'s {len(canary)} requests failed, {of_stable:.0%} of stable's"]


def latency(seen: Sequence[Seen], config: CanaryConfig) -> list[str]:
    """Return a reason when the canary was slower in each of the last windows, counted in canary answers.

    Stable's answers of the same time count; a window with fewer of them than the canary has says nothing.
    """
    answers = [one for one in seen if one.event == "answer"]
    canary = [one for one in answers if one.canary]
    size, ratios = config.latency_answers, []
    for back in range(config.latency_windows):
        window = canary[len(canary) - size * (back + 1) : len(canary) - size * back]
        if len(canary) < size * (back + 1):
            return []
        stable = [
            one.total_s for one in answers if not one.canary and window[0].at <= one.at <= window[-1].at
        ]
        if len(stable) < size:
            return []
        ratios.append(median(one.total_s for one in window) / max(1e-3, median(stable)))
    if min(ratios) < config.latency_ratio:
        return []
    return [f"the canary took {min(ratios):.1f} times as long as stable in {len(ratios)} windows in a row"]


def length_outside(canary: Sequence[int], stable: Sequence[int], config: CanaryConfig) -> list[str]:
    """Return a reason when the canary's mean length (tokens of first answers) surely lies outside the band."""
    if min(len(canary), len(stable)) < config.length_conversations:
        return []
    means, n = (fmean(canary), fmean(stable)), (len(canary), len(stable))
    spread = (variance(canary), variance(stable))
    longer = mean_exceeds(mean=means, variance=spread, n=n, factor=1 + config.band, alpha=config.stop_alpha)
    # Shorter is the same question with the signs turned: -mean above -(1 - band) * stable's.
    shorter = mean_exceeds(
        mean=(-means[0], -means[1]), variance=spread, n=n, factor=1 - config.band, alpha=config.stop_alpha
    )
    if max(longer, shorter) <= 0:
        return []
    return [f"the canary's answers have {means[0]:.0f} tokens, stable's {means[1]:.0f}"]


def refusals_outside(stages: Sequence[Arms], config: CanaryConfig) -> list[str]:
    """Return a reason when the share of conversations handed over (`bad` in `stages`) surely lies outside the band."""
    if not any(arms.canary for arms in stages):
        return []
    nulls = (Null(ratio=1 + config.band), Null(ratio=1 - config.band, above=True))
    if max(log_e_value(stages, null) for null in nulls) < -math.log(config.stop_alpha):
        return []
    canary, stable = sum(arms.canary for arms in stages), sum(arms.stable for arms in stages)
    handed = sum(arms.canary_bad for arms in stages), sum(arms.stable_bad for arms in stages)
    return [f"the canary hands over {handed[0]} of {canary} conversations, stable {handed[1]} of {stable}"]
