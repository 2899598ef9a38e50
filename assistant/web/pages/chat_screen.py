"""Draws a `View`: looks its turns up in storage and returns what each part of the chat page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from assistant.web.pages import chat_session as session
from assistant.web.pages import chat_view as look
from assistant.web.pages.chat_view import View
from assistant.web.services import Services
from assistant.web.words import Language, Words, default_questions
from storage import conversations, feedback, settings
from storage.records import Person, Rating, Turn, now
from storage.store import Store

LISTED_CONVERSATIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """What the chat page shows: messages for the two chatbots, the rest as HTML."""

    title: str
    listing: str | None
    """None while a question is being answered: the list is drawn again with the answer."""
    history: list[Any]
    history_feedback: list[str | None]
    has_older: bool
    live: list[Any]
    bar: str
    empty: str


def screen_of(services: Services, words: Words, person: Person, view: View) -> Screen:
    """Return the screen of a view."""
    store = services.store
    turns = [conversations.get_turn(store, id) for id in view.history_turn_ids[-view.shown_turns :]]
    live = conversations.get_turn(store, view.live_turn_id) if view.live_turn_id else None
    is_empty = view.conversation_id is None
    return Screen(
        title=title_of(services, words, person, view),
        listing=None if view.ask else listing_of(services, words, person, view),
        history=look.messages_of(turns),
        history_feedback=look.feedback_values(turns, [_rating(store, person, turn) for turn in turns]),
        has_older=len(view.history_turn_ids) > view.shown_turns,
        live=_live_messages(view, live),
        bar=_bar(store, words, person, view, live),
        empty=look.empty_screen(words, example_questions(services, words.language)) if is_empty else "",
    )


def answer_bar(store: Store, words: Words, person: Person, turn: Turn) -> str:
    """Return what can be done with an answer, with the person's thumb lit."""
    return look.action_bar(
        words,
        turn,
        rating=_rating(store, person, turn),
        alternatives=conversations.alternatives(store, turn.id),
    )


def example_questions(services: Services, language: Language) -> list[str]:
    """Return the questions offered on the empty screen; only the starter model's shop has some by default."""
    chosen: list[str] | None = settings.get(services.store, "example_questions", None)
    if chosen is not None:
        return chosen
    return default_questions(language) if "starter" in services.model_name.lower() else []


def listing_of(services: Services, words: Words, person: Person, view: View, query: str = "") -> str:
    """Return the person's own conversations, or those that hold every word of `query`.

    Conversations of the API and of comparisons are left out: they have outside names.
    """
    if query.strip():
        hits = conversations.search(services.store, person_id=person.id, query=query)
        return look.search_list(words, hits, current=view.conversation_id)
    listed = conversations.list_conversations(services.store, person.id, limit=LISTED_CONVERSATIONS)
    own = [conversation for conversation in listed if conversation.external_id is None]
    return look.conversation_list(words, own, current=view.conversation_id, now=now())


def _bar(store: Store, words: Words, person: Person, view: View, live: Turn | None) -> str:
    if view.ask is not None:
        return look.waiting(words)
    return answer_bar(store, words, person, live) if live else ""


def _live_messages(view: View, live: Turn | None) -> list[Any]:
    if view.ask is not None:
        return look.exchange(view.ask.messages[-1]["content"], "")
    return look.messages_of([live]) if live else []


def title_of(services: Services, words: Words, person: Person, view: View) -> str:
    """Return the title of the open conversation with its buttons."""
    return look.title_bar(words, session.current(services, person, view))


def _rating(store: Store, person: Person, turn: Turn) -> Rating | None:
    return feedback.current_rating(store, turn_id=turn.id, person_id=person.id)
