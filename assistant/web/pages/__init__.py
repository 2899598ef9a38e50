"""One Gradio app for each role, in English and, below `/ja`, in Japanese."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from assistant.web.pages.admin import build_admin
from assistant.web.pages.frame import Frame
from assistant.web.pages.operator import build_operator
from assistant.web.pages.staff import build_staff
from assistant.web.services import Services
from assistant.web.words import Words
from storage.records import Role

Build = Callable[[Frame, gr.Blocks], None]


def staff_app(services: Services) -> gr.Blocks:
    """Return the app in which staff chat and compare."""
    return _app(services, app="staff", role="staff", build=build_staff)


def operator_app(services: Services) -> gr.Blocks:
    """Return the app in which operators see evidence and decide what is served."""
    return _app(services, app="operator", role="operator", build=build_operator)


def admin_app(services: Services) -> gr.Blocks:
    """Return the app in which admins keep people and settings."""
    return _app(services, app="admin", role="admin", build=build_admin)


def _app(services: Services, *, app: str, role: Role, build: Build) -> gr.Blocks:
    """Return the app with a page for each language: words are known when a page is built."""
    english, japanese = Words("en"), Words("ja")
    blocks: gr.Blocks
    with gr.Blocks(title="Kotae", analytics_enabled=False, fill_width=True) as blocks:
        build(Frame(services, english, app, role), blocks)
    with blocks.route(japanese("app.this_language"), "/ja"):
        build(Frame(services, japanese, app, role), blocks)
    return blocks


__all__ = ["admin_app", "operator_app", "staff_app"]
