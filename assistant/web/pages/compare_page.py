"""Compare: one question, two answers revealed together, sides drawn at random, who was who only after the vote."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from assistant.chat import Ask, Pair, check_messages
from assistant.web.pages import compare_view as look
from assistant.web.pages.feedback_panel import reason_chips, reasons_offered
from assistant.web.pages.frame import Frame, clickable, clicked, markup, toast
from assistant.web.pages.html import note
from storage.conversations import question_of
from storage.errors import KotaeError, NotFound
from storage.records import Comparison, Json, Person, Turn, new_id
from storage.store import Store

QUICK: Json = {"queue": False, "show_progress": "hidden"}
PAIRS_AT_ONCE = 32
RECENT_QUESTIONS = 200
"""Questions are drawn from so many of the latest ones."""
Updates = dict[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What is being compared in one browser tab, and what was said about it so far."""

    pair: Pair | None = None
    comparison: Comparison | None = None
    strength: int | None = None
    reasons: tuple[str, ...] = ()


class ComparePage:
    """Components and handlers of the comparison; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store

    def build(self) -> None:
        """Add the page and connect its events."""
        words = self.words
        self.vote = gr.State(Vote())
        with gr.Column(elem_id="compare-page"):
            with gr.Row(elem_id="compare-ask", elem_classes="k-inline"):
                self.question = gr.Textbox(
                    "",
                    placeholder=words("compare.placeholder"),
                    label=words("compare.placeholder"),
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=5,
                    scale=6,
                    elem_id="compare-question",
                )
                self.ask = gr.Button(words("compare.ask"), variant="primary", scale=0, min_width=100)
                self.draw = gr.Button(words("compare.draw"), scale=0, min_width=210)
            self.answers = markup(look.start(words), elem_id="compare-answers")
            with gr.Column(visible=False, elem_id="compare-detail") as self.detail:
                self.strength = clickable()
                self.reasons = clickable()
            self.votes = clickable(elem_id="compare-votes")
        self._wire()

    def _wire(self) -> None:
        shown = [self.vote, self.answers, self.detail, self.strength, self.reasons, self.votes]
        asked = gr.on(
            [self.question.submit, self.ask.click], self.check, self.question, self.answers, **QUICK
        )
        drawn = gr.on([self.draw.click, self.votes.select], self.draw_question, None, self.question, **QUICK)
        for event in (asked, drawn):
            event.success(
                self.answer,
                self.question,
                shown,
                concurrency_limit=PAIRS_AT_ONCE,
                concurrency_id="compare",
                show_progress="hidden",
            )
        self.votes.click(self.decide, self.vote, [*shown, self.question], **QUICK)
        self.strength.click(self.choose_strength, self.vote, [self.vote, self.strength], **QUICK)
        self.reasons.click(self.choose_reason, self.vote, [self.vote, self.reasons], **QUICK)

    # -- asking ---------------------------------------------------------------------------------------

    def check(self, question: str, request: gr.Request) -> str:
        """Refuse a question that cannot be asked before anything changes."""
        with self.frame.told():
            self.frame.person(request)
            check_messages([{"role": "user", "content": question}])
            return look.waiting(self.words)

    def draw_question(self, request: gr.Request) -> str:
        """Return a recent question of the chat that this person has not compared answers to."""
        with self.frame.told():
            question = drawn_question(self.store, self.frame.person(request))
            if question is None:
                raise toast("", self.words("compare.none_to_draw"))
            return question

    async def answer(self, question: str, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """Show the waiting cards, then both answers at once."""
        with self.frame.told():
            person = self.frame.person(request)
            yield self._shown(Vote()) | {self.answers: look.waiting(self.words)}
            try:
                ask = await asyncio.to_thread(self._ask_of, person, question)
                pair = await self.services.chat.reply_pair(ask)
            except BaseExceptionGroup as errors:
                problem = _told(errors)
                yield self._shown(Vote()) | {self.answers: note(problem, "bad")}
            else:
                yield self._shown(Vote(pair=pair))

    # -- voting ---------------------------------------------------------------------------------------

    def decide(self, vote: Vote, request: gr.Request, event: gr.EventData) -> Updates:
        """Record the choice once, however often it is clicked; skipping records nothing."""
        with self.frame.told():
            person, click = self.frame.person(request), clicked(event)
            if click["act"] == "skip":
                return self._shown(Vote()) | {self.question: ""}
            if vote.pair is None:
                raise NotFound("pair", "none", "ask a question first")
            if vote.comparison is not None:
                return {}
            has_winner = click["id"] in ("left", "right")
            comparison = self.services.chat.compare(
                person,
                left_turn_id=vote.pair.left.id,
                right_turn_id=vote.pair.right.id,
                choice=click["id"],
                strength=vote.strength if has_winner else None,
                reasons=vote.reasons,
            )
            return self._shown(replace(vote, comparison=comparison))

    def choose_strength(self, vote: Vote, event: gr.EventData) -> tuple[Vote, str]:
        """Choose how much better the winner is, or unchoose it."""
        value = int(clicked(event)["id"])
        vote = replace(vote, strength=None if vote.strength == value else value)
        return vote, look.strengths(self.words, vote.strength)

    def choose_reason(self, vote: Vote, event: gr.EventData) -> tuple[Vote, str]:
        """Add a reason for the choice, or take it back."""
        reason = clicked(event)["id"]
        others = tuple(known for known in vote.reasons if known != reason)
        vote = replace(vote, reasons=others if reason in vote.reasons else (*others, reason))
        return vote, self._reason_chips(vote)

    # -- what is shown --------------------------------------------------------------------------------

    def _shown(self, vote: Vote) -> Updates:
        is_open = vote.pair is not None and vote.comparison is None
        return {
            self.vote: vote,
            self.answers: look.answers(self.words, vote.pair, vote.comparison)
            if vote.pair
            else look.start(self.words),
            self.detail: gr.Column(visible=is_open),
            self.strength: look.strengths(self.words, vote.strength),
            self.reasons: self._reason_chips(vote),
            self.votes: self._buttons(vote),
        }

    def _buttons(self, vote: Vote) -> str:
        if vote.pair is None:
            return ""
        return look.votes(self.words) if vote.comparison is None else look.voted(self.words)

    def _reason_chips(self, vote: Vote) -> str:
        return reason_chips(self.words, reasons_offered(self.store, "up"), list(vote.reasons))

    def _ask_of(self, person: Person, question: str) -> Ask:
        """Return the question in a conversation of its own, which the chat's list leaves out; it is written here."""
        check_messages([{"role": "user", "content": question}])
        conversation = self.services.chat.conversation_for(person, new_id("comparison"))
        return self.services.chat.ask(person, conversation, question)


def _told(errors: BaseExceptionGroup[Any]) -> str:
    """Return what a person is told; raises what is not meant for people."""
    meant, rest = errors.split(KotaeError)
    if rest is not None or meant is None:
        raise errors
    return "; ".join(dict.fromkeys(str(error) for error in meant.exceptions))


def drawn_question(store: Store, person: Person) -> str | None:
    """Return a recent question of anybody in the chat that this person has not compared answers to."""
    recent = store.all(Turn, "source = 'chat'", order="seq DESC", limit=RECENT_QUESTIONS)
    compared = store.all(Turn, "source = 'compare' AND person_id = ?", [person.id])
    known = {question_of(turn) for turn in compared}
    questions = [question for question in map(question_of, recent) if question not in known]
    return random.choice(questions) if questions else None
