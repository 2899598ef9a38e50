"""The displacement watch: preference losses may lower the chosen answers too, and with them safety (arXiv 2410.08847)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.training_config import FixedAnswersConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How log pi(chosen) of one optimiser step's pairs stands against the reference."""

    nats_per_token: float
    """Mean over the pairs; negative: it fell."""
    falling_share: float
    """Of pairs that fell by more than the floor."""


def displacement(window: Sequence[Change], config: FixedAnswersConfig) -> str | None:
    """Return why the latest steps count as displacement, None when they do not or are too few to tell."""
    recent = window[-config.displacement_window :]
    if len(recent) < config.displacement_window:
        return None
    change = sum(step.nats_per_token for step in recent) / len(recent)
    falling = sum(step.falling_share for step in recent) / len(recent)
    if change < -config.displacement_cap_nats_per_token:
        return f"log pi(chosen) fell by {-change:.2f} nats a token (cap {config.displacement_cap_nats_per_token})"
    if falling > config.displacement_share_cap:
        return f"log pi(chosen) fell on {falling:.0%} of pairs (cap {config.displacement_share_cap:.0%})"
    return None


def raised_nll_weight(nll_weight: float, config: FixedAnswersConfig) -> float:
    """Return the NLL weight to go on with: the configured first one, then twice the last."""
    return max(config.displacement_nll_weight, 2 * nll_weight)
