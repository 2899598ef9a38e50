"""Watches the canary that is served: reads what concluded, judges it, keeps the verdict, and takes a failed one back.

The counts stay in this process and only what concluded since the last look is read; after a restart everything is read once.
Deliberately absent: promotion, which is a person's, and requests that failed before their first token: they leave no row.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from assistant.canary import CanaryConfig, Evidence, Status, Verdict, judge
from assistant.canary_evidence import Arms
from assistant.canary_stops import Event, Seen, hard_stops, length_outside, refusals_outside, still_needed
from assistant.quarantine import quarantine
from assistant.release import retire
from storage import deployments, outcomes, settings
from storage.deployments import Stage
from storage.errors import Conflict
from storage.failures import failures_since
from storage.outcomes import Answered, Outcome
from storage.people import SYSTEM
from storage.records import Deployment, Json, Served, now
from storage.store import Store
from storage.tables import Setting

log = logging.getLogger("kotae.canary")

VERDICT = "canary_verdict"
"""The setting that keeps the last verdict: `{"policy_id", "status", "reasons", "evidence", "at"}`."""
WATCH_S = 10.0


class CanaryWatch:
    """Judges the canary of one data folder; `look` is safe to call at any time."""

    def __init__(self, store: Store, config: CanaryConfig | None = None) -> None:
        self.store = store
        self.config = config or CanaryConfig()
        self._of = ""
        """The deployment with which the canary's stay began."""
        self._stages: list[Stage] = []
        """Those that conversations were drawn with."""
        self._arms: list[Arms] = []
        self._hand_overs: list[Arms] = []
        self._lengths: tuple[list[int], list[int]] = ([], [])
        self._began_at = 0.0
        """When that deployment was decided, in Unix seconds."""
        self._read_until = 0.0
        """When the latest conversation that was counted concluded. Not the time of the look: a clock that is put back would
        count what lies between again, and one that ran ahead would pass over what comes until then."""
        self._seen: list[Seen] = []
        self._seen_seq = 0
        self._failed: list[Seen] = []

    def look(self, *, at: float | None = None) -> Verdict | None:
        """Judge the canary by what concluded up to `at` (now); None without a canary. A failed one is taken back."""
        served = deployments.served(self.store)
        if served is None or served.canary is None:
            return None
        at = now() if at is None else at
        self._follow(deployments.stages_of(self.store, served))
        self._read_answers(served, served.canary, at)
        stops = hard_stops(
            sorted([*self._seen, *self._failed], key=lambda one: one.at), now=at, config=self.config
        )
        if not stops:  # what is broken does not wait for what people thought of it
            self._count_outcomes(served, served.canary, at)
            stops = [
                *length_outside(*self._lengths, self.config),
                *refusals_outside(self._hand_overs, self.config),
            ]
        verdict = judge(self._arms, stops=stops, config=self.config)
        self._keep(served.canary.policy_id, verdict)
        if verdict.status == "Failed":
            self._take_back(served.canary.policy_id, verdict)
        return verdict

    def _take_back(self, policy_id: str, verdict: Verdict) -> None:
        log.error("canary %s failed: %s", policy_id, verdict.reasons[0])
        with suppress(
            Conflict
        ):  # somebody took it back or promoted it while it was judged: theirs is the last word
            retire(
                self.store,
                policy_id=policy_id,
                actor=SYSTEM,
                reason=f"canary failed: {'; '.join(verdict.reasons)}",
            )
            quarantine(self.store, policy_id, f"canary failed: {verdict.reasons[0]}")

    def _follow(self, stages: list[Stage]) -> None:
        """Make room for each share that the canary had; a canary that is new here starts from nothing."""
        if stages[0].deployment.id != self._of:
            self._arms, self._hand_overs, self._lengths, self._read_until = [], [], ([], []), 0.0
            self._seen, self._seen_seq = [], 0
        self._of, self._began_at = stages[0].deployment.id, stages[0].deployment.created_at
        self._stages = [stage for stage in stages if stage.since is not None]
        fresh = [Arms(share=stage.share) for stage in self._stages[len(self._arms) :]]
        self._arms, self._hand_overs = self._arms + fresh, self._hand_overs + fresh

    def _read_answers(self, served: Served, canary: Deployment, until: float) -> None:
        """Add what the hard stops look at, from the canary's row on: it may happen before it answers anybody."""
        policy_ids = (canary.policy_id, served.stable.policy_id)
        for answer in outcomes.answers_after(
            self.store, self._seen_seq, policy_ids=policy_ids, began_at=self._began_at
        ):
            self._seen.append(seen_of(answer, is_canary=answer.policy_id == canary.policy_id))
            self._seen_seq = answer.seq
        self._seen = still_needed(self._seen, now=until, config=self.config)
        self._failed = [
            Seen(at=one.created_at, canary=one.policy_id == canary.policy_id, event=one.kind)
            for one in failures_since(self.store, policy_ids, since=self._began_at)
        ]

    def _count_outcomes(self, served: Served, canary: Deployment, until: float) -> None:
        """Add what concluded since the last look."""
        if served.canary_since is None:
            return
        for outcome in outcomes.outcomes(
            self.store,
            canary_id=canary.policy_id,
            stable_id=served.stable.policy_id,
            began_at=served.canary_since,
            after=self._read_until,
            until=until,
        ):
            self._add(outcome, is_canary=outcome.policy_id == canary.policy_id)
            self._read_until = outcome.concluded_at

    def _add(self, outcome: Outcome, *, is_canary: bool) -> None:
        """Count a conversation at the share that it was drawn with."""
        number = (
            sum(stage.since is not None and stage.since <= outcome.began_at for stage in self._stages) - 1
        )
        for counts, bad in (
            (self._arms, bool(outcome.negative)),
            (self._hand_overs, "handed_over" in outcome.negative),
        ):
            arms = counts[number]
            if is_canary:
                counts[number] = replace(arms, canary=arms.canary + 1, canary_bad=arms.canary_bad + bad)
            else:
                counts[number] = replace(arms, stable=arms.stable + 1, stable_bad=arms.stable_bad + bad)
        self._lengths[0 if is_canary else 1].append(outcome.tokens)

    def _keep(self, policy_id: str, verdict: Verdict) -> None:
        """Keep the verdict; the audit log tells of each change of its status."""
        before = settings.get(self.store, VERDICT, {})
        value = {"policy_id": policy_id, **asdict(verdict), "reasons": list(verdict.reasons)}
        if {**before, "at": None} == {**value, "at": None}:
            return
        is_news = (before.get("policy_id"), before.get("status")) != (policy_id, verdict.status)
        with self.store.transaction(SYSTEM, audited=is_news) as changes:
            changes.replace_key(Setting(key=VERDICT, value={**value, "at": now()}, changed_at=now()), "key")
            if is_news:
                changes.audit("canary.judged", policy_id, status=verdict.status, **asdict(verdict.evidence))


def seen_of(answer: Answered, *, is_canary: bool) -> Seen:
    """Return a recorded answer as the stops see it; one that a person stopped is no failure."""
    event: Event = "answer"
    if answer.finish_reason == "error":
        event = "error"
    elif answer.is_empty and answer.finish_reason != "cancelled":
        event = "empty"
    return Seen(at=answer.created_at, canary=is_canary, event=event, total_s=answer.total_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The last verdict, as it was kept."""

    policy_id: str
    status: Status
    evidence: Evidence
    at: float
    """When the status or a number last changed, in seconds since the epoch."""


def last_judged(store: Store) -> Judged | None:
    """Return the last verdict with its numbers; None before the first."""
    kept: Json = settings.get(store, VERDICT, {})
    if not kept:
        return None
    evidence = Evidence(**kept["evidence"])
    return Judged(policy_id=kept["policy_id"], status=kept["status"], evidence=evidence, at=kept["at"])


def last_verdict(store: Store) -> tuple[str, Status, list[str]] | None:
    """Return policy, status and reasons of the last verdict; None before the first."""
    kept: Json = settings.get(store, VERDICT, {})
    return (kept["policy_id"], kept["status"], kept["reasons"]) if kept else None
