"""What all pages share: who is behind an event, how errors are told, the header, clickable HTML."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from assistant.web.services import Services
from assistant.web.words import LANGUAGES, Language, Words
from storage import people, settings
from storage.errors import KotaeError, NotAllowed
from storage.records import Person, Role

log = logging.getLogger("kotae.pages")

CLICKS = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled) return;
  trigger(button.dataset.event || 'click', {...button.dataset});
});"""
"""Turns every element with `data-act` inside a `gr.HTML` into a button: its `data-…` reach the handler of `.click`, or of
the event that `data-event` names."""

APPS: tuple[tuple[str, str, Role], ...] = (
    ("staff", "/", "staff"),
    ("operator", "/operator/", "operator"),
    ("admin", "/admin/", "admin"),
)
TOAST_S = 8


@dataclass(frozen=True, slots=True)
class Frame:
    """One app in one language: what its pages are built from."""

    services: Services
    words: Words
    app: str
    role: Role

    def person(self, request: gr.Request) -> Person:
        """Return who sent the event.

        Raises:
            NotAllowed: nobody is signed in, or their role does not reach this app.
        """
        person_id = request.username
        if not person_id:
            raise NotAllowed(self.words("error.signed_out"))
        person = people.get_person(self.services.store, person_id)
        people.require(person, self.role)
        return person

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the person what went wrong and what to do, never a stack trace."""
        try:
            yield
        except gr.Error:
            raise
        except KotaeError as error:
            raise toast(self.words("error.title"), str(error)) from error
        except Exception as error:
            log.exception("a page failed")
            raise toast(self.words("error.title"), self.words("error.unexpected")) from error

    def header(self, blocks: gr.Blocks) -> None:
        """Add the header: product, apps, language, person, log out."""
        header = clickable(header_html(self.words, self.app, None, None), elem_id="kotae-header")
        other = other_language(self.words.language)
        header.click(self.choose_language, queue=False, show_progress="hidden").then(
            None, js=f"() => window.kotae.go('{other}')"
        )
        blocks.load(self.fill_header, outputs=header, queue=False, show_progress="hidden").then(
            None, js="() => window.kotae.prefer()"
        )

    def choose_language(self, request: gr.Request) -> None:
        """Remember the other language as the person's own."""
        with self.told():
            person = self.person(request)
            key = f"language:{person.id}"
            settings.put(self.services.store, key, other_language(self.words.language), "system")

    def fill_header(self, request: gr.Request) -> str:
        """Return the header of the person who opened the page."""
        with self.told():
            person = self.person(request)
            preferred = settings.get(self.services.store, f"language:{person.id}", None)
            return header_html(self.words, self.app, person, preferred)


def toast(title: str, message: str) -> gr.Error:
    """Return an error that Gradio shows as a small message."""
    return gr.Error(escape(message), title=title, duration=TOAST_S, print_exception=False)


def clickable(value: str = "", **options: Any) -> gr.HTML:
    """Return HTML whose `data-act` elements send click events."""
    return gr.HTML(value, js_on_load=CLICKS, apply_default_css=False, **options)


def markup(value: str = "", **options: Any) -> gr.HTML:
    """Return HTML that only shows something, in our style alone."""
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **options)


def clicked(event: gr.EventData) -> dict[str, str]:
    """Return the `data-…` of the element that was clicked: ids and names, never text to be stored."""
    data: Any = event._data
    return {str(key): str(value) for key, value in data.items()} if isinstance(data, dict) else {}


def other_language(language: Language) -> Language:
    """Return the language to switch to."""
    return LANGUAGES[1 - LANGUAGES.index(language)]


def page_path(app_path: str, language: Language) -> str:
    """Return where an app is in one language: English at its own path, Japanese one below."""
    return app_path if language == "en" else f"{app_path}ja"


def header_html(words: Words, app: str, person: Person | None, preferred: str | None) -> str:
    """Return the header; without a person it shows the product only."""
    links = "".join(
        f'<a href="{page_path(path, words.language)}"{" aria-current=page" if name == app else ""}>'
        f"{escape(words.of('app', name))}</a>"
        for name, path, role in APPS
        if person is not None and people.may(person, role)
    )
    other = other_language(words.language)
    me = (
        f'<span class="k-person">{escape(person.name)}</span>'
        f'<button class="k-link" data-act="language" lang="{other}">{escape(words("app.other_language"))}</button>'
        f'<form method="post" action="/logout"><button class="k-link">{escape(words("app.log_out"))}</button></form>'
        if person is not None
        else ""
    )
    return (
        f'<header class="k-header" data-language="{words.language}" data-preferred="{preferred or ""}">'
        f'<a class="k-brand" href="{page_path("/", words.language)}"><b lang="ja">答え</b> Kotae</a>'
        f'<nav aria-label="{escape(words("app.sections"))}">{links}</nav><div class="k-me">{me}</div></header>'
    )
