"""Watches the shadow: reads what it answered, keeps the evidence for the operator, and withdraws one that is broken.

The counts stay in this process and only what came since the last look is read; after a restart everything is read once.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass

from assistant.canary import CanaryConfig
from assistant.canary_stops import Event, Seen, faults
from assistant.canary_watch import seen_of
from assistant.quarantine import quarantine
from assistant.release import retire
from assistant.routing import is_drawn
from assistant.shadow_evidence import Estimate, Pair, agreement, estimates
from storage import deployments, outcomes, settings
from storage.errors import Conflict
from storage.failures import failures_since
from storage.people import SYSTEM
from storage.records import Deployment, Json, now
from storage.shadows import AnswerPair, pairs_after, questions_after
from storage.store import Store
from storage.tables import Setting

log = logging.getLogger("kotae.shadow")

EVIDENCE = "shadow_evidence"
"""The setting that keeps the last evidence: the fields of `ShadowEvidence`."""
MEASURED = 5_000
"""The latest answers that the measures are of: intervals of a point and less, and some hundredths of a second a look."""
_HANDS_OVER = re.compile("|".join(f"(?:{phrase})" for phrase in outcomes.HAND_OVER_PHRASES), re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowEvidence:
    """What is known of a shadow."""

    policy_id: str
    stable_id: str
    """The policy whose answers it is held against."""
    answered: int
    failed: int
    skipped: int
    """Questions of its share that it was not asked, because the engine had no room."""
    measures: dict[str, Estimate]
    stops: tuple[str, ...]
    """Why it was withdrawn; nothing while it goes on."""


class ShadowWatch:
    """Keeps the evidence about the shadow of one data folder; `look` is safe to call at any time."""

    def __init__(self, store: Store, config: CanaryConfig | None = None) -> None:
        self.store = store
        self.config = config or CanaryConfig()
        self._start("")

    def look(self, *, at: float | None = None) -> ShadowEvidence | None:
        """Read what came up to `at` (now) and keep it; None without a shadow. A broken one is withdrawn."""
        served = deployments.served(self.store)
        if served is None or served.shadow is None:
            return None
        at = now() if at is None else at
        self._count(served.stable, served.shadow)
        self._forget_before(at - self.config.window_s)
        stops = faults(
            sorted([*self._seen, *self._died], key=lambda one: one.at),
            now=at,
            config=self.config,
            who="shadow",
        )
        evidence = ShadowEvidence(
            policy_id=served.shadow.policy_id,
            stable_id=served.stable.policy_id,
            answered=self._asked - self._failed,
            failed=self._failed,
            skipped=max(0, self._drawn - self._asked),
            measures=self._measures,
            stops=tuple(stops),
        )
        self._keep(evidence)
        if stops:
            log.error("shadow %s withdrawn: %s", evidence.policy_id, stops[0])
            with suppress(Conflict):  # somebody withdrew it or let it answer meanwhile
                retire(
                    self.store,
                    policy_id=evidence.policy_id,
                    actor=SYSTEM,
                    reason=f"shadow withdrawn: {'; '.join(stops)}",
                )
                quarantine(self.store, evidence.policy_id, f"shadow withdrawn: {stops[0]}")
        return evidence

    def _start(self, deployment_id: str) -> None:
        """Begin with nothing counted."""
        self._of, self._drawn, self._asked, self._failed = deployment_id, 0, 0, 0
        self._pairs: deque[Pair] = deque(maxlen=MEASURED)
        self._measures = estimates([])
        self._seen: list[Seen] = []
        self._died: list[Seen] = []
        self._pair_seq = self._question_seq = self._stable_seq = 0

    def _count(self, stable: Deployment, shadow: Deployment) -> None:
        """Add what came since the last look; a shadow that is new here starts from nothing."""
        if self._of != shadow.id:
            self._start(shadow.id)
        for question in questions_after(self.store, self._question_seq, stable=stable, shadow=shadow):
            self._drawn += is_drawn(question.conversation_id, shadow)
            self._question_seq = question.seq
        before = self._asked
        for pair in pairs_after(self.store, self._pair_seq, shadow=shadow):
            self._add(pair)
        if self._asked > before:
            self._measures = estimates(self._pairs)
        began_at, of_both = shadow.created_at, (shadow.policy_id, stable.policy_id)
        for answer in outcomes.answers_after(
            self.store, self._stable_seq, policy_ids=of_both, began_at=began_at
        ):
            self._seen.append(seen_of(answer, is_canary=False))
            self._stable_seq = answer.seq
        self._died = [
            Seen(at=one.created_at, canary=one.policy_id == shadow.policy_id, event=one.kind)
            for one in failures_since(self.store, of_both, since=began_at)
        ]

    def _add(self, pair: AnswerPair) -> None:
        self._pairs.append(measured(pair))
        self._asked += 1
        self._failed += self._pairs[-1].failed
        self._seen.append(Seen(at=pair.created_at, canary=True, event=event_of(pair), total_s=pair.total_s))
        self._pair_seq = pair.seq

    def _forget_before(self, at: float) -> None:
        """Drop what no stop looks at any more; one answer of another policy never becomes old."""
        self._seen = [one for one in self._seen if one.at > at or one.event == "wrong_policy"]

    def _keep(self, evidence: ShadowEvidence) -> None:
        """Keep the evidence; the audit log tells of a withdrawal."""
        value = {**asdict(evidence), "stops": list(evidence.stops)}
        if settings.get(self.store, EVIDENCE) == value:
            return
        with self.store.transaction(SYSTEM, audited=bool(evidence.stops), durable=False) as changes:
            changes.replace_key(Setting(key=EVIDENCE, value=value, changed_at=now()), "key")
            if evidence.stops:
                changes.audit("shadow.stopped", evidence.policy_id, reasons=list(evidence.stops))


def measured(pair: AnswerPair) -> Pair:
    """Return what the evidence needs of two answers."""
    return Pair(
        conversation_id=pair.conversation_id,
        failed=pair.finish_reason in ("error", "wrong_policy"),
        empty=not pair.answer.strip(),
        handed_over=bool(_HANDS_OVER.search(pair.answer)),
        tokens=len(pair.token_ids),
        total_s=pair.total_s,
        served_empty=not pair.served_answer.strip(),
        served_handed_over=bool(_HANDS_OVER.search(pair.served_answer)),
        served_tokens=len(pair.served_token_ids),
        served_total_s=pair.served_total_s,
        agreement=agreement(pair.token_ids, pair.served_token_ids),
    )


def event_of(pair: AnswerPair) -> Event:
    """Return the shadow's answer as the stops see it."""
    if pair.finish_reason in ("error", "wrong_policy"):
        return pair.finish_reason
    return "answer" if pair.answer.strip() else "empty"


def last_evidence(store: Store) -> ShadowEvidence | None:
    """Return the last evidence about a shadow; None before the first."""
    kept: Json = settings.get(store, EVIDENCE, {})
    if not kept:
        return None
    measures = {name: Estimate(**estimate) for name, estimate in kept["measures"].items()}
    return ShadowEvidence(**{**kept, "measures": measures, "stops": tuple(kept["stops"])})


def shadow_status(store: Store) -> Json | None:
    """Return the shadow with what is known of it so far, for the command line; None without one."""
    served = deployments.served(store)
    if served is None or served.shadow is None:
        return None
    status: Json = {"policy": served.shadow.policy_id, "share": served.shadow.share}
    known = last_evidence(store)
    if known is not None and known.policy_id == served.shadow.policy_id:
        status |= {"answered": known.answered, "failed": known.failed, "skipped": known.skipped}
        status["measures"] = {name: asdict(estimate) for name, estimate in known.measures.items()}
    return status
