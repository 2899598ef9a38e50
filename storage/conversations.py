"""Conversations as trees of turns: what was asked, what was answered, which branch is shown.

A turn never changes. Regenerating an answer or editing a question adds a turn with the same parent, and the
head of the conversation moves to it. Titles and texts never reach the audit log.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import InvalidField, NotAllowed, NotFound
from storage.people import SYSTEM, get_person, may
from storage.records import Conversation, Deployment, ShadowAnswer, Turn, new_id, now
from storage.store import Store, Transaction
from storage.tables import column_list, decode

LONGEST_TITLE = 200
TITLE_CHARACTERS = 60
"""How much of the first question becomes the title: about one line of a side bar."""
SNIPPET_CHARACTERS = 40
"""How much text a search hit shows on each side of the first match."""
SHORTEST_INDEXED = 3
"""A trigram index finds nothing shorter; shorter words are looked for in the person's own turns."""


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A turn that holds all words of a query; `snippet` is plain text around the first of them."""

    conversation: Conversation
    turn: Turn
    snippet: str


def new_conversation(*, person_id: str, title: str = "", external_id: str | None = None) -> Conversation:
    """Return a conversation that is not kept yet: `record_turn` keeps it with its first answer."""
    at = now()
    return Conversation(
        id=new_id("conversation"),
        person_id=person_id,
        title=_checked_title(title),
        created_at=at,
        external_id=external_id,
        active_at=at,
    )


def create_conversation(
    store: Store, *, person_id: str, title: str = "", external_id: str | None = None
) -> Conversation:
    """Start a conversation. Without a title it gets one from its first question.

    Raises:
        Conflict: the person already has a conversation of this external id.
    """
    conversation = new_conversation(person_id=person_id, title=title, external_id=external_id)
    with store.transaction(person_id, durable=False) as changes:  # worth nothing before its first turn
        _keep(changes, conversation)
    return conversation


def _keep(changes: Transaction, conversation: Conversation) -> None:
    changes.insert(conversation)
    changes.audit("conversation.created", conversation.id)


def get_conversation(store: Store, id: str) -> Conversation:
    """Return the conversation (deleted ones too).

    Raises:
        NotFound: there is none.
    """
    return store.get(Conversation, id)


def conversation_of_external(store: Store, *, person_id: str, external_id: str) -> Conversation | None:
    """Return the person's conversation that an API caller knows as `external_id`, unless it was deleted."""
    where = "person_id = ? AND external_id = ? AND deleted_at IS NULL"
    found = store.all(Conversation, where, [person_id, external_id])
    return found[0] if found else None


def list_conversations(
    store: Store, person_id: str, *, limit: int = 50, before: str | None = None
) -> list[Conversation]:
    """Return the person's conversations, newest activity first.

    Args:
        before: the id of the last conversation of the page before, to get the next one.
    """
    where, params = "person_id = ? AND deleted_at IS NULL", [person_id]
    if before is not None:
        where += " AND (active_at, seq) < (SELECT active_at, seq FROM conversations WHERE id = ?)"
        params.append(before)
    return store.all(Conversation, where, params, order="active_at DESC", limit=limit)


def rename_conversation(store: Store, id: str, *, title: str, actor: str) -> Conversation:
    """Give the conversation another title."""
    if not title.strip():
        raise InvalidField("title", title, "use at least one visible character")
    with store.transaction(actor) as changes:
        _check_owner(store, _existing(store, id), actor)
        changes.update(Conversation, id, title=_checked_title(title))
        changes.audit("conversation.renamed", id)
    return get_conversation(store, id)


def delete_conversation(store: Store, id: str, *, actor: str) -> None:
    """Hide the conversation from lists and search. Its turns stay, because labels may refer to them.

    No label refers to what a shadow answered in it: that is removed.
    """
    with store.transaction(actor) as changes:
        _check_owner(store, _existing(store, id), actor)
        changes.update(Conversation, id, deleted_at=now())
        of_it = "turn_id IN (SELECT turns.id FROM turns WHERE turns.conversation_id = ?)"
        removed = changes.delete(ShadowAnswer, of_it, [id])
        changes.audit("conversation.deleted", id, shadow_answers=removed)


