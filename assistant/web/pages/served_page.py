"""What is served: stable, canary, previous, shadow; how people like it; promote, roll back, withdraw; what was before."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from assistant import release
from assistant.alerts import Alert
from assistant.canary_watch import last_verdict
from assistant.in_effect import Waiting
from assistant.shadow_watch import last_evidence
from assistant.web.pages.candidate_view import standing_badge
from assistant.web.pages.frame import Frame, markup
from assistant.web.pages.html import badge, moment, note, table, time_tag
from assistant.web.pages.satisfaction import satisfaction_html
from assistant.web.pages.shadow_view import shadow_html
from assistant.web.words import Words
from storage import deployments, people
from storage.errors import InvalidField, NotFound
from storage.records import Deployment, Json, Served, now
from storage.store import Store
from storage.tallies import likings

QUICK: Json = {"queue": False, "show_progress": "hidden"}
HISTORY = 50
Updates = dict[Any, Any]


class ServedPage:
    """Components and handlers of what is served; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store

    def build(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Add the page and connect its events."""
        words = self.words
        self.seen = gr.State({})
        self.alerts = markup(elem_id="served-alerts")
        self.now = markup(elem_id="served-now")
        self.shadow = markup(elem_id="served-shadow")
        with gr.Column(elem_id="served-change", elem_classes="k-card"):
            self.reason = gr.Textbox(
                "",
                label=words("candidates.reason"),
                placeholder=words("served.reason_example"),
                lines=1,
                max_lines=4,
            )
            with gr.Row(elem_classes="k-inline"):
                self.promote = gr.Button(
                    words("served.promote"), variant="primary", scale=0, min_width=160, visible=False
                )
                self.rollback = gr.Button(
                    words("served.rollback"), scale=0, min_width=130, elem_classes="k-danger"
                )
                self.withdraw = gr.Button(words("served.withdraw"), scale=0, min_width=160, visible=False)
        self.message = markup(elem_id="served-message")
        markup(f"<h3>{escape(words('served.satisfaction'))}</h3>")
        self.satisfaction = markup(elem_id="served-satisfaction")
        markup(f"<h3>{escape(words('served.history'))}</h3>")
        self.history = markup(elem_id="served-history")
        shown = [
            self.seen,
            self.alerts,
            self.now,
            self.shadow,
            self.promote,
            self.withdraw,
            self.satisfaction,
            self.history,
            self.message,
            self.reason,
        ]
        gr.on([blocks.load, tab.select], self.refresh, None, shown, **QUICK)
        slow: Json = {"show_progress": "minimal", "show_progress_on": self.now}
        decision = [self.reason, self.seen]
        self.promote.click(self.on_promote, decision, shown, **slow)
        self.rollback.click(self.on_rollback, decision, shown, **slow)
        self.withdraw.click(self.on_withdraw, decision, shown, **slow)

    def refresh(self, request: gr.Request) -> Updates:
        """Show what is served, how satisfied people are, and what was served before."""
        with self.frame.told():
            self.frame.person(request)
            return self._shown()

    async def on_promote(self, reason: str, seen: Json, request: gr.Request) -> Updates:
        """Give the canary that was shown all conversations."""
        with self.frame.told():
            person = self.frame.person(request)
            self._check_reason(reason)
            row = release.promote(self.store, policy_id=seen.get("canary", ""), person=person, reason=reason)
            return await self._done(self.words("served.promoted", policy=row.policy_id))

    async def on_rollback(self, reason: str, seen: Json, request: gr.Request) -> Updates:
        """Withdraw the canary if one was shown, else go back to the policy before."""
        with self.frame.told():
            person = self.frame.person(request)
            self._check_reason(reason)
            expected = seen.get("canary", seen.get("stable"))
            release.rollback(self.store, actor=person.id, reason=reason, expected=expected)
            stable = release.serving(self.store).stable
            return await self._done(self.words("served.rolled_back", policy=stable.policy_id))

    async def on_withdraw(self, reason: str, seen: Json, request: gr.Request) -> Updates:
        """Withdraw the shadow that was shown."""
        with self.frame.told():
            person = self.frame.person(request)
            self._check_reason(reason)
            row = release.withdraw(self.store, actor=person.id, reason=reason, expected=seen.get("shadow"))
            return await self._done(self.words("served.withdrawn", policy=row.policy_id))

    async def _done(self, message: str) -> Updates:
        """Say that the step is recorded, bring the engine to it, and say beside it what keeps the engine from that."""
        await self.services.release.try_sync()
        told = note(message, "good") + not_followed(self.words, self.services.release)
        return self._shown() | {self.message: told, self.reason: ""}

    def _check_reason(self, reason: str) -> None:
        if not reason.strip():
            raise InvalidField("reason", reason, self.words("candidates.reason_missing"))

    def _shown(self) -> Updates:
        served, running = deployments.served(self.store), self.services.release
        waiting = running.in_effect().waiting(served) if served is not None else []
        return {
            self.seen: policies_of(served),
            self.alerts: alerts_html(self.words, running.told.latest()[-5:]),
            self.now: waiting_html(self.words, waiting, running.served.stable)
            + served_html(self.words, self.store, served, waiting)
            + verdict_html(self.words, self.store),
            self.shadow: shadow_html(self.words, last_evidence(self.store)),
            self.promote: gr.Button(visible=served is not None and served.canary is not None),
            self.withdraw: gr.Button(visible=served is not None and served.shadow is not None),
            self.satisfaction: satisfaction_html(self.words, likings(self.store)),
            self.history: history_html(self.words, self.store, deployments.history(self.store, HISTORY)),
        }


def policies_of(served: Served | None) -> Json:
    """Return role → policy of what is shown: a decision is about that, whatever came in its place meanwhile."""
    if served is None:
        return {}
    rows = {"stable": served.stable, "canary": served.canary, "shadow": served.shadow}
    return {role: row.policy_id for role, row in rows.items() if row is not None}


def alerts_html(words: Words, alerts: Sequence[Alert]) -> str:
    """Return what the operators have to know, each with its time."""
    return "".join(
        note(alert.message, "bad", at=" · " + time_tag(words, alert.at, now())) for alert in alerts
    )


def not_followed(words: Words, running: release.Release) -> str:
    """Return what keeps the engine from following what was recorded; nothing where it did."""
    return (
        note(words("served.not_followed", reason=running.trouble.why), "bad") if running.trouble.why else ""
    )


def waiting_html(words: Words, waiting: Sequence[Waiting], answers: Deployment) -> str:
    """Return what is decided and not in effect, and who answers in the place of stable."""
    notes = []
    for row in waiting:
        reason = row.reason.rstrip(".") or words("served.being_loaded")
        role = words.of("standing", row.role).lower()
        text = words("served.waiting", policy=row.policy, role=role, reason=reason)
        if row.role == "stable" and answers.policy_id != row.policy:
            text += " " + words("served.until_then", policy=answers.policy_id)
        notes.append(note(text, "bad"))
    return "".join(notes)


def served_html(words: Words, store: Store, served: Served | None, waiting: Sequence[Waiting] = ()) -> str:
    """Return a card for each policy that answers or stands by; one that waits for the engine has no share yet."""
    if served is None:
        return note(words("served.nothing"))
    late = {row.role for row in waiting}
    canary_share = served.canary.share if served.canary else 0.0
    rows = (
        ("stable", served.stable, 1 - canary_share),
        ("canary", served.canary, canary_share),
        ("previous", served.previous, 0.0),
        ("shadow", served.shadow, served.shadow.share if served.shadow else 0.0),
    )
    cards = "".join(
        served_card(words, store, role, row, share=None if role in late else share)
        for role, row, share in rows
        if row is not None
    )
    return f'<div class="k-cards">{cards}</div>'


def served_card(words: Words, store: Store, role: str, row: Deployment, *, share: float | None) -> str:
    """Return one policy with its share (None: it does not answer yet), since when, by whom and why."""
    bar = f'<div class="k-bar"><i style="width:{share or 0:.0%}"></i></div>'
    part = words("served.not_yet") if share is None else f"{share:.0%}"
    return (
        f'<article class="k-card {role}"><header>{standing_badge(words, role)}<b class="k-share">{escape(part)}</b>'
        f"</header><h3><code>{escape(row.policy_id)}</code></h3>{bar}"
        f"<p>{time_tag(words, row.created_at, now())} · {escape(name_of(store, row.actor))}</p>"
        f'<p class="k-hint">“{escape(row.reason)}”</p></article>'
    )


def verdict_html(words: Words, store: Store) -> str:
    """Return the last verdict on a canary with its reasons; nothing before the first."""
    kept = last_verdict(store)
    if kept is None:
        return ""
    policy_id, status, reasons = kept
    kinds = {"Successful": "good", "Failed": "bad", "Inconclusive": "quiet"}
    return note(f"{words.of('verdict', status)} · {policy_id}: {'; '.join(reasons)}", kinds[status])


def history_html(words: Words, store: Store, rows: list[Deployment]) -> str:
    """Return every change of what is served, the newest first."""
    headers = [words.of("history", name) for name in ("at", "policy", "role", "share", "by", "reason")]
    body = [
        [
            moment(row.created_at),
            f"<code>{escape(row.policy_id)}</code>",
            badge(words.of("standing", row.role), "quiet"),
            f"{row.share:.0%}",
            escape(name_of(store, row.actor)),
            escape(row.reason),
        ]
        for row in rows
    ]
    return table(headers, body)


def name_of(store: Store, actor: str) -> str:
    """Return a person's name; the system's as it stands."""
    try:
        return people.get_person(store, actor).name
    except NotFound:
        return actor
