"""Counting what was recorded, by policy: for the dashboards and the metrics. Reading only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from storage.records import Choice, FailureKind, FinishReason, Verdict
from storage.store import Store

ROWS_AT_ONCE = 10_000

NEW_TURNS = """SELECT seq, policy_id, finish_reason, first_token_s, total_s FROM turns
    WHERE seq > ? ORDER BY seq LIMIT ?"""
NEW_RATINGS = """SELECT ratings.seq, turns.policy_id, ratings.verdict FROM ratings
    JOIN turns ON turns.id = ratings.turn_id WHERE ratings.seq > ? ORDER BY ratings.seq LIMIT ?"""
NEW_COMPARISONS = """SELECT comparisons.seq, comparisons.choice, l.policy_id AS left_policy_id,
        r.policy_id AS right_policy_id FROM comparisons
    JOIN turns AS l ON l.id = comparisons.left_turn_id JOIN turns AS r ON r.id = comparisons.right_turn_id
    WHERE comparisons.seq > ? ORDER BY comparisons.seq LIMIT ?"""
NEW_FAILURES = "SELECT seq, policy_id, kind FROM failures WHERE seq > ? ORDER BY seq LIMIT ?"
TURNS_BY_POLICY = """SELECT policy_id, count(*) AS turns, avg(first_token_s) AS first_token_s
    FROM turns GROUP BY policy_id"""
THUMBS_BY_POLICY = """SELECT turns.policy_id AS policy_id, sum(latest.verdict = 'up') AS up, count(*) AS rated
    FROM ratings AS latest JOIN turns ON turns.id = latest.turn_id
    WHERE latest.verdict <> 'retracted' AND latest.seq = (
        SELECT max(seq) FROM ratings WHERE turn_id = latest.turn_id AND person_id = latest.person_id)
    GROUP BY turns.policy_id"""
CHOICES_BY_POLICY = """SELECT policy_id, sum(won) AS won, sum(lost) AS lost FROM (
        SELECT l.policy_id AS policy_id, c.choice = 'left' AS won, c.choice = 'right' AS lost
        FROM comparisons AS c
        JOIN turns AS l ON l.id = c.left_turn_id JOIN turns AS r ON r.id = c.right_turn_id
        WHERE l.policy_id <> r.policy_id
        UNION ALL
        SELECT r.policy_id, c.choice = 'right', c.choice = 'left'
        FROM comparisons AS c
        JOIN turns AS l ON l.id = c.left_turn_id JOIN turns AS r ON r.id = c.right_turn_id
        WHERE l.policy_id <> r.policy_id)
    GROUP BY policy_id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnTally:
    """What the metrics need of one turn; `seq` is where to read on."""

    seq: int
    policy_id: str
    finish_reason: FinishReason
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingTally:
    """One rating and the policy that it is about."""

    seq: int
    policy_id: str
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonTally:
    """One choice and the policies behind its sides."""

    seq: int
    choice: Choice
    left_policy_id: str
    right_policy_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureTally:
    """What went wrong with a policy without leaving a turn."""

    seq: int
    policy_id: str
    kind: FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Liking:
    """What people said about one policy's answers."""

    policy_id: str
    turns: int
    up: int
    rated: int
    won: int
    compared: int
    """Choices with a winner between this policy's answer and another policy's."""
    first_token_s: float | None


def turns_after(store: Store, seq: int) -> list[TurnTally]:
    """Return the next turns after `seq`, at most ROWS_AT_ONCE."""
    return [TurnTally(**row) for row in store.rows(NEW_TURNS, [seq, ROWS_AT_ONCE])]


def ratings_after(store: Store, seq: int) -> list[RatingTally]:
    """Return the next ratings after `seq`, at most ROWS_AT_ONCE."""
    return [RatingTally(**row) for row in store.rows(NEW_RATINGS, [seq, ROWS_AT_ONCE])]


def comparisons_after(store: Store, seq: int) -> list[ComparisonTally]:
    """Return the next comparisons after `seq`, at most ROWS_AT_ONCE."""
    return [ComparisonTally(**row) for row in store.rows(NEW_COMPARISONS, [seq, ROWS_AT_ONCE])]


def failures_after(store: Store, seq: int) -> list[FailureTally]:
    """Return the next failures after `seq`, at most ROWS_AT_ONCE."""
    return [FailureTally(**row) for row in store.rows(NEW_FAILURES, [seq, ROWS_AT_ONCE])]


def likings(store: Store) -> list[Liking]:
    """Return the counts of each policy that ever answered, the newest policy first."""
    thumbs = {row["policy_id"]: row for row in store.rows(THUMBS_BY_POLICY)}
    choices = {row["policy_id"]: row for row in store.rows(CHOICES_BY_POLICY)}
    found = []
    for row in store.rows(TURNS_BY_POLICY):
        thumb, choice = thumbs.get(row["policy_id"], {}), choices.get(row["policy_id"], {})
        won = choice.get("won", 0)
        found.append(
            Liking(
                **row,
                up=thumb.get("up", 0),
                rated=thumb.get("rated", 0),
                won=won,
                compared=won + choice.get("lost", 0),
            )
        )
    return sorted(found, key=lambda liking: liking.policy_id, reverse=True)


def answers(store: Store) -> Literal[True]:
    """Return True when the database answers; raises StorageUnavailable when it does not."""
    store.rows("SELECT 1")
    return True