def record_turn(
    store: Store, turn: Turn, *, begins: Conversation | None = None, durable: bool = True
) -> None:
    """Keep an answer, show it as the head of its conversation and bring the conversation to the top.

    Args:
        begins: the conversation, kept now unless an earlier try at its first answer has kept it.
        durable: whether to wait for the disk (`Store.transaction`).

    Raises:
        InvalidField: it refers to something that does not exist or does not belong together.
        NotAllowed: it is somebody else's conversation.
        Conflict: a turn of this id exists.
    """
    question = _question(turn)
    with store.transaction(turn.person_id, durable=durable) as changes:
        if begins is not None and not store.rows("SELECT 1 FROM conversations WHERE id = ?", [begins.id]):
            _keep(changes, begins)
        conversation = _existing(store, turn.conversation_id)
        _check_owner(store, conversation, turn.person_id)
        _check_place(store, turn)
        changes.insert(turn)
        touched: dict[str, Any] = {"head_turn_id": turn.id, "active_at": now()}
        if not conversation.title:
            touched["title"] = _title_of(question)
        changes.update(Conversation, conversation.id, **touched)
        changes.audit(
            "turn.recorded",
            turn.id,
            conversation_id=turn.conversation_id,
            policy_id=turn.policy_id,
            deployment_id=turn.deployment_id,
        )


def get_turn(store: Store, id: str) -> Turn:
    """Return the turn.

    Raises:
        NotFound: there is none.
    """
    return store.get(Turn, id)


def first_answer_after(store: Store, conversation_id: str, at: float) -> Turn | None:
    """Return the conversation's first answer that was recorded after `at` (Unix seconds); None without one."""
    where = "conversation_id = ? AND created_at > ?"
    found = store.all(Turn, where, [conversation_id, at], order="seq", limit=1)
    return found[0] if found else None


def thread(store: Store, conversation_id: str) -> list[Turn]:
    """Return the turns that are shown, from the root to the head."""
    sql = f"""WITH RECURSIVE shown (id, parent_turn_id, depth) AS (
            SELECT turns.id, turns.parent_turn_id, 0 FROM turns
                JOIN conversations ON conversations.head_turn_id = turns.id WHERE conversations.id = ?
            UNION ALL
            SELECT turns.id, turns.parent_turn_id, shown.depth + 1 FROM turns
                JOIN shown ON turns.id = shown.parent_turn_id)
        SELECT {_turn_columns()} FROM shown JOIN turns ON turns.id = shown.id ORDER BY shown.depth DESC"""
    turns = _turns(store.rows(sql, [conversation_id]))
    if not turns:
        get_conversation(store, conversation_id)
    return turns


def alternatives(store: Store, turn_id: str) -> list[Turn]:
    """Return the turns with the same parent, this one among them, oldest first."""
    turn = get_turn(store, turn_id)
    where = "conversation_id = ? AND parent_turn_id IS ?"
    return store.all(Turn, where, [turn.conversation_id, turn.parent_turn_id], order="seq")


def children(store: Store, turn_id: str) -> list[Turn]:
    """Return the turns that follow this one, oldest first."""
    return store.all(Turn, "parent_turn_id = ?", [turn_id], order="seq")


def set_head(store: Store, conversation_id: str, *, turn_id: str, actor: str) -> Conversation:
    """Show the branch that ends in `turn_id`.

    Raises:
        InvalidField: the turn belongs to another conversation.
    """
    turn = get_turn(store, turn_id)
    if turn.conversation_id != conversation_id:
        raise InvalidField("turn_id", turn_id, f"use a turn of conversation {conversation_id}")
    with store.transaction(actor) as changes:
        _check_owner(store, _existing(store, conversation_id), actor)
        changes.update(Conversation, conversation_id, head_turn_id=turn_id)
        changes.audit("conversation.head_set", conversation_id, turn_id=turn_id)
    return get_conversation(store, conversation_id)


def search(store: Store, *, person_id: str, query: str, limit: int = 20) -> list[SearchHit]:
    """Return the person's turns whose question and answer hold every word of `query`, best match first.

    Words are parts of text, so that Japanese works as well; double quotes keep several together; capital
    letters make no difference. Any query is safe: words become quoted strings, never FTS5 syntax.
    """
    words = _words(query)
    if not words:
        return []
    indexed = [word for word in words if len(word) >= SHORTEST_INDEXED]
    tables, order, conditions, params = "turns", "turns.seq DESC", [], []
    if indexed:
        tables, order = (
            "turns_fts JOIN turns ON turns.seq = turns_fts.rowid",
            "turns_fts.rank, turns.seq DESC",
        )
        conditions.append("turns_fts MATCH ?")
        params.append(" AND ".join('"' + word.replace('"', '""') + '"' for word in indexed))
    for word in (word for word in words if len(word) < SHORTEST_INDEXED):
        conditions.append("(turns.question LIKE ? ESCAPE '!' OR turns.answer LIKE ? ESCAPE '!')")
        params += [_like(word)] * 2
    sql = f"""SELECT {_turn_columns()} FROM {tables}
        JOIN conversations ON conversations.id = turns.conversation_id
        WHERE {" AND ".join(conditions)} AND conversations.person_id = ? AND conversations.deleted_at IS NULL
        ORDER BY {order} LIMIT ?"""
    turns = _turns(store.rows(sql, [*params, person_id, limit]))
    return [
        SearchHit(get_conversation(store, turn.conversation_id), turn, _snippet(turn, words))
        for turn in turns
    ]


