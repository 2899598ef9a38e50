"""What the compare page shows, as pure functions."""

from __future__ import annotations

from html import escape

from assistant.chat import Pair
from assistant.web.pages.html import badge, button, empty, note
from assistant.web.words import Words
from storage.conversations import question_of
from storage.records import Comparison, Turn

CHOICES = (("left", "a"), ("tie", "t"), ("both_bad", "x"), ("right", "b"))
"""Choice and its key."""
STRENGTHS = (1, 2, 3)


def answers(words: Words, pair: Pair, comparison: Comparison | None) -> str:
    """Return the question and both answers; who gave them only after the vote."""
    question = f'<p class="k-asked">{escape(question_of(pair.left))}</p>'
    cards = "".join(
        _card(words, name, turn, comparison, is_chosen=comparison is not None and comparison.choice == side)
        for name, side, turn in (("A", "left", pair.left), ("B", "right", pair.right))
    )
    return f'{question}<div class="k-pair">{cards}</div>'


def _card(words: Words, name: str, turn: Turn, comparison: Comparison | None, *, is_chosen: bool) -> str:
    foot = ""
    if comparison is not None:
        chosen = badge(words("compare.chosen"), "good") if is_chosen else ""
        foot = f"<footer>{words('compare.policy')} <code>{escape(turn.policy_id)}</code> {chosen}</footer>"
    return (
        f'<article class="k-card answer{" chosen" if is_chosen else ""}"><h3>{name}</h3>'
        f'<div class="k-text">{escape(turn.answer)}</div>{foot}</article>'
    )


def waiting(words: Words) -> str:
    """Return both cards while the answers are made: neither is shown before the other."""
    cards = "".join(
        f'<article class="k-card answer waiting"><h3>{name}</h3><div class="k-lines"><i></i><i></i><i></i></div></article>'
        for name in ("A", "B")
    )
    hidden = f'<p class="k-hint" role="status">{escape(words("compare.waiting"))}</p>'
    return f'<div class="k-pair">{cards}</div>{hidden}'


def votes(words: Words) -> str:
    """Return the buttons that decide, each with its key."""
    choices = "".join(
        f'<button type="button" class="k-vote {choice}" data-act="vote" data-id="{choice}" data-key="{key}">'
        f"{escape(words.of('choice', choice))}<kbd>{key.upper()}</kbd></button>"
        for choice, key in CHOICES
    )
    skip = button("skip", words("compare.skip"), kind="quiet")
    return f'<div class="k-votes">{choices}</div><div class="k-after">{skip}</div>'


def voted(words: Words) -> str:
    """Return what is shown after the vote."""
    following = button("next", words("compare.next"), kind="primary", event="select")
    return f'<div class="k-after">{note(words("feedback.saved"), "good")}{following}</div>'


def strengths(words: Words, chosen: int | None) -> str:
    """Return how much better, as three buttons of which one may stay down."""
    buttons = "".join(
        button(
            "strength", words.of("strength", str(value)), id=str(value), kind="chip", pressed=value == chosen
        )
        for value in STRENGTHS
    )
    return (
        f'<div class="k-line"><span class="k-label">{escape(words("compare.strength"))}</span>'
        f'<div class="k-chips" role="group" aria-label="{escape(words("compare.strength"))}">{buttons}</div></div>'
    )


def start(words: Words) -> str:
    """Return what the page is for, while there is no question."""
    return empty(words("compare.title"), words("compare.text"))
