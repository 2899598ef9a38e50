"""Counts per policy for the metrics page, read from what is recorded.

Not with prometheus_client, which only comes along with vllm: counters in a process start again at zero with
it and know nothing of what another process recorded, while these are sums over the rows. Only rows that were
added since the last reading are read.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from storage import tallies
from storage.store import Store
from storage.tallies import ComparisonTally, FailureTally, RatingTally, TurnTally

Tally = TypeVar("Tally", TurnTally, RatingTally, ComparisonTally, FailureTally)

FIRST_TOKEN_BUCKETS_S = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
TOTAL_BUCKETS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
OUTCOMES = {"left": ("win", "loss"), "right": ("loss", "win")}


@dataclass(slots=True)
class Histogram:
    """How many values (seconds) fell into each bucket; the last bucket has no upper end."""

    ends: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.ends) + 1)

    def add(self, value: float) -> None:
        """Count `value`: a bucket's end belongs to it."""
        self.counts[bisect_left(self.ends, value)] += 1
        self.sum += value


class Totals:
    """What was recorded so far, by policy. Safe to share between threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.turns: Counter[tuple[str, str]] = Counter()
        self.ratings: Counter[tuple[str, str]] = Counter()
        self.comparisons: Counter[tuple[str, str]] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.first_token_s: dict[str, Histogram] = {}
        self.total_s: dict[str, Histogram] = {}
        self.lock = threading.Lock()
        self._read: Counter[str] = Counter()

    def refresh(self) -> None:
        """Add the rows that came since the last call; the caller holds `lock`."""
        for turn in self._new("turns", tallies.turns_after):
            self._add_turn(turn)
        for rating in self._new("ratings", tallies.ratings_after):
            self.ratings[rating.policy_id, rating.verdict] += 1
        for comparison in self._new("comparisons", tallies.comparisons_after):
            left, right = OUTCOMES.get(comparison.choice, (comparison.choice, comparison.choice))
            self.comparisons[comparison.left_policy_id, left] += 1
            self.comparisons[comparison.right_policy_id, right] += 1

        for failure in self._new("failures", tallies.failures_after):
            self.failures[failure.policy_id, failure.kind] += 1

    def _add_turn(self, turn: TurnTally) -> None:
        self.turns[turn.policy_id, turn.finish_reason] += 1
        self.total_s.setdefault(turn.policy_id, Histogram(TOTAL_BUCKETS_S)).add(turn.total_s)
        if turn.first_token_s is not None:
            first = self.first_token_s.setdefault(turn.policy_id, Histogram(FIRST_TOKEN_BUCKETS_S))
            first.add(turn.first_token_s)

    def _new(self, kind: str, rows_after: Callable[[Store, int], list[Tally]]) -> Iterator[Tally]:
        """Yield the rows after the last one seen, and remember how far it got."""
        while rows := rows_after(self.store, self._read[kind]):
            for row in rows:
                yield row
                self._read[kind] = row.seq