def question_of(turn: Turn) -> str:
    """Return what the person asked: the last message."""
    return str(turn.messages[-1]["content"])


def _existing(store: Store, id: str) -> Conversation:
    conversation = get_conversation(store, id)
    if conversation.deleted_at is not None:
        raise NotFound("conversation id", id, "it was deleted; start another one")
    return conversation


def _check_owner(store: Store, conversation: Conversation, actor: str) -> None:
    """Refuse everybody but the conversation's owner, admins and the system."""
    if actor not in (SYSTEM, conversation.person_id) and not may(get_person(store, actor), "admin"):
        raise NotAllowed(
            f"{conversation.id} is somebody else's conversation; only they or an admin may change it"
        )


def _check_place(store: Store, turn: Turn) -> None:
    """Refuse a turn whose parent lies elsewhere, or that names another policy than its deployment served."""
    if turn.parent_turn_id is not None:
        parents = store.rows("SELECT conversation_id FROM turns WHERE id = ?", [turn.parent_turn_id])
        if not parents or parents[0]["conversation_id"] != turn.conversation_id:
            raise InvalidField("parent_turn_id", turn.parent_turn_id, "use a turn of the same conversation")
    deployments = store.all(Deployment, "id = ?", [turn.deployment_id])
    if not deployments or deployments[0].policy_id != turn.policy_id:
        raise InvalidField("deployment_id", turn.deployment_id, f"use a deployment of {turn.policy_id}")


def _question(turn: Turn) -> str:
    """Return the text of the last message.

    Raises:
        InvalidField: the messages are no chat that ends with a question.
    """
    messages = turn.messages
    fix = 'use [{"role": ..., "content": ...}, ...] ending with role "user" and a text'
    if not isinstance(messages, list) or not messages:
        raise InvalidField("messages", messages, fix)
    if any(not isinstance(message, dict) or "role" not in message for message in messages):
        raise InvalidField("messages", messages, fix)
    if messages[-1]["role"] != "user" or not isinstance(messages[-1].get("content"), str):
        raise InvalidField("messages", messages[-1], fix)
    return str(messages[-1]["content"])


def _checked_title(title: str) -> str:
    if len(title) > LONGEST_TITLE or any(unicodedata.category(character) == "Cc" for character in title):
        raise InvalidField("title", title, f"use at most {LONGEST_TITLE} characters on one line")
    return title.strip()


def _one_line(text: str) -> str:
    """Return the text without control characters and line breaks."""
    visible = (" " if unicodedata.category(character) == "Cc" else character for character in text)
    return " ".join("".join(visible).split())


def _title_of(question: str) -> str:
    line = _one_line(question[:1000])
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1].rstrip() + "…"


def _turn_columns() -> str:
    return ", ".join(f"turns.{name}" for name in column_list(Turn).split(", "))


def _turns(rows: Sequence[dict[str, Any]]) -> list[Turn]:
    return [decode(Turn, row) for row in rows]


def _words(query: str) -> list[str]:
    clean = query.replace("\0", " ").encode("utf-8", "ignore").decode()
    found = ((quoted or bare).strip('"').strip() for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', clean))
    return [word for word in found if word]


def _like(word: str) -> str:
    escaped = word.replace("!", "!!").replace("%", "!%").replace("_", "!_")
    return f"%{escaped}%"


def _snippet(turn: Turn, words: Sequence[str]) -> str:
    """Return the text around the first word found, cut where it had to be."""
    for text in (question_of(turn), turn.answer):
        for word in words:
            at = text.casefold().find(word.casefold())
            if at >= 0:
                start, end = max(0, at - SNIPPET_CHARACTERS), at + len(word) + SNIPPET_CHARACTERS
                middle = _one_line(text[start:end])
                return ("…" if start else "") + middle + ("…" if end < len(text) else "")
    return _title_of(question_of(turn))
