"""What the shadow answered, kept apart from the turns: no reader of conversations, feedback or training sees it.

It is no evidence of the audit chain, because it is removed with its conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from storage.people import SYSTEM
from storage.records import Deployment, ShadowAnswer, ShadowFinish
from storage.store import Store

ROWS_AT_ONCE = 1_000

_NEW_PAIRS = """SELECT mine.seq, turns.conversation_id, mine.created_at, mine.finish_reason, mine.answer,
        mine.answer_token_ids AS token_ids, mine.total_s, turns.answer AS served_answer,
        turns.answer_token_ids AS served_token_ids, turns.total_s AS served_total_s
    FROM shadow_answers AS mine JOIN turns ON turns.id = mine.turn_id
    WHERE mine.deployment_id = ? AND mine.seq > ? ORDER BY mine.seq LIMIT ?"""
_NEW_QUESTIONS = """SELECT turns.seq, turns.conversation_id FROM turns
    JOIN conversations ON conversations.id = turns.conversation_id
    WHERE turns.policy_id = ? AND turns.created_at >= ? AND turns.seq > ? AND conversations.deleted_at IS NULL
        AND turns.finish_reason IN ('stop', 'length') ORDER BY turns.seq LIMIT ?"""
_KEEPS_TURN = """SELECT 1 FROM turns JOIN conversations ON conversations.id = turns.conversation_id
    WHERE turns.id = ? AND conversations.deleted_at IS NULL"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """The shadow's and the served answer to one question; `seq` is where to read on."""

    seq: int
    conversation_id: str
    created_at: float
    finish_reason: ShadowFinish
    answer: str
    token_ids: list[int]
    total_s: float
    served_answer: str
    served_token_ids: list[int]
    served_total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedQuestion:
    """A question that stable answered whole; `seq` is where to read on."""

    seq: int
    conversation_id: str


def record_shadow_answer(store: Store, answer: ShadowAnswer) -> None:
    """Keep what the shadow answered, unless its conversation was deleted meanwhile.

    Raises:
        InvalidField: it refers to something that does not exist.
        Conflict: this shadow was asked the question before.
    """
    with store.transaction(SYSTEM, durable=False) as changes:
        if not store.rows(_KEEPS_TURN, [answer.turn_id]):
            return
        changes.insert(answer)
        changes.audit("shadow.answered", answer.turn_id, deployment_id=answer.deployment_id)


def pairs_after(store: Store, seq: int, *, shadow: Deployment) -> Iterator[AnswerPair]:
    """Yield the answers of this shadow recorded after `seq`, each beside the served one, oldest first."""
    for row in _pages(store, _NEW_PAIRS, [shadow.id], seq):
        ids = {name: json.loads(row[name]) for name in ("token_ids", "served_token_ids")}
        yield AnswerPair(**{**row, **ids})


def questions_after(
    store: Store, seq: int, *, stable: Deployment, shadow: Deployment
) -> Iterator[ServedQuestion]:
    """Yield the questions that stable answered since this shadow began, recorded after `seq`, oldest first."""
    for row in _pages(store, _NEW_QUESTIONS, [stable.policy_id, shadow.created_at], seq):
        yield ServedQuestion(**row)


def _pages(store: Store, sql: str, params: list[Any], seq: int) -> Iterator[dict[str, Any]]:
    """Yield the rows after `seq`, never more than one page of them in memory."""
    while rows := store.rows(sql, [*params, seq, ROWS_AT_ONCE]):
        yield from rows
        seq = rows[-1]["seq"]
