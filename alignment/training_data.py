"""The snapshot's labels, described and divided into what the policy learns from, what the judge learns from and the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from alignment.config import AlignmentConfig, ChoiceConfig, DataConfig
from alignment.preferences import Pair, Preferences, Thumb, split_by_prompt
from storage import policies
from storage.records import Comparison, Correction, Json, Policy, Rating, Snapshot, Turn
from storage.store import Store

Answered = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, answer ids)"""
MOST_LOG_RATIO_NATS = 20.0
"""A larger importance weight is cut off: one answer then outweighs everything anyhow, and no sum overflows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Three parts that share no prompt."""

    policy: Preferences
    judge: Preferences
    held_out: Preferences

    def unseen_by(self, seen: Set[str]) -> Parts:
        """Return the parts where the judge may have learnt from the prompts `seen` before, and nobody else from them."""
        return replace(
            self, policy=without_prompts(self.policy, seen), held_out=without_prompts(self.held_out, seen)
        )

    def learnt_prompts(self) -> set[str]:
        """Return the keys of the prompts that the policy or the judge was trained on."""
        return prompts_of(self.policy) | prompts_of(self.judge)


def prompts_in(labels: Preferences) -> dict[tuple[int, ...], str]:
    """Return the labels' different prompts with their keys."""
    items: list[Pair | Thumb] = [*labels.pairs, *labels.thumbs]
    return {item.prompt_ids: item.prompt_key for item in items}


