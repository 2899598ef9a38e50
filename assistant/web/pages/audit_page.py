"""Audit: the latest events of the log, and whether its chain is whole."""

from __future__ import annotations

import json
from html import escape

import gradio as gr

from assistant.web.pages.frame import Frame, markup
from assistant.web.pages.html import moment, note, table
from assistant.web.pages.served_page import name_of
from assistant.web.words import Words
from storage import audit
from storage.records import AuditEvent, Json
from storage.store import Store

QUICK: Json = {"queue": False, "show_progress": "hidden"}
SHOWN_EVENTS = 100
DETAIL_CHARACTERS = 160


class AuditPage:
    """Components and handlers of the audit log; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.store = frame, frame.words, frame.services.store

    def build(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Add the page and connect its events."""
        words = self.words
        with gr.Row(elem_classes="k-inline"):
            self.subject = gr.Textbox(
                "",
                placeholder=words("audit.subject"),
                label=words("audit.subject"),
                show_label=False,
                container=False,
                max_lines=1,
                scale=3,
            )
            self.verify = gr.Button(words("audit.verify"), variant="primary", scale=0, min_width=150)
        self.message = markup(elem_id="audit-message")
        self.events = markup(elem_id="audit-events")
        gr.on(
            [blocks.load, tab.select, self.subject.submit], self.refresh, self.subject, self.events, **QUICK
        )
        self.verify.click(self.on_verify, None, self.message, show_progress="minimal")

    def refresh(self, subject: str, request: gr.Request) -> str:
        """Show the newest events, or those about one subject."""
        with self.frame.told():
            self.frame.person(request)
            events = audit.events(self.store, limit=SHOWN_EVENTS, subject=subject.strip() or None)
            return events_html(self.words, self.store, events)

    def on_verify(self, request: gr.Request) -> str:
        """Check the whole chain of events and say where it breaks, if it does."""
        with self.frame.told():
            self.frame.person(request)
            report = audit.verify(self.store)
            if report.ok:
                return note(self.words("audit.whole", events=f"{report.events:,}"), "good")
            return note(f"{self.words('audit.broken')} {report.message}", "bad")


def events_html(words: Words, store: Store, events: list[AuditEvent]) -> str:
    """Return events as a table, the newest first."""
    if not events:
        return note(words("audit.none"))
    names = {actor: name_of(store, actor) for actor in {event.actor for event in events}}
    headers = [words.of("audit_column", name) for name in ("seq", "at", "by", "action", "subject", "detail")]
    return table(headers, [_row(event, names) for event in events], kind="audit")


def _row(event: AuditEvent, names: dict[str, str]) -> list[str]:
    detail = json.dumps(event.detail, ensure_ascii=False) if event.detail else ""
    short = detail if len(detail) <= DETAIL_CHARACTERS else detail[:DETAIL_CHARACTERS] + "…"
    return [
        f"{event.seq}",
        moment(event.at),
        escape(names[event.actor]),
        f"<code>{escape(event.action)}</code>",
        f'<code title="sha256 {escape(event.sha256)}">{escape(event.subject)}</code>',
        f"<small>{escape(short)}</small>",
    ]
