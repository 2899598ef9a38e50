"""One label becomes a pair or a thumb: which turns it is about, which token ids, and why it may be unusable.

Pure besides reading turns. Judgements of an AI judge are absent until a judge can be licensed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from storage.errors import NotFound
from storage.records import Comparison, Correction, Policy, Rating, Turn
from storage.store import Store

STRENGTH_MARGINS = {1: 1 / 3, 2: 2 / 3, 3: 1.0}
"""Margin of slightly, clearly and much better (Llama 2, arXiv 2307.09288, table 27, "small")."""
FOREIGN_THUMBS_WEIGHT = 0.5
"""Weight of a pair made of two people's thumbs: their thresholds may differ."""
Source = Literal["comparison", "correction", "ratings", "ranked"]
"""Who says which answer is better: people, or (ranked) a fit to what they said (`alignment.ranked_answers`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the better one first (or equally good: `tie`)."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    weight: float
    """Relative; all labels together average about 1."""
    margin: float
    """By how much at least the better score should lead, in log-odds; 0 when no strength was given."""
    source: Source
    prompt_key: str
    """Equal for prompts that must not be split between training and held-out data."""
    rater: str
    tie: bool = False
    other_rater: str = ""
    """Who gave the thumb down, where the pair is made of two people's thumbs; `rater` gave the one up."""

    @property
    def raters(self) -> tuple[str, ...]:
        """Whose word it is."""
        return (self.rater, self.other_rater) if self.other_rater else (self.rater,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumb:
    """An answer that somebody liked or did not like."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    up: bool
    weight: float
    prompt_key: str
    rater: str

    @property
    def raters(self) -> tuple[str, ...]:
        """Whose word it is."""
        return (self.rater,)


class LabelledTurns:
    """The turns of the labels, read once each, and the count of labels that cannot be used, by reason."""

    def __init__(self, store: Store, *, max_tokens: int, base_sha256: str | None) -> None:
        self.dropped: Counter[str] = Counter()
        self._store = store
        self._max_tokens = max_tokens
        policies = store.all(Policy) if base_sha256 is not None else []
        self._foreign = {policy.id for policy in policies if policy.base_sha256 != base_sha256}
        self._known: dict[str, Turn | str] = {}

    def usable(self, turn_id: str) -> Turn | None:
        """Return the turn, or count why its label cannot be used."""
        if turn_id not in self._known:
            self._known[turn_id] = self._read(turn_id)
        found = self._known[turn_id]
        if isinstance(found, Turn):
            return found
        self.dropped[found] += 1
        return None

    def _read(self, turn_id: str) -> Turn | str:
        try:
            turn = self._store.get(Turn, turn_id)
        except NotFound:
            return "the turn is gone"
        if turn.finish_reason not in ("stop", "length"):
            return "the answer was cut off"
        if not turn.prompt_token_ids or not turn.answer_token_ids:
            return "no token ids were served"
        if turn.policy_id in self._foreign:
            return "served by another base model"
        if self.too_long(turn.prompt_token_ids, turn.answer_token_ids):
            return self.too_long_says
        return turn

    @property
    def too_long_says(self) -> str:
        """The reason that such labels are counted under."""
        return f"longer than {self._max_tokens} tokens (data.max_tokens, or the model's context)"

    def too_long(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Say whether prompt and answer together have more tokens than a run takes."""
        return len(prompt) + len(answer) > self._max_tokens


def from_comparisons(labels: Sequence[Comparison], turns: LabelledTurns) -> tuple[list[Pair], list[Thumb]]:
    """Winners and ties become pairs; both bad becomes two thumbs down."""
    pairs: list[Pair] = []
    thumbs: list[Thumb] = []
    for label in labels:
        left = turns.usable(label.left_turn_id)
        right = turns.usable(label.right_turn_id) if left else None
        if left is None or right is None:
            continue
        if left.prompt_token_ids != right.prompt_token_ids:
            turns.dropped["the two prompts differ"] += 1
        elif label.choice == "both_bad":
            for turn in (left, right):
                thumbs.append(_thumb(f"{label.id}/{turn.id}", turn, up=False, rater=label.person_id))
        elif left.answer_token_ids == right.answer_token_ids:
            turns.dropped["the two answers are the same"] += 1
        else:
            better, worse = (right, left) if label.choice == "right" else (left, right)
            pairs.append(_compared(label, better, worse))
    return pairs, thumbs


def _compared(label: Comparison, better: Turn, worse: Turn) -> Pair:
    return Pair(
        id=label.id,
        prompt_ids=tuple(better.prompt_token_ids),
        chosen_ids=tuple(better.answer_token_ids),
        rejected_ids=tuple(worse.answer_token_ids),
        weight=1.0,
        margin=STRENGTH_MARGINS.get(label.strength or 0, 0.0),
        source="comparison",
        prompt_key=prompt_key(better),
        rater=label.person_id,
        tie=label.choice == "tie",
    )


def from_corrections(
    labels: Sequence[Correction],
    turns: LabelledTurns,
    tokenize: Callable[[str, Sequence[int]], list[int]],
) -> list[Pair]:
    """Edited is better than original."""
    pairs = []
    for label in labels:
        turn = turns.usable(label.turn_id)
        if turn is None:
            continue
        edited = tokenize(label.edited, turn.answer_token_ids)
        if label.edited.strip() in ("", turn.answer.strip()) or edited == turn.answer_token_ids:
            turns.dropped["the correction changes nothing"] += 1
        elif turns.too_long(turn.prompt_token_ids, edited):
            turns.dropped[turns.too_long_says] += 1
        else:
            pairs.append(
                Pair(
                    id=label.id,
                    prompt_ids=tuple(turn.prompt_token_ids),
                    chosen_ids=tuple(edited),
                    rejected_ids=tuple(turn.answer_token_ids),
                    weight=1.0,
                    margin=0.0,
                    source="correction",
                    prompt_key=prompt_key(turn),
                    rater=label.person_id,
                )
            )
    return pairs


def from_ratings(labels: Sequence[Rating], turns: LabelledTurns) -> list[Thumb]:
    """Turn thumbs into training labels; one that was taken back, or whose turn cannot be used, is none."""
    thumbs = []
    for label in labels:
        turn = turns.usable(label.turn_id)
        if turn is not None and label.verdict != "retracted":
            thumbs.append(_thumb(label.id, turn, up=label.verdict == "up", rater=label.person_id))
    return thumbs


def _thumb(id: str, turn: Turn, *, up: bool, rater: str) -> Thumb:
    return Thumb(
        id=id,
        prompt_ids=tuple(turn.prompt_token_ids),
        answer_ids=tuple(turn.answer_token_ids),
        up=up,
        weight=1.0,
        prompt_key=prompt_key(turn),
        rater=rater,
    )


def pairs_of_thumbs(thumbs: Sequence[Thumb]) -> list[Pair]:
    """Pair thumbs up with thumbs down on other answers to the same prompt, at most as many as the more frequent kind.

    Each of one kind, that with which more pairs come about, gets one of the other, of the same rater where there is one, and
    these take turns: of all couples, whose number grows with the square, each thumb would be in many, and they would say
    nothing new.
    """
    kinds: dict[tuple[int, ...], tuple[list[Thumb], list[Thumb]]] = {}
    for thumb in thumbs:
        kinds.setdefault(thumb.prompt_ids, ([], []))[0 if thumb.up else 1].append(thumb)
    pairs = []
    for ups, downs in kinds.values():
        with_ups = _matched(ups, downs)
        with_downs = [(up, down) for down, up in _matched(downs, ups)]
        pairs += [_pair_of_thumbs(up, down) for up, down in max(with_ups, with_downs, key=len)]
    return pairs


def _matched(many: Sequence[Thumb], few: Sequence[Thumb]) -> list[tuple[Thumb, Thumb]]:
    """Return each of `many` with one of `few` on another answer, which take turns; the rater's own come first."""
    waiting, own = _Waiting(), defaultdict[str, _Waiting](_Waiting)
    for thumb in few:
        waiting.add(thumb)
        own[thumb.rater].add(thumb)
    found = []
    for thumb in many:
        other = own[thumb.rater].next_to(thumb) or waiting.next_to(thumb)
        if other is not None:
            found.append((thumb, other))
    return found


class _Waiting:
    """Thumbs that take turns: answers first, then the thumbs on each."""

    def __init__(self) -> None:
        self._by_answer: dict[tuple[int, ...], deque[Thumb]] = {}

    def add(self, thumb: Thumb) -> None:
        """Let a thumb wait behind the others."""
        self._by_answer.setdefault(thumb.answer_ids, deque()).append(thumb)

    def next_to(self, thumb: Thumb) -> Thumb | None:
        """Return the first on another answer than `thumb`'s and put it last; None without one."""
        answer = next((one for one in self._by_answer if one != thumb.answer_ids), None)
        if answer is None:
            return None
        thumbs = self._by_answer.pop(answer)
        thumbs.rotate(-1)
        self._by_answer[answer] = thumbs
        return thumbs[-1]


def _pair_of_thumbs(up: Thumb, down: Thumb) -> Pair:
    return Pair(
        id=f"{up.id}+{down.id}",
        prompt_ids=up.prompt_ids,
        chosen_ids=up.answer_ids,
        rejected_ids=down.answer_ids,
        weight=1.0 if up.rater == down.rater else FOREIGN_THUMBS_WEIGHT,
        margin=0.0,
        source="ratings",
        prompt_key=up.prompt_key,
        rater=up.rater,
        other_rater="" if up.rater == down.rater else down.rater,
    )


def prompt_key(turn: Turn) -> str:
    """Name the last question without case, spacing, punctuation and the digits of order numbers."""
    question = str(turn.messages[-1].get("content", "")) if turn.messages else ""
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", question.casefold())).strip()
    return hashlib.sha256(words.encode()).hexdigest()[:16]
