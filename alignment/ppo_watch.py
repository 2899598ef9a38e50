"""The signs of a policy that breaks while PPO trains it, and the reason given when it must stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alignment.ppo_config import PpoConfig


@dataclass(frozen=True, slots=True)
class Start:
    """What the policy's first answers were like."""

    entropy_nats: float
    """A token, as sampled."""
    length_tokens: float


def why_stop(curves: Mapping[str, float], start: Start, config: PpoConfig) -> str | None:
    """Return why the policy that gave these answers must not be trained further, None when it may."""
    broken = [name for name, value in curves.items() if not math.isfinite(value)]
    if broken:
        return f"{broken[0]} is not finite"
    kl = curves["objective/kl_from_start_nats"]
    if kl > config.kl_cap_nats:
        return f"KL of an answer from the start is {kl:.2f} nats (cap {config.kl_cap_nats:g})"
    entropy = curves["objective/entropy_nats_per_token"]
    began = start.entropy_nats
    if entropy < min(config.entropy_share_min * began, began - config.entropy_fall_nats_min):
        return (
            f"entropy collapsed to {entropy:.2f} nats a token from {began:.2f} "
            f"(floor {config.entropy_share_min:.0%})"
        )
    ratio = curves["response/length"] / start.length_tokens
    if not config.length_ratio_min <= ratio <= config.length_ratio_max:
        bounds = f"{config.length_ratio_min:g} to {config.length_ratio_max:g}"
        return f"answers are {ratio:.2f} times as long as at the start (allowed {bounds})"
    return None
