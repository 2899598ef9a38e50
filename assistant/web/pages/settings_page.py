"""Settings: the reasons offered after a rating, the system prompt, the questions on the empty chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from assistant.web.pages.chat_screen import example_questions
from assistant.web.pages.feedback_panel import reasons_offered
from assistant.web.pages.frame import Frame, markup
from assistant.web.pages.html import note
from storage import settings
from storage.errors import InvalidField
from storage.records import Json

QUICK: Json = {"queue": False, "show_progress": "hidden"}
MOST_REASONS, MOST_QUESTIONS = 30, 8
LONGEST_PROMPT = 8_000
Updates = dict[Any, Any]


class SettingsPage:
    """Components and handlers of the settings; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store

    def build(self, blocks: gr.Blocks) -> None:
        """Add the page and connect its events."""
        words = self.words
        with gr.Column(elem_classes="k-form"):
            self.message = markup(elem_id="settings-message")
            self.prompt = gr.Textbox(
                "", label=words("settings.prompt"), info=words("settings.prompt_help"), lines=4, max_lines=16
            )
            self.questions = gr.Textbox(
                "",
                label=words("settings.questions"),
                info=words("settings.questions_help"),
                lines=4,
                max_lines=10,
            )
            markup(
                f"<h3>{escape(words('settings.reasons'))}</h3>"
                f'<p class="k-hint">{escape(words("settings.reasons_help"))}</p>'
            )
            self.reasons = gr.Dataframe(
                headers=[words.of("reason_column", name) for name in ("id", "en", "ja", "for")],
                column_count=4,
                type="array",
                show_label=False,
                interactive=True,
                wrap=True,
                elem_id="settings-reasons",
            )
            self.keep = gr.Button(words("settings.keep"), variant="primary", elem_id="settings-keep")
        shown = [self.prompt, self.questions, self.reasons, self.message]
        blocks.load(self.refresh, None, shown, **QUICK)
        self.keep.click(self.on_keep, [self.prompt, self.questions, self.reasons], shown, **QUICK)

    def refresh(self, request: gr.Request) -> Updates:
        """Show the settings as they are kept."""
        with self.frame.told():
            self.frame.person(request)
            return self._shown()

    def on_keep(
        self, prompt: str, questions: str, reasons: Sequence[Sequence[Any]], request: gr.Request
    ) -> Updates:
        """Keep all settings, or none when one of them cannot be used."""
        with self.frame.told():
            person = self.frame.person(request)
            kept = {
                "system_prompt": checked_prompt(prompt),
                "example_questions": checked_questions(questions),
                "rating_reasons": checked_reasons(reasons),
            }
            for key, value in kept.items():
                settings.put(self.store, key, value, person.id)
            return self._shown() | {self.message: note(self.words("settings.kept"), "good")}

    def _shown(self) -> Updates:
        reasons = reasons_offered(self.store, None)
        return {
            self.prompt: settings.get(self.store, "system_prompt", ""),
            self.questions: "\n".join(example_questions(self.services, self.words.language)),
            self.reasons: [[reason.get(key, "") for key in ("id", "en", "ja", "for")] for reason in reasons],
        }


def checked_prompt(prompt: str) -> str:
    """Return the system prompt; raises InvalidField when it is too long to leave room for a dialogue."""
    if len(prompt) > LONGEST_PROMPT:
        raise InvalidField("system prompt", f"{len(prompt):,} characters", f"use at most {LONGEST_PROMPT:,}")
    return prompt.strip()


def checked_questions(text: str) -> list[str]:
    """Return one question for each line; raises InvalidField when there are too many to choose from."""
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if len(questions) > MOST_QUESTIONS:
        raise InvalidField("example questions", f"{len(questions)} lines", f"use at most {MOST_QUESTIONS}")
    return questions


def checked_reasons(rows: Sequence[Sequence[Any]]) -> list[Json]:
    """Return the reasons as they are kept; an id is made from the English words when there is none.

    Raises:
        InvalidField: a reason without words, an id twice, too many reasons, or an unknown verdict.
    """
    reasons: list[Json] = []
    for row in rows:
        id, english, japanese, verdict = (str(cell or "").strip() for cell in row)
        if not (english or japanese):
            continue
        if verdict not in ("", "up", "down"):
            raise InvalidField("reason for", verdict, "use up, down or nothing")
        id = id or re.sub(r"\W+", "_", (english or japanese).lower()).strip("_")
        fits = {"for": verdict} if verdict else {}
        reasons.append({"id": id, "en": english or japanese, "ja": japanese or english, **fits})
    ids = [reason["id"] for reason in reasons]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise InvalidField("reason id", twice[0], "give each reason an id of its own")
    if not 1 <= len(reasons) <= MOST_REASONS:
        raise InvalidField("reasons", f"{len(reasons)} reasons", f"use 1 to {MOST_REASONS}")
    return reasons