def longest_answer(labels: Preferences) -> int:
    """Return the tokens of the longest labelled answer, 0 without labels."""
    answers = [answer for pair in labels.pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    return max(map(len, answers + [thumb.answer_ids for thumb in labels.thumbs]), default=0)


def without_prompts(preferences: Preferences, keys: Set[str]) -> Preferences:
    """Leave out the labels on prompts of these keys."""
    return replace(
        preferences,
        pairs=tuple(pair for pair in preferences.pairs if pair.prompt_key not in keys),
        thumbs=tuple(thumb for thumb in preferences.thumbs if thumb.prompt_key not in keys),
    )


def prompts_of(preferences: Preferences) -> set[str]:
    """Return the keys of the prompts that have labels."""
    return {p.prompt_key for p in preferences.pairs} | {t.prompt_key for t in preferences.thumbs}


def divide(preferences: Preferences, config: DataConfig, *, seed: int) -> Parts:
    """Divide by prompt; the same prompts and seed give the same parts."""
    rest, held_out = split_by_prompt(preferences, held_out=config.held_out_share, seed=seed)
    policy, judge = split_by_prompt(rest, held_out=config.judge_share, seed=seed + 1)
    return Parts(policy=policy, judge=judge, held_out=held_out)


def parts_short(parts: Parts, method: str, *, min_class_thumbs: int) -> str:
    """Return what a part lacks for what is trained or measured on it, else "".

    Args:
        method: that trains the policy.
        min_class_thumbs: `kto.min_class_thumbs`.
    """
    sides = [("judge", parts.judge), ("held-out", parts.held_out)]
    if method == "dpo" and not any(not pair.tie for pair in parts.policy.pairs):
        return _lacks("policy", "comparison with a winner, nor a correction,")
    if method == "kto":
        counts = {up: sum(thumb.up == up for thumb in parts.policy.thumbs) for up in (True, False)}
        few = min(counts, key=lambda up: counts[up])
        if counts[few] < min_class_thumbs:
            return (
                f"Of the thumbs that would train the policy {counts[few]} point {'up' if few else 'down'} "
                f"({min_class_thumbs} needed, kto.min_class_thumbs): mark such answers too, or compare answers."
            )
    for name, part in [("policy", parts.policy)] * (method == "ppo") + sides:
        if not any(not pair.tie for pair in part.pairs) and len({thumb.up for thumb in part.thumbs}) < 2:
            return _lacks(name, "comparison with a winner, nor thumbs of both kinds,")
    return ""


def _lacks(part: str, what: str) -> str:
    return (
        f"Divided by question, the {part} part of the labels has no {what} to go by: collect comparisons with a winner on "
        "more questions."
    )


def most_pairs(snapshot: Snapshot) -> int:
    """Return a number of pairs that the labels cannot exceed: n thumbs make at most (n / 2)^2 pairs."""
    counts = snapshot.counts
    thumbs = int(counts.get("ratings", 0))
    return int(counts.get("comparisons", 0)) + int(counts.get("corrections", 0)) + thumbs * thumbs // 4


def may_suffice(snapshot: Snapshot, config: ChoiceConfig, *, thumbs_train: bool = False) -> bool:
    """Return whether the labels could allow training if all were usable; thumbs alone only where KTO is available."""
    counts = snapshot.counts
    return (
        most_pairs(snapshot) >= config.min_pairs
        or int(counts.get("corrections", 0)) >= config.min_corrections
        or (thumbs_train and _most_thumbs(counts) >= config.min_thumbs)
    )


def _most_thumbs(counts: Json) -> int:
    """A comparison of two bad answers makes two."""
    return int(counts.get("ratings", 0)) + 2 * int(counts.get("comparisons", 0))


def recent_policies(store: Store, incumbent: Policy, config: AlignmentConfig) -> frozenset[str]:
    """Return the ids of the served policy and its ancestors, `choice.recent_policies` in all."""
    found: list[str] = []
    policy: Policy | None = incumbent
    while policy is not None and len(found) < config.choice.recent_policies:
        found.append(policy.id)
        policy = policies.get_policy(store, policy.parent_id) if policy.parent_id else None
    return frozenset(found)


def on_policy_share(store: Store, preferences: Preferences, recent: frozenset[str]) -> float:
    """Return the share of pairs whose answers all come from the policies `recent`; 0 without pairs."""
    answered_by: dict[str, str] = {}
    shown = _turns_of_pairs(store, preferences)
    ours = sum(_all_recent(store, turns, recent, answered_by) for turns in shown)
    return ours / len(shown) if shown else 0.0


def answers_by_policy(store: Store, preferences: Preferences) -> dict[str, list[Answered]]:
    """Return the served answers behind the pairs, each once, by the policy that gave them."""
    found: dict[str, list[Answered]] = {}
    for turn_id in dict.fromkeys(turn for turns in _turns_of_pairs(store, preferences) for turn in turns):
        turn = store.get(Turn, turn_id)
        found.setdefault(turn.policy_id, []).append((turn.prompt_token_ids, turn.answer_token_ids))
    return found


def effective_sample_share(
    answers: Mapping[str, Sequence[Answered]],
    *,
    served: str,
    log_ratios: Callable[[str, Sequence[Answered]], Sequence[float]],
) -> float | None:
    """Return (sum w)^2 / (n sum w^2) of the n answers' importance weights w = pi_served / pi_answered; None without any.

    Kish's effective sample size as a share (Kong 1992): 1 when every answer is the served policy's own, small when few of
    them are what it would say.

    Args:
        answers: by policy id (`answers_by_policy`).
        served: id of the served policy, whose own answers weigh 1.
        log_ratios: (policy id, its answers) to log pi_served - log pi_policy of each answer in nats, summed over its
            tokens. Only asked about other policies.
    """
    logs: list[float] = []
    for policy, given in answers.items():
        logs += [0.0] * len(given) if policy == served else list(log_ratios(policy, given))
    return ess_share(logs)


def ess_share(log_weights: Sequence[float]) -> float | None:
    """Return the effective share of weights given by their logs, sums kept in range; None without any."""
    if not log_weights:
        return None
    cut = [min(max(value, -MOST_LOG_RATIO_NATS), MOST_LOG_RATIO_NATS) for value in log_weights]
    most = max(cut)
    weights = [math.exp(value - most) for value in cut]
    return sum(weights) ** 2 / (len(weights) * sum(weight * weight for weight in weights))


def _turns_of_pairs(store: Store, preferences: Preferences) -> list[list[str]]:
    """Return the turns that each pair with a winner shows."""
    turns_of = _turns_of_labels(store)
    pairs = [pair for pair in preferences.pairs if not pair.tie]
    return [[turn for label in pair.id.split("+") for turn in turns_of[label]] for pair in pairs]


def _turns_of_labels(store: Store) -> dict[str, tuple[str, ...]]:
    """Return the turns that each label is about."""
    return {
        **{label.id: (label.left_turn_id, label.right_turn_id) for label in store.all(Comparison)},
        **{label.id: (label.turn_id,) for label in store.all(Correction)},
        **{label.id: (label.turn_id,) for label in store.all(Rating)},
    }


def _all_recent(store: Store, turns: Iterable[str], recent: frozenset[str], known: dict[str, str]) -> bool:
    for turn_id in turns:
        if turn_id not in known:
            known[turn_id] = store.get(Turn, turn_id).policy_id
        if known[turn_id] not in recent:
            return False
    return True
