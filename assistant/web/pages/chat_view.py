"""What the chat page shows, as pure functions from records to messages and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from assistant.chat import Ask
from assistant.web.pages.html import badge, button, icon, note, when
from assistant.web.words import Words
from storage.conversations import SearchHit, question_of
from storage.records import Conversation, Json, Rating, Turn

SHOWN_TURNS = 20
"""Drawing costs grow with the messages on screen: 40 messages, older ones on demand."""
FEEDBACK = {"up": "Like", "down": "Dislike"}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one browser tab looks at. It stays on the server: only ids come back from the browser."""

    conversation_id: str | None = None
    live_turn_id: str | None = None
    """The turn below the history, whose actions are shown."""
    history_turn_ids: tuple[str, ...] = ()
    judged_turn_id: str | None = None
    """The turn that the feedback panel is about."""
    ask: Ask | None = None
    """What is being answered."""
    shown_turns: int = SHOWN_TURNS


def messages_of(turns: Sequence[Turn]) -> list[Any]:
    """Return turns as the chatbot wants them: two messages a turn, in order."""
    return [message for turn in turns for message in exchange(question_of(turn), turn.answer or "…")]


def exchange(question: str, answer: str) -> list[Any]:
    """Return one question with its answer; while there is none yet, the question alone."""
    asked = _message("user", question)
    return [asked, _message("assistant", answer)] if answer else [asked]


def _message(role: str, text: str) -> Json:
    """Return a message as the browser wants it: Gradio's own step is left out (`chat_page.AS_IS`)."""
    return {
        "role": role,
        "metadata": None,
        "content": [{"text": text, "type": "text"}],
        "options": None,
    }


def feedback_values(turns: Sequence[Turn], ratings: Sequence[Rating | None]) -> list[str | None]:
    """Return which thumb is lit, one value for each answer."""
    return [
        FEEDBACK.get(rating.verdict) if rating else None for _, rating in zip(turns, ratings, strict=True)
    ]


def conversation_list(
    words: Words, conversations: Sequence[Conversation], *, current: str | None, now: float
) -> str:
    """Return the person's conversations, the newest first."""
    if not conversations:
        return f'<p class="k-hint">{escape(words("chat.no_conversations"))}</p>'
    return "".join(
        _list_item(
            conversation.id,
            conversation.title or words("chat.untitled"),
            when(words, conversation.active_at, now),
            is_current=conversation.id == current,
        )
        for conversation in conversations
    )


def search_list(words: Words, hits: Sequence[SearchHit], *, current: str | None) -> str:
    """Return the conversations in which something was found, each once, with the words around it."""
    first_hits = {hit.conversation.id: hit for hit in reversed(hits)}
    if not first_hits:
        return f'<p class="k-hint">{escape(words("chat.nothing_found"))}</p>'
    return "".join(
        _list_item(id, hit.conversation.title, hit.snippet, is_current=id == current)
        for id, hit in reversed(first_hits.items())
    )


def _list_item(id: str, title: str, detail: str, *, is_current: bool) -> str:
    current = ' aria-current="true"' if is_current else ""
    return (
        f'<button type="button" class="k-item" data-act="open" data-id="{escape(id)}"{current}>'
        f"<b>{escape(title)}</b><small>{escape(detail)}</small></button>"
    )


def title_bar(words: Words, conversation: Conversation | None) -> str:
    """Return the conversation's title and what can be done with it."""
    menu = (
        f'<button type="button" class="k-button icon k-menu" aria-label="{escape(words("chat.conversations"))}" '
        f"data-toggle-side>{icon('menu')}</button>"
    )
    if conversation is None:
        return f'<div class="k-titlebar">{menu}<h2>{escape(words("chat.new"))}</h2></div>'
    actions = button("rename", words("chat.rename"), glyph="edit", kind="icon") + button(
        "delete", words("chat.delete"), glyph="delete", kind="icon"
    )
    title = escape(conversation.title or words("chat.untitled"))
    return f'<div class="k-titlebar">{menu}<h2>{title}</h2><div class="k-actions">{actions}</div></div>'


