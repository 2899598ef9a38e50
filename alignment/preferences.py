"""Stored labels become training data: an immutable snapshot, then pairs and thumbs with weights, then parts.

Served token ids are used as they are; only a correction's edited text is tokenised.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from alignment.labels import (
    LabelledTurns,
    Pair,
    Thumb,
    from_comparisons,
    from_corrections,
    from_ratings,
    pairs_of_thumbs,
    prompt_key,
)
from alignment.rater_weights import (
    RaterShare,
    Vote,
    agreement,
    cap_factors,
    rater_cap,
    rater_warnings,
    reliabilities,
    reliability_weights,
)
from alignment.repeats import beside_comparisons, one_vote_each, repeats_alike, together
from storage import feedback, runs
from storage.digests import sha256_of
from storage.errors import InvalidField
from storage.records import Comparison, Correction, Person, Rating, Snapshot, new_id, now
from storage.store import Store

__all__ = [
    "Pair",
    "Preferences",
    "Thumb",
    "load_preferences",
    "prompt_key",
    "split_by_prompt",
    "take_snapshot",
    "weighted",
]
Label = TypeVar("Label", Comparison, Rating, Correction)
Item = TypeVar("Item", Pair, Thumb)
CONTRARY = "of a rater who contradicts the others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What a run learns from, or a part of it."""

    pairs: tuple[Pair, ...]
    thumbs: tuple[Thumb, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    """`pairs`, `ties`, `thumbs`, `dropped` {reason: labels}, `raters`, `agreement`, `repeats` {rater: `Repeats`},
    `repeats_alike`, `pair_raters`, `thumb_raters` (`RaterShare`), `rater_weights`, `rater_reliability`, `rater_warnings`,
    `names`"""

    @property
    def labels(self) -> list[Pair | Thumb]:
        """Pairs, then thumbs."""
        return [*self.pairs, *self.thumbs]


Weigh = Callable[[Preferences], Preferences]
"""Gives labels of their own weight the weights of their raters."""


def take_snapshot(store: Store, *, run_id: str) -> Snapshot:
    """Name the labels that count now, and store their ids and hash for the run."""
    cut_off = now()
    item_ids = {
        "comparisons": sorted(label.id for label in feedback.comparisons(store, until=cut_off)),
        "ratings": sorted(label.id for label in feedback.ratings(store, until=cut_off)),
        "corrections": sorted(label.id for label in feedback.corrections(store, until=cut_off)),
    }
    snapshot = Snapshot(
        id=new_id("snapshot"),
        run_id=run_id,
        sha256=snapshot_sha256(cut_off, item_ids),
        cut_off=cut_off,
        item_ids=item_ids,
        counts={kind: len(ids) for kind, ids in item_ids.items()},
        created_at=cut_off,
    )
    runs.add_snapshot(store, snapshot)
    return snapshot


def snapshot_sha256(cut_off: float, item_ids: dict[str, list[str]]) -> str:
    """Return the hash that names a snapshot's content."""
    return sha256_of({"cut_off": cut_off, "item_ids": item_ids})


def load_preferences(
    store: Store,
    snapshot: Snapshot,
    *,
    tokenize: Callable[[str, Sequence[int]], list[int]],
    max_tokens: int,
    base_sha256: str | None = None,
    weigh: Weigh | None = None,
) -> Preferences:
    """Turn the snapshot's labels into pairs and thumbs; `notes` says what was dropped and why.

    Args:
        tokenize: edited text, and the ids of the answer that was served, to answer ids (`alignment.models.answer_ids`).
        max_tokens: longest prompt and answer together.
        base_sha256: drop turns of another base model, whose token ids mean something else.
        weigh: applies the raters' weights; `weighted` by default.

    Raises:
        InvalidField: the snapshot's content is not what its hash names.
    """
    if snapshot.sha256 != snapshot_sha256(snapshot.cut_off, snapshot.item_ids):
        raise InvalidField("snapshot", snapshot.id, "take a new one: its ids do not match its hash")
    turns = LabelledTurns(store, max_tokens=max_tokens, base_sha256=base_sha256)
    compared = _labels(store, snapshot, Comparison, "comparisons")
    corrected = _labels(store, snapshot, Correction, "corrections")
    ratings = _labels(store, snapshot, Rating, "ratings")
    given_at: dict[str, float] = {}
    for given in (compared, corrected, ratings):
        given_at |= {label.id: label.created_at for label in given}
    pairs, thumbs = from_comparisons(compared, turns)
    pairs += from_corrections(corrected, turns, tokenize)
    rated = from_ratings(ratings, turns)

    def oldest_first(labels: Sequence[Item]) -> list[Item]:
        # "both bad" names its two thumbs by itself
        return sorted(labels, key=lambda label: given_at[label.id.partition("/")[0]])

    pairs, of_pairs = one_vote_each(oldest_first(pairs), turns.dropped)
    whole, of_thumbs = one_vote_each(oldest_first(rated + thumbs), turns.dropped)
    from_ratings_alone = {thumb.id for thumb in rated}
    rated = [thumb for thumb in whole if thumb.id in from_ratings_alone]
    pairs += beside_comparisons(pairs_of_thumbs(rated), pairs, turns.dropped)
    names = {person.id: person.name for person in store.all(Person)}
    notes = {"dropped": dict(+turns.dropped), "names": names, "repeats": together(of_pairs, of_thumbs)}
    return (weigh or weighted)(Preferences(pairs=tuple(pairs), thumbs=tuple(whole), notes=notes))


def newest_label_at(store: Store, snapshot: Snapshot) -> float:
    """Return when the snapshot's last label was given."""
    kinds = {"comparisons": Comparison, "corrections": Correction, "ratings": Rating}
    given = [
        label.created_at for name, kind in kinds.items() for label in _labels(store, snapshot, kind, name)
    ]
    return max(given, default=snapshot.cut_off)


def split_by_prompt(
    preferences: Preferences, *, held_out: float, seed: int
) -> tuple[Preferences, Preferences]:
    """Return (training, held-out) parts that share no prompt key; `held_out` is a share of the prompts, 0 to 1.

    Which prompts are held out depends on the prompts and the seed only, not on the order of labels.
    """
    if not 0 <= held_out < 1:
        raise InvalidField("held_out", held_out, "use a share from 0 to below 1")
    keys = {item.prompt_key for item in preferences.labels}
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    kept_back = set(order[: math.ceil(held_out * len(order))])
    return _part(preferences, keys - kept_back), _part(preferences, kept_back)


def _part(preferences: Preferences, keys: set[str]) -> Preferences:
    return replace(
        preferences,
        pairs=tuple(pair for pair in preferences.pairs if pair.prompt_key in keys),
        thumbs=tuple(thumb for thumb in preferences.thumbs if thumb.prompt_key in keys),
    )


def _labels(store: Store, snapshot: Snapshot, kind: type[Label], name: str) -> list[Label]:
    wanted = set(snapshot.item_ids.get(name, []))
    return [label for label in store.all(kind) if label.id in wanted]


def weighted(labels: Preferences, leads: Mapping[str, float] | None = None) -> Preferences:
    """Apply the raters' weights and the cap, scale to a mean of 1, and write the notes.

    Raters who contradict the others are left out. A label of two people counts as the less reliable one's. Pairs and thumbs
    are capped apart: DPO learns from the ones alone, KTO from the others.

    Args:
        labels: with the weights of their kinds alone.
        leads: by label id, the log-odds that the label is right, as labels of other prompts tell.
    """
    votes = _votes(labels, leads or {})
    repeats = labels.notes.get("repeats", {})
    known = reliabilities(votes, repeats)
    reliable = reliability_weights(sorted({name for one in labels.labels for name in one.raters}), known)
    pairs, pair_share = _capped(labels.pairs, reliable)
    thumbs, thumb_share = _capped(labels.thumbs, reliable)
    whole = sum(pair.weight for pair in pairs) + sum(thumb.weight for thumb in thumbs)
    scale = (len(pairs) + len(thumbs)) / (whole or 1.0)
    left = Preferences(
        pairs=tuple(replace(pair, weight=scale * pair.weight) for pair in pairs),
        thumbs=tuple(replace(thumb, weight=scale * thumb.weight) for thumb in thumbs),
    )
    notes = {
        "agreement": agreement([vote for vote in votes if reliable[vote.rater]]),
        "repeats": repeats,
        "repeats_alike": repeats_alike({rater: one for rater, one in repeats.items() if reliable.get(rater)}),
        "pair_raters": pair_share,
        "thumb_raters": thumb_share,
        "rater_weights": reliable,
        "rater_reliability": known.raters,
        "rater_warnings": rater_warnings(known.raters, reliable, labels.notes.get("names", {})),
    }
    return replace(left, notes={**_counts(labels, left), **notes})


def _capped(labels: Sequence[Item], reliable: Mapping[str, float]) -> tuple[list[Item], RaterShare | None]:
    """Return labels of one kind with their raters' weights, capped, without those left out; and how they are shared out."""
    weighed = [replace(one, weight=one.weight * min(reliable[name] for name in one.raters)) for one in labels]
    left = [one for one in weighed if one.weight > 0]
    before = _totals(left)
    cap = rater_cap({rater: reliable[rater] for rater in before})
    factors = cap_factors(before, cap=cap, labels=len(left))
    found = [replace(one, weight=one.weight * min(factors[name] for name in one.raters)) for one in left]
    after = _totals(found)
    whole = sum(after.values()) or 1.0
    share = RaterShare(
        raters=len(after),
        largest=max(after.values(), default=0.0) / whole,
        cap=cap,
        cap_enforced=any(factor < 1 for factor in factors.values()),
    )
    return found, share if found else None


def _totals(labels: Sequence[Pair | Thumb]) -> dict[str, float]:
    """Return each rater's weight; a label of two people is half each one's."""
    found: dict[str, float] = defaultdict(float)
    for label in labels:
        for rater in label.raters:
            found[rater] += label.weight / len(label.raters)
    return dict(found)


def _counts(before: Preferences, left: Preferences) -> dict[str, Any]:
    """Return the notes on what is left of the labels, and those that go with them."""
    gone = len(before.pairs) + len(before.thumbs) - len(left.pairs) - len(left.thumbs)
    return {
        "names": before.notes.get("names", {}),
        "dropped": {**before.notes.get("dropped", {}), **({CONTRARY: gone} if gone else {})},
        "pairs": sum(not pair.tie for pair in left.pairs),
        "ties": sum(pair.tie for pair in left.pairs),
        "thumbs": len(left.thumbs),
        "raters": len({name for label in left.labels for name in label.raters}),
    }


def _votes(labels: Preferences, leads: Mapping[str, float]) -> list[Vote]:
    """What the raters said: of two answers to a question which is better, and of an answer whether it is good.

    Pairs made of thumbs are none: the thumbs are.
    """
    votes = [
        _vote(thumb, (thumb.prompt_ids, thumb.answer_ids), 1 if thumb.up else -1, leads)
        for thumb in labels.thumbs
    ]
    for pair in labels.pairs:
        if pair.source != "ratings":
            low, high = sorted((pair.chosen_ids, pair.rejected_ids))
            value = 0 if pair.tie else 1 if pair.chosen_ids == low else -1
            votes.append(_vote(pair, (pair.prompt_ids, low, high), value, leads))
    return votes


def _vote(label: Pair | Thumb, item: Hashable, value: int, leads: Mapping[str, float]) -> Vote:
    return Vote(label.rater, item, value, value * leads.get(label.id, 0.0))
