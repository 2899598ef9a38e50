"""Candidates: what was trained, the evidence about it, and the decision with its reason."""

from __future__ import annotations

from typing import Any

import gradio as gr

from assistant import release
from assistant.quarantine import quarantine_of
from assistant.web.pages import candidate_view as look
from assistant.web.pages.frame import Frame, clickable, clicked, markup
from assistant.web.pages.html import empty, note
from assistant.web.pages.served_page import not_followed
from storage import people, policies, runs
from storage.errors import InvalidField
from storage.records import Json, Policy, now
from storage.store import Store

QUICK: Json = {"queue": False, "show_progress": "hidden"}
Updates = dict[Any, Any]


class CandidatesPage:
    """Components and handlers of the candidates; one instance serves everybody."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.words, self.services = frame, frame.words, frame.services
        self.store = frame.services.store

    def build(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Add the page and connect its events."""
        self.selected = gr.State("")
        with gr.Row(elem_classes="k-two"):
            with gr.Column(scale=0, min_width=300, elem_classes="k-list"):
                self.listing = clickable(elem_id="candidate-list")
            with gr.Column(elem_classes="k-detail"):
                self.verdict = markup(elem_id="candidate-verdict")
                with gr.Column(
                    visible=False, elem_id="candidate-decision", elem_classes="k-card"
                ) as self.decision:
                    self._build_decision()
                self.message = markup(elem_id="candidate-message")
                with gr.Column(visible=False) as self.evidence:
                    self._build_evidence()
        shown = [self.selected, self.listing, self.verdict, self.decision, self.evidence, self.numbers]
        shown += [self.chart, self.samples, self.snapshot, self.curves, self.reason, self.message]
        gr.on([blocks.load, tab.select], self.refresh, self.selected, shown, **QUICK)
        self.listing.click(self.open, None, shown, **QUICK)
        self.share_kind.change(
            lambda kind: gr.Slider(visible=kind != "all"), self.share_kind, self.share, **QUICK
        )
        approval = [self.selected, self.reason, self.share_kind, self.share]
        self.approve.click(
            self.on_approve, approval, shown, show_progress="minimal", show_progress_on=self.approve
        )
        self.reject.click(self.on_reject, [self.selected, self.reason], shown, **QUICK)

    def _build_decision(self) -> None:
        words = self.words
        self.reason = gr.Textbox(
            "",
            label=words("candidates.reason"),
            placeholder=words("candidates.reason_example"),
            lines=2,
            max_lines=5,
        )
        with gr.Row(elem_classes="k-inline"):
            self.share_kind = gr.Radio(
                choices=[
                    (words("candidates.everybody"), "all"),
                    (words("candidates.canary"), "canary"),
                    (words("candidates.shadow"), "shadow"),
                ],
                value="canary",
                show_label=False,
                container=False,
                scale=2,
                min_width=260,
            )
            self.share = gr.Slider(
                minimum=1,
                maximum=99,
                value=10,
                step=1,
                label=words("candidates.share"),
                scale=2,
                elem_id="share",
            )
        with gr.Row(elem_classes="k-inline"):
            self.approve = gr.Button(words("candidates.approve"), variant="primary", scale=0, min_width=130)
            self.reject = gr.Button(
                words("candidates.reject"), scale=0, min_width=110, elem_classes="k-danger"
            )

    def _build_evidence(self) -> None:
        words = self.words
        markup(f"<h3>{words('candidates.numbers')}</h3>")
        self.chart = markup()
        self.numbers = markup(elem_id="candidate-numbers")
        markup(f"<h3>{words('candidates.samples')}</h3>")
        self.samples = markup(elem_id="candidate-samples")
        markup(f"<h3>{words('candidates.learnt')}</h3>")
        self.snapshot = markup(elem_id="candidate-snapshot")
        markup(f"<h3>{words('candidates.curves')}</h3>")
        self.curves = markup(elem_id="candidate-curves")

    # -- handlers -------------------------------------------------------------------------------------

    def refresh(self, selected: str, request: gr.Request) -> Updates:
        """Show the chosen candidate; at first the one that waits for a decision."""
        with self.frame.told():
            self.frame.person(request)
            return self._shown(selected or first_to_decide(self.store))

    def open(self, request: gr.Request, event: gr.EventData) -> Updates:
        """Show the candidate that was clicked."""
        with self.frame.told():
            self.frame.person(request)
            return self._shown(clicked(event)["id"]) | {self.message: ""}

    async def on_approve(
        self, selected: str, reason: str, share_kind: str, share: float, request: gr.Request
    ) -> Updates:
        """Approve for everybody, as a canary or as a shadow; it is loaded and probed before anything is recorded."""
        with self.frame.told():
            person = self.frame.person(request)
            self._check_reason(reason)
            deployment = await self.services.release.approve(
                policy_id=selected,
                person=person,
                reason=reason,
                canary_percent=share if share_kind == "canary" else None,
                shadow_percent=share if share_kind == "shadow" else None,
            )
            percent = f"{deployment.share:.0%}"
            told = self.words("candidates.approved", policy=selected, percent=percent)
            if deployment.role == "shadow":
                told = self.words("candidates.shadowed", policy=selected, percent=percent)
            message = note(told, "good") + not_followed(self.words, self.services.release)
            return self._shown(selected) | {self.message: message, self.reason: ""}

    def on_reject(self, selected: str, reason: str, request: gr.Request) -> Updates:
        """Reject for good, with a reason; the canary or the shadow is withdrawn with it."""
        with self.frame.told():
            person = self.frame.person(request)
            self._check_reason(reason)
            release.reject(self.store, policy_id=selected, person=person, reason=reason)
            told = self.words("candidates.rejected", policy=selected)
            return self._shown(selected) | {self.message: note(told, "good"), self.reason: ""}

    def _check_reason(self, reason: str) -> None:
        if not reason.strip():
            raise InvalidField("reason", reason, self.words("candidates.reason_missing"))

    # -- what is shown --------------------------------------------------------------------------------

    def _shown(self, policy_id: str) -> Updates:
        words, store = self.words, self.store
        standings = [
            (policy, policies.standing(store, policy.id), policies.evaluation_of(store, policy.id))
            for policy in reversed(policies.list_policies(store))
        ]
        listing = look.candidate_list(words, standings, current=policy_id, now=now())
        if not policy_id:
            closed = {self.decision: gr.Column(visible=False), self.evidence: gr.Column(visible=False)}
            nothing = empty(words("candidates.none"), words("candidates.none_text"))
            return closed | {self.selected: "", self.listing: listing, self.verdict: nothing}
        return self._evidence(store.get(Policy, policy_id)) | {
            self.selected: policy_id,
            self.listing: listing,
        }

    def _evidence(self, policy: Policy) -> Updates:
        words, store = self.words, self.store
        standing, evaluation = policies.standing(store, policy.id), policies.evaluation_of(store, policy.id)
        approval = policies.approval_of(store, policy.id)
        decided = people.get_person(store, approval.person_id).name if approval else ""
        numbers = evaluation.numbers if evaluation else {}
        return {
            self.verdict: look.verdict(words, policy, standing, evaluation)
            + look.quarantined(words, quarantine_of(store, policy.id))
            + look.decision(words, approval, decided),
            self.decision: gr.Column(visible=standing in ("candidate", "approved", "shadow")),
            self.evidence: gr.Column(visible=evaluation is not None),
            self.numbers: look.numbers_table(words, numbers),
            self.chart: look.number_chart(words, numbers),
            self.samples: look.samples(words, evaluation.samples if evaluation else []),
            self.snapshot: look.learnt_from(words, runs.snapshot_of(store, policy.run_id or "")),
            self.curves: look.curves(words, runs.metrics(store, policy.run_id or "")),
        }


def first_to_decide(store: Store) -> str:
    """Return the newest candidate that waits for a decision, else the newest that was trained, else nothing."""
    trained = [policy.id for policy in reversed(policies.list_policies(store)) if policy.run_id is not None]
    waiting = [id for id in trained if policies.standing(store, id) == "candidate"]
    return (waiting or trained or [""])[0]
