"""The snapshot's labels, described and divided into what the policy learns from, what the judge learns from and the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alignment.config import AlignmentConfig, DataConfig
from alignment.preferences import Preferences, split_by_prompt
from storage import policies
from storage.records import Comparison, Correction, Policy, Rating, Snapshot, Turn
from storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Three parts that share no prompt."""

    policy: Preferences
    judge: Preferences
    held_out: Preferences

    def learnt_prompts(self) -> set[str]:
        """Return the keys of the prompts that the policy or the judge was trained on."""
        return prompts_of(self.policy) | prompts_of(self.judge)


def prompts_of(preferences: Preferences) -> set[str]:
    """Return the keys of the prompts that have labels."""
    return {p.prompt_key for p in preferences.pairs} | {t.prompt_key for t in preferences.thumbs}


def divide(preferences: Preferences, config: DataConfig, *, seed: int) -> Parts:
    """Divide by prompt; the same prompts and seed give the same parts."""
    rest, held_out = split_by_prompt(preferences, held_out=config.held_out_share, seed=seed)
    policy, judge = split_by_prompt(rest, held_out=config.judge_share, seed=seed + 1)
    return Parts(policy=policy, judge=judge, held_out=held_out)


def most_pairs(snapshot: Snapshot) -> int:
    """Return a number of pairs that the labels cannot exceed: n thumbs make at most (n / 2)^2 pairs."""
    counts = snapshot.counts
    thumbs = int(counts.get("ratings", 0))
    return int(counts.get("comparisons", 0)) + int(counts.get("corrections", 0)) + thumbs * thumbs // 4


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
    turns_of = _turns_of_labels(store)
    answered_by: dict[str, str] = {}
    pairs = [pair for pair in preferences.pairs if not pair.tie]
    ours = sum(
        _all_recent(
            store, [turn for label in pair.id.split("+") for turn in turns_of[label]], recent, answered_by
        )
        for pair in pairs
    )
    return ours / len(pairs) if pairs else 0.0


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
