"""What became of the conversations that a canary's draw decided: the feed of its judgement. Reading only.

A conversation counts once: from its first answer since the canary began, for a fixed time, under the policy that gave that
answer. Then it is concluded, whatever is said later, so that the order and the sample do not depend on the policy. One that
was already going on when the canary began was not drawn, and is left out.

Negative are: a thumb down that stands at the end, a comparison lost against another policy's answer (or both bad), a
correction, an answer asked for again in the chat (regenerated, or its question rewritten), an answer that hands the customer
to a person. A comparison between two answers of one policy says nothing about that policy, as one of them always loses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from storage.records import FinishReason
from storage.store import Store

Negative = Literal["down", "lost", "corrected", "rewritten", "handed_over"]
CONCLUDED_AFTER_S = 1800.0
"""Half an hour without a new visit is where web analytics end a session; feedback comes while the answer is in view."""

HAND_OVER_PHRASES: tuple[str, ...] = (
    r"a (human |kind |dear |friendly )?colleague",
    r"hand(ing)? (you|this|it|the conversation) over",
    r"(our|a) (support )?team( member)? (takes|will|now)",
    r"(a|real|another) (person|human)( of| from)? (our|takes|will)",
    r"passing (you|this|it)",
    r"担当者",
    r"おつなぎ",
)
"""Regular expressions (any case) that tell an answer which gives the customer to a person."""

_WHITE_SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What Python's `strip` takes away; SQL's `trim` by itself takes spaces only."""

# A turn is recorded when it ends; it was drawn when it began. CROSS JOIN keeps the order in which tables stand and a plus
# keeps an index out (both in sqlite.org/optoverview.html): the planner has no statistics, and would walk all answers of a
# policy, or all comparisons, for each conversation.
_DRAWN = """WITH drawn AS (
        SELECT seq, id, conversation_id, policy_id, created_at FROM turns
        WHERE +policy_id IN (:canary, :stable) AND created_at - total_s >= :began
            AND created_at > :after - :wait AND created_at <= :until - :wait
            AND NOT EXISTS (SELECT 1 FROM turns AS earlier
                WHERE earlier.conversation_id = turns.conversation_id AND +earlier.seq < turns.seq
                    AND +earlier.created_at > :began - :wait)),
    judged AS (
        SELECT turns.seq, turns.id, turns.conversation_id, turns.parent_turn_id, turns.policy_id, turns.source,
            drawn.id AS first_id, drawn.created_at + :wait AS concluded_at
        FROM drawn CROSS JOIN turns
            ON turns.conversation_id = drawn.conversation_id AND +turns.policy_id = drawn.policy_id
            AND +turns.seq >= drawn.seq AND +turns.created_at <= drawn.created_at + :wait)"""
_OUTCOMES = f"""{_DRAWN}
    SELECT drawn.id, drawn.conversation_id, drawn.policy_id, drawn.created_at AS began_at,
        drawn.created_at + :wait AS concluded_at, json_array_length(turns.answer_token_ids) AS tokens
    FROM drawn CROSS JOIN turns ON turns.seq = drawn.seq ORDER BY concluded_at, drawn.seq"""
_ANSWERS = f"{_DRAWN} SELECT first_id, answer FROM judged CROSS JOIN turns ON turns.seq = judged.seq"
_EVENTS = f"""{_DRAWN}
    SELECT first_id, 'down' AS kind FROM judged CROSS JOIN ratings ON ratings.turn_id = judged.id
        WHERE ratings.verdict = 'down' AND +ratings.created_at <= concluded_at AND NOT EXISTS (
            SELECT 1 FROM ratings AS later WHERE later.turn_id = ratings.turn_id
                AND later.person_id = ratings.person_id AND later.seq > ratings.seq
                AND later.created_at <= concluded_at)
    UNION SELECT first_id, 'lost' FROM judged
        CROSS JOIN comparisons ON comparisons.left_turn_id = judged.id OR comparisons.right_turn_id = judged.id
        CROSS JOIN turns AS other ON other.id =
            iif(judged.id = comparisons.left_turn_id, comparisons.right_turn_id, comparisons.left_turn_id)
        WHERE +comparisons.created_at <= concluded_at AND (comparisons.choice = 'both_bad'
            OR (other.policy_id <> judged.policy_id
                AND comparisons.choice = iif(judged.id = comparisons.left_turn_id, 'right', 'left')))
    UNION SELECT first_id, 'corrected' FROM judged CROSS JOIN corrections ON corrections.turn_id = judged.id
        WHERE +corrections.created_at <= concluded_at
    UNION SELECT first_id, 'rewritten' FROM judged CROSS JOIN turns AS again
            ON again.conversation_id = judged.conversation_id AND again.parent_turn_id IS judged.parent_turn_id
            AND +again.seq > judged.seq AND again.source = 'chat' AND judged.source = 'chat'
        WHERE +again.created_at <= concluded_at"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A concluded conversation. Times are Unix seconds."""

    conversation_id: str
    policy_id: str
    began_at: float
    concluded_at: float
    tokens: int
    """Length of its first answer."""
    negative: frozenset[Negative]


def outcomes(
    store: Store,
    *,
    canary_id: str,
    stable_id: str,
    began_at: float,
    after: float,
    until: float,
    hand_over: Iterable[str] = HAND_OVER_PHRASES,
    wait_s: float = CONCLUDED_AFTER_S,
) -> list[Outcome]:
    """Return the conversations that concluded after `after` and up to `until`, in that order.

    Args:
        canary_id, stable_id: the two policies.
        began_at: since when conversations are drawn for the canary.
        hand_over: regular expressions (any case) that tell an answer which hands the customer to a person.
    """
    params = {
        "canary": canary_id,
        "stable": stable_id,
        "began": began_at,
        "after": max(after, began_at),  # none concluded before one could begin
        "until": until,
        "wait": wait_s,
    }
    phrases = [re.compile(phrase, re.IGNORECASE) for phrase in hand_over]
    with store.reading():
        found = _rows(store, _OUTCOMES, params)
        negative: dict[str, set[Negative]] = {row["id"]: set() for row in found}
        for row in _rows(store, _EVENTS, params):
            negative[row["first_id"]].add(row["kind"])
        for row in _rows(store, _ANSWERS, params) if phrases else []:
            if any(phrase.search(row["answer"]) for phrase in phrases):
                negative[row["first_id"]].add("handed_over")
    return [Outcome(negative=frozenset(negative[row.pop("id")]), **row) for row in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One recorded answer; `seq` is where to read on."""

    seq: int
    policy_id: str
    created_at: float
    finish_reason: FinishReason
    is_empty: bool
    total_s: float


def answers_after(store: Store, seq: int, *, policy_ids: tuple[str, str], began_at: float) -> list[Answered]:
    """Return the answers of two policies recorded after `seq` since `began_at`, oldest first."""
    sql = """SELECT seq, policy_id, created_at, finish_reason, trim(answer, ?) = '' AS is_empty, total_s FROM turns
        WHERE seq > ? AND created_at >= ? AND policy_id IN (?, ?) ORDER BY seq"""
    return [
        Answered(**{**row, "is_empty": bool(row["is_empty"])})
        for row in store.rows(sql, [_WHITE_SPACE, seq, began_at, *policy_ids])
    ]


def _rows(store: Store, sql: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `sql` with its named parameters put in the order in which they stand."""
    names = re.findall(r":([a-z]+)", sql)
    return store.rows(re.sub(r":[a-z]+", "?", sql), [params[name] for name in names])
