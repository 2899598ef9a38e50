"""The app of the admins: people and settings."""

from __future__ import annotations

import gradio as gr

from assistant.web.pages.frame import Frame
from assistant.web.pages.people_page import PeoplePage
from assistant.web.pages.settings_page import SettingsPage


def build_admin(frame: Frame, blocks: gr.Blocks) -> None:
    """Add the admins' app to the page that is being built."""
    frame.header(blocks)
    with gr.Tabs(elem_id="kotae-tabs"):
        with gr.Tab(frame.words("people.tab"), id="people"):
            PeoplePage(frame).build(blocks)
        with gr.Tab(frame.words("settings.tab"), id="settings"):
            SettingsPage(frame).build(blocks)
