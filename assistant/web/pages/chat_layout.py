"""The components of the chat page, and how a `Screen` is put into them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from assistant.web.pages import chat_view as look
from assistant.web.pages.chat_screen import Screen
from assistant.web.pages.feedback_panel import FeedbackPanel
from assistant.web.pages.frame import clickable, markup
from assistant.web.words import Words


class ChatLayout:
    """Builds the components where it is made; the attributes name them."""

    def __init__(self, words: Words, panel: FeedbackPanel) -> None:
        self.words, self.panel = words, panel
        with gr.Row(elem_id="chat-page", equal_height=True):
            with gr.Column(elem_id="chat-side", scale=0, min_width=270):
                self._build_side()
            with gr.Column(elem_id="chat-main", min_width=280):
                self._build_title()
                self._build_messages()
                self._build_composer()

    @property
    def screen(self) -> list[Any]:
        """Return the components that `drawn` changes, and those of the panel below the answer."""
        return [*self.asked, self.listing]

    @property
    def asked(self) -> list[Any]:
        """Return those of `screen` that a question changes."""
        parts = [self.title, self.renaming, self.older, self.history, self.live, self.empty, self.bar]
        return [*parts, *self.panel.outputs]

    def drawn(self, screen: Screen) -> dict[Any, Any]:
        """Return the updates that show a screen: a value for every component, see `look.marker`."""
        listing = {} if screen.listing is None else {self.listing: screen.listing}
        return listing | {
            self.title: screen.title,
            self.renaming: "",
            self.older: look.older_bar(self.words) if screen.has_older else "",
            self.history: gr.Chatbot(value=screen.history, feedback_value=screen.history_feedback)
            if screen.history
            else [],
            self.live: screen.live,
            self.bar: screen.bar,
            self.empty: screen.empty,
        }

    def _build_side(self) -> None:
        words = self.words
        self.new = gr.Button(words("chat.new"), elem_id="chat-new")
        self.query = gr.Textbox(
            "",
            placeholder=words("chat.search"),
            label=words("chat.search"),
            show_label=False,
            container=False,
            max_lines=1,
            elem_id="chat-search",
        )
        self.listing = clickable(elem_id="chat-list")

    def _build_title(self) -> None:
        words = self.words
        self.title = clickable(look.title_bar(words, None), elem_id="chat-title")
        self.renaming = markup()
        with gr.Row(elem_id="chat-renaming", elem_classes="k-inline"):
            self.new_title = gr.Textbox(
                "", label=words("chat.title"), show_label=False, container=False, max_lines=1, scale=4
            )
            self.rename = gr.Button(words("chat.rename"), variant="primary", scale=0, min_width=110)

    def _build_messages(self) -> None:
        with gr.Column(elem_id="chat-scroll"):
            self.older = clickable(elem_id="chat-older")
            self.history = _chatbot("chat-history")
            self.live = _chatbot("chat-live")
            self.empty = clickable(elem_id="chat-empty")
            self.bar = clickable(elem_id="chat-bar")
            self.panel.build()

    def _build_composer(self) -> None:
        words = self.words
        with gr.Row(elem_id="chat-composer"):
            self.question = gr.Textbox(
                "",
                placeholder=words("chat.placeholder"),
                label=words("chat.placeholder"),
                show_label=False,
                container=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                scale=8,
                elem_id="chat-question",
            )
            self.send = gr.Button(
                words("chat.send"), variant="primary", scale=0, min_width=88, elem_id="chat-send"
            )
            self.stop = gr.Button(words("chat.stop"), scale=0, min_width=88, elem_id="chat-stop")
        markup(f'<p class="k-hint k-keys">{escape(words("chat.keys"))}</p>')


def _chatbot(elem_id: str) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id=elem_id,
        show_label=False,
        container=False,
        height=None,
        autoscroll=False,
        editable="user",
        buttons=["copy"],
        layout="bubble",
        group_consecutive_messages=False,
    )