def older_bar(words: Words) -> str:
    """Return the way to the turns before those shown."""
    return f'<p class="k-older">{button("older", words("chat.older"))}</p>'


def delete_bar(words: Words) -> str:
    """Return the question whether to delete, in the place of the title."""
    return (
        f'<div class="k-titlebar ask"><h2>{escape(words("chat.delete_question"))}</h2><div class="k-actions">'
        + button("delete-yes", words("chat.delete"), kind="danger")
        + button("delete-no", words("chat.keep"))
        + "</div></div>"
    )


def empty_screen(words: Words, questions: Sequence[str]) -> str:
    """Return the first screen: a greeting and a few questions to start with."""
    examples = "".join(
        f'<button type="button" class="k-example" data-act="example" data-id="{index}">{escape(question)}</button>'
        for index, question in enumerate(questions)
    )
    return (
        f'<div class="k-welcome"><h1>{escape(words("chat.welcome"))}</h1>'
        f'<p>{escape(words("chat.welcome_text"))}</p><div class="k-examples">{examples}</div></div>'
    )


def action_bar(words: Words, turn: Turn, *, rating: Rating | None, alternatives: Sequence[Turn]) -> str:
    """Return what can be done with the latest answer."""
    verdict = rating.verdict if rating else None
    return (
        '<div class="k-answer-bar">'
        + button("up", words("chat.good"), id=turn.id, glyph="up", pressed=verdict == "up")
        + button("down", words("chat.bad"), id=turn.id, glyph="down", pressed=verdict == "down")
        + button("correct", words("chat.correct"), id=turn.id, glyph="edit")
        + button("again", words("chat.again"), id=turn.id, glyph="again", event="submit")
        + _pager(words, turn, alternatives)
        + _ending(words, turn)
        + "</div>"
    )


def _pager(words: Words, turn: Turn, alternatives: Sequence[Turn]) -> str:
    """Return the way between several answers (or wordings of the question) at one place."""
    ids = [alternative.id for alternative in alternatives]
    if len(ids) < 2:
        return ""
    place = ids.index(turn.id)
    earlier = button("show", words("chat.earlier_answer"), id=ids[place - 1], glyph="left", kind="icon")
    later = button(
        "show", words("chat.later_answer"), id=ids[(place + 1) % len(ids)], glyph="right", kind="icon"
    )
    return f'<span class="k-pager">{earlier}{place + 1} / {len(ids)}{later}</span>'


def _ending(words: Words, turn: Turn) -> str:
    if turn.finish_reason == "stop":
        return ""
    return badge(words.of("finish", turn.finish_reason), "quiet")


def waiting(words: Words) -> str:
    """Return what is shown until the first words arrive."""
    text = escape(words("chat.thinking"))
    return f'<p class="k-waiting k-answering" role="status"><i></i><i></i><i></i><span>{text}</span></p>'


def marker(state: str) -> str:
    """Return nothing to see: while `k-<state>` is there, style.css shows what belongs to it.

    Gradio makes a whole component, with the signature of its constructor and its JSON schema, for each property that an
    event changes, such as `visible`, and for each output that it leaves out; a text costs it nothing.
    """
    return f'<span class="k-marker k-{state}"></span>'


STREAMING = marker("answering")
"""Below an answer that is being made: Stop is in the place of Send."""


def broken(words: Words, message: str) -> str:
    """Return why there is no answer, and the way to try again."""
    return note(message, "bad") + button("retry", words("chat.retry"), glyph="again", event="submit")


def stopped(words: Words) -> str:
    """Return what is shown when a question was stopped before anything was said."""
    return note(words("chat.stopped")) + button("retry", words("chat.retry"), glyph="again", event="submit")
