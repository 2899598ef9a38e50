"""The panel below an answer: why it is good or bad, a comment, and the answer as it should have been."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from assistant.web.pages.chat_session import own_turn
from assistant.web.pages.chat_view import View, marker
from assistant.web.pages.frame import Frame, clickable, clicked, markup
from assistant.web.pages.html import button, merged_difference, note
from assistant.web.words import Words, default_reasons
from storage import feedback, settings
from storage.records import Json, Person, Rating, Turn, Verdict
from storage.store import Store

COPY = "text => { if (text && navigator.clipboard) navigator.clipboard.writeText(text).catch(() => {}); }"
QUOTE_CHARACTERS = 90


class FeedbackPanel:
    """One panel for the turn that was judged last, whichever place of the conversation it is in."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.store = frame, frame.words, frame.services.store

    def build(self) -> None:
        """Add the panel's components; style.css shows each part once it has its text or marker."""
        words = self.words
        with gr.Column(elem_id="feedback-panel"):
            self.about = markup()
            self.chips = clickable(elem_id="feedback-reasons")
            with gr.Row(elem_classes="k-inline"):
                self.comment = gr.Textbox(
                    "",
                    placeholder=words("feedback.comment"),
                    show_label=False,
                    container=False,
                    max_lines=4,
                    scale=4,
                )
                self.save = gr.Button(words("feedback.save"), scale=0, min_width=90)
        self.correcting = markup()
        with gr.Column(elem_id="correction-panel"):
            self.edited = gr.Textbox("", label=words("feedback.corrected"), lines=3, max_lines=14)
            with gr.Row(elem_classes="k-inline"):
                self.use = gr.Button(words("feedback.use"), variant="primary", scale=0, min_width=160)
                self.cancel = gr.Button(words("feedback.cancel"), scale=0, min_width=90)
        self.result = markup(elem_id="feedback-result")

    @property
    def outputs(self) -> list[Any]:
        """Return the components that `shown` and `hidden` change."""
        return [self.about, self.chips, self.comment, self.correcting, self.edited, self.result]

    def wire(self, view: gr.State) -> None:
        """Connect the panel's own events."""
        quick: Json = {"queue": False, "show_progress": "hidden"}
        self.chips.click(self.toggle_reason, view, self.outputs, **quick)
        gr.on(
            [self.save.click, self.comment.submit],
            self.keep_comment,
            [view, self.comment],
            self.outputs,
            **quick,
        )
        self.use.click(self.keep_correction, [view, self.edited], self.outputs, **quick).success(
            None, self.edited, js=COPY
        )
        self.cancel.click(lambda: "", None, self.correcting, **quick)

    # -- what people do -------------------------------------------------------------------------------

    def rate(self, person: Person, turn: Turn, verdict: Verdict) -> dict[Any, Any]:
        """Record a thumb and return the panel for it; the same thumb again takes it back."""
        before = feedback.current_rating(self.store, turn_id=turn.id, person_id=person.id)
        if before is not None and before.verdict == verdict:
            verdict = "retracted"
        rating = feedback.rate(self.store, turn_id=turn.id, person_id=person.id, verdict=verdict)
        if rating.verdict == "retracted":
            return self.hidden() | {self.result: note(self.words("feedback.retracted"))}
        return self.shown(turn, rating)

    def toggle_reason(self, view: View, request: gr.Request, event: gr.EventData) -> dict[Any, Any]:
        """Add a reason to the rating, or take it back."""
        with self.frame.told():
            person = self.frame.person(request)
            turn = own_turn(self.frame.services, person, view.judged_turn_id)
            rating, reason = self._rating(person, turn), clicked(event).get("id", "")
            chosen = [known for known in rating.reasons if known != reason]
            if reason not in rating.reasons:
                chosen.append(reason)
            return self._keep(turn, replace(rating, reasons=chosen))

    def keep_comment(self, view: View, comment: str, request: gr.Request) -> dict[Any, Any]:
        """Keep the comment with the person's rating."""
        with self.frame.told():
            person = self.frame.person(request)
            turn = own_turn(self.frame.services, person, view.judged_turn_id)
            return self._keep(turn, replace(self._rating(person, turn), comment=comment.strip()))

    def keep_correction(self, view: View, edited: str, request: gr.Request) -> dict[Any, Any]:
        """Keep the edited answer and show what changed."""
        with self.frame.told():
            person = self.frame.person(request)
            turn = own_turn(self.frame.services, person, view.judged_turn_id)
            kept = feedback.correct(self.store, turn_id=turn.id, person_id=person.id, edited=edited.strip())
            saved = note(self.words("feedback.correction_saved"), "good")
            return {
                self.correcting: "",
                self.result: saved + merged_difference(kept.original, kept.edited),
            }

    # -- what is shown --------------------------------------------------------------------------------

    def shown(self, turn: Turn, rating: Rating) -> dict[Any, Any]:
        """Return the updates that open the panel for a rated turn."""
        return self.hidden() | {
            self.about: about_html(self.words, turn),
            self.chips: reason_chips(self.words, reasons_offered(self.store, rating.verdict), rating.reasons),
            self.comment: rating.comment,
            self.result: note(self.words("feedback.saved"), "good"),
        }

    def opened_for_correction(self, turn: Turn) -> dict[Any, Any]:
        """Return the updates that offer the answer for editing."""
        return self.hidden() | {self.correcting: marker("correcting"), self.edited: turn.answer}

    def hidden(self) -> dict[Any, Any]:
        """Return the updates that close the panel."""
        return dict.fromkeys(self.outputs, "")

    def _rating(self, person: Person, turn: Turn) -> Rating:
        rating = feedback.current_rating(self.store, turn_id=turn.id, person_id=person.id)
        if rating is None:
            raise gr.Error(self.words("feedback.rate_first"), title="", print_exception=False)
        return rating

    def _keep(self, turn: Turn, rating: Rating) -> dict[Any, Any]:
        kept = feedback.rate(
            self.store,
            turn_id=turn.id,
            person_id=rating.person_id,
            verdict=rating.verdict,
            reasons=rating.reasons,
            comment=rating.comment,
        )
        return self.shown(turn, kept)


def reasons_offered(store: Store, verdict: str | None) -> list[Json]:
    """Return the reasons for a verdict (None: all): `{"id", "en", "ja"}`, with `for` when only one fits."""
    reasons: list[Json] = settings.get(store, "rating_reasons", None) or default_reasons()
    return [reason for reason in reasons if verdict is None or reason.get("for", verdict) == verdict]


def reason_chips(words: Words, reasons: list[Json], chosen: list[str]) -> str:
    """Return the reasons as buttons that stay down."""
    return (
        f'<div class="k-chips" role="group" aria-label="{escape(words("feedback.why"))}">'
        + "".join(
            button(
                "reason",
                str(reason.get(words.language) or reason.get("en") or reason["id"]),
                id=str(reason["id"]),
                kind="chip",
                pressed=reason["id"] in chosen,
            )
            for reason in reasons
        )
        + "</div>"
    )


def about_html(words: Words, turn: Turn) -> str:
    """Return the panel's question, with the first words of the answer it is about."""
    line = " ".join(turn.answer.split())
    quote = line if len(line) <= QUOTE_CHARACTERS else line[:QUOTE_CHARACTERS].rstrip() + "…"
    return f'<p class="k-about"><b>{escape(words("feedback.why"))}</b> <q>{escape(quote)}</q></p>'
