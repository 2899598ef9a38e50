"""People: who may sign in, with which role; passwords and tokens are shown once."""

from __future__ import annotations

from html import escape
from typing import Any, get_args

import gradio as gr

from assistant.accounts import invite, renew_password
from assistant.web.pages.frame import Frame, clickable, clicked, markup
from assistant.web.pages.html import badge, button, moment, note, table
from assistant.web.words import Words
from storage import people
from storage.records import Json, Person, Role

QUICK: Json = {"queue": False, "show_progress": "hidden"}
Updates = dict[Any, Any]


class PeoplePage:
    """Components and handlers of the people; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.store = frame, frame.words, frame.services.store

    def build(self, blocks: gr.Blocks) -> None:
        """Add the page and connect its events."""
        words = self.words
        roles = [(words.of("role", role), role) for role in get_args(Role)]
        self.selected = gr.State("")
        with gr.Row(elem_classes="k-inline k-card"):
            self.name = gr.Textbox("", label=words("people.name"), max_lines=1, scale=3)
            self.role = gr.Dropdown(choices=roles, value="staff", label=words("people.role"), scale=2)
            self.add = gr.Button(words("people.add"), variant="primary", scale=0, min_width=110)
        self.message = markup(elem_id="people-message")
        self.listing = clickable(elem_id="people-list")
        with gr.Row(visible=False, elem_classes="k-inline k-card") as self.changing:
            self.new_role = gr.Dropdown(choices=roles, label=words("people.new_role"), scale=3)
            self.keep = gr.Button(words("people.keep"), variant="primary", scale=0, min_width=110)
        shown = [self.selected, self.message, self.listing, self.changing, self.new_role, self.name]
        blocks.load(self.refresh, None, shown, **QUICK)
        gr.on([self.add.click, self.name.submit], self.on_add, [self.name, self.role], shown, **QUICK)
        self.listing.click(self.act, None, shown, **QUICK)
        self.keep.click(self.on_role, [self.selected, self.new_role], shown, **QUICK)

    def refresh(self, request: gr.Request) -> Updates:
        """Show everybody."""
        with self.frame.told():
            return self._shown(self.frame.person(request))

    def on_add(self, name: str, role: Role, request: gr.Request) -> Updates:
        """Invite somebody; the one-time password is shown here and nowhere else."""
        with self.frame.told():
            admin = self.frame.person(request)
            person, password = invite(self.store, name=name, role=role, actor=admin.id)
            secret = secret_html(self.words("people.password", name=person.name), password)
            return self._shown(admin) | {self.message: secret, self.name: ""}

    def on_role(self, selected: str, role: Role, request: gr.Request) -> Updates:
        """Give the chosen person another role."""
        with self.frame.told():
            admin = self.frame.person(request)
            person = people.set_role(self.store, selected, role=role, actor=admin.id)
            told = self.words("people.role_kept", name=person.name, role=self.words.of("role", person.role))
            return self._shown(admin) | {self.message: note(told, "good")}

    def act(self, request: gr.Request, event: gr.EventData) -> Updates:
        """Do what a button in a person's row says."""
        with self.frame.told():
            admin, click = self.frame.person(request), clicked(event)
            person = people.get_person(self.store, click["id"])
            if click["act"] == "role":
                opened = {self.changing: gr.Row(visible=True), self.new_role: person.role}
                return self._shown(admin) | opened | {self.selected: person.id}
            return self._shown(admin, self._changed(admin, person, click["act"]))

    def _changed(self, admin: Person, person: Person, act: str) -> str:
        """Make the change and return what to say about it."""
        store, words = self.store, self.words
        if act == "disable":
            people.disable(store, person.id, actor=admin.id)
            return note(words("people.disabled", name=person.name), "good")
        if act == "enable":
            people.enable(store, person.id, actor=admin.id)
            return note(words("people.enabled", name=person.name), "good")
        if act == "token":
            token = people.issue_token(store, person_id=person.id, label="admin page", actor=admin.id)
            return secret_html(words("people.token", name=person.name), token)
        password = renew_password(store, person, actor=admin.id)
        return secret_html(words("people.password", name=person.name), password)

    def _shown(self, admin: Person, message: str = "") -> Updates:
        return {
            self.message: message,
            self.listing: people_html(self.words, people.list_people(self.store), admin),
            self.changing: gr.Row(visible=False),
        }


def secret_html(text: str, secret: str) -> str:
    """Return a secret that is shown this once, easy to select."""
    return f'<div class="k-secret" role="status"><p>{escape(text)}</p><code tabindex="0">{escape(secret)}</code></div>'


def people_html(words: Words, everybody: list[Person], admin: Person) -> str:
    """Return everybody with what can be done; nobody can shut themselves out here."""
    headers = [words.of("people_column", name) for name in ("name", "role", "since", "state", "actions")]
    rows = [
        [
            f"<b>{escape(person.name)}</b>",
            escape(words.of("role", person.role)),
            moment(person.created_at),
            badge(words("people.off"), "bad") if person.disabled else badge(words("people.on"), "good"),
            _actions(words, person, is_self=person.id == admin.id),
        ]
        for person in everybody
    ]
    return table(headers, rows)


def _actions(words: Words, person: Person, *, is_self: bool) -> str:
    token = button("token", words("people.new_token"), id=person.id, kind="small")
    if is_self:
        return f'<div class="k-actions">{token}</div>'
    switch = "enable" if person.disabled else "disable"
    return (
        '<div class="k-actions">'
        + button("role", words("people.change_role"), id=person.id, kind="small")
        + button("password", words("people.new_password"), id=person.id, kind="small")
        + token
        + button(switch, words.of("people_switch", switch), id=person.id, kind="small danger")
        + "</div>"
    )
