"""The app of the operators: candidates, what is served, runs, audit."""

from __future__ import annotations

import gradio as gr

from assistant.web.pages.audit_page import AuditPage
from assistant.web.pages.candidates_page import CandidatesPage
from assistant.web.pages.frame import Frame
from assistant.web.pages.runs_page import RunsPage
from assistant.web.pages.served_page import ServedPage


def build_operator(frame: Frame, blocks: gr.Blocks) -> None:
    """Add the operators' app to the page that is being built."""
    words = frame.words
    frame.header(blocks)
    with gr.Tabs(elem_id="kotae-tabs"):
        with gr.Tab(words("candidates.tab"), id="candidates") as candidates:
            CandidatesPage(frame).build(blocks, candidates)
        with gr.Tab(words("served.tab"), id="served") as served:
            ServedPage(frame).build(blocks, served)
        with gr.Tab(words("runs.tab"), id="runs") as runs:
            RunsPage(frame).build(blocks, runs)
        with gr.Tab(words("audit.tab"), id="audit") as audit:
            AuditPage(frame).build(blocks, audit)
