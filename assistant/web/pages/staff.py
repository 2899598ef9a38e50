"""The app of the staff: chat and compare."""

from __future__ import annotations

import gradio as gr

from assistant.web.pages.chat_page import ChatPage
from assistant.web.pages.compare_page import ComparePage
from assistant.web.pages.frame import Frame


def build_staff(frame: Frame, blocks: gr.Blocks) -> None:
    """Add the staff app to the page that is being built."""
    frame.header(blocks)
    with gr.Tabs(elem_id="kotae-tabs"):
        with gr.Tab(frame.words("chat.tab"), id="chat"):
            ChatPage(frame).build(blocks)
        with gr.Tab(frame.words("compare.tab"), id="compare"):
            ComparePage(frame).build()
