"""Bringing a running engine to what was decided: hot swap, shadow, and the way back.

A decision is rows in storage (`assistant.decisions`, whose verbs stand here too: they work without a server). `Release`
brings a running engine to what the rows say, in this order: load → check → flip → drain. The flip is one reference in this
process, so no request is cut: a request keeps the policy it started with, and the policy before stays loaded for the way
back, which therefore asks nothing of the engine first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from assistant.alerts import Alerts, Trouble
from assistant.decisions import (
    approve,
    check_approval,
    check_files,
    promote,
    reject,
    retire,
    rollback,
    serving,
    withdraw,
    withdraw_refused,
)
from assistant.engine.behaviour_gate import BehaviourGate
from assistant.engine.errors import (
    PERHAPS_FOR_NOW,
    AdapterRefused,
    EngineAbsent,
    EngineError,
    ReplicaAtFault,
)
from assistant.engine.protocol import Engine
from assistant.engine.reconcile import LoadResult, load_missing, unload_unused
from assistant.in_effect import InEffect, answering_rows, note
from assistant.quarantine import lift, refusals_kept
from assistant.routing import assign, first_answer_by, is_drawn
from storage import deployments
from storage.errors import CorruptData, KotaeError
from storage.records import Deployment, Person, Policy, Served, Turn
from storage.store import Store

log = logging.getLogger("kotae.release")

POLL_S = 1.0
RECHECK_S = 5.0
WAITED_FOR_S = 120.0
"""An engine that cannot load what has answered before may find the memory or the volume soon. Then people get answers of the
policy before, or of the base, rather than none."""


class Release:
    """Keeps a running engine at what the deployment rows say, and says which policy answers."""

    def __init__(self, store: Store, engine: Engine, *, probe_tolerance_nats: float | None = None) -> None:
        self.store = store
        self.engine = engine
        self.behaviour = BehaviourGate(engine, tolerance_nats=probe_tolerance_nats)
        self.served = deployments.answered_before(store, serving(store))
        self.told = Alerts()
        self.trouble = Trouble(self.told)
        self.in_flight: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self._sound: set[str] = set()
        """Policies that the engine had at the last look, and that nothing speaks against; not all could be probed."""
        self._failed: dict[str, str] = {}
        """Policies that could not be loaded or checked at the last sync, and why."""
        self._failing_since: dict[str, float] = {}
        """Of them those that answered before, so that it may be the engine's fault, and since when (`time.monotonic`)."""
        self._noted = ""
        """The canary's deployment that is known to answer."""
        self._checked: set[str] = set()
        """Policies that passed their probes and that the engine had when it was last asked."""

    def lease(self, conversation_id: str) -> AbstractContextManager[Deployment]:
        """Yield the deployment that answers now; its policy stays loaded until the lease ends."""
        return self.using(self._assigned(conversation_id))

    @contextmanager
    def using(self, deployment: Deployment) -> Iterator[Deployment]:
        """Keep the policy of `deployment` loaded until the block ends."""
        self.in_flight[deployment.policy_id] += 1
        try:
            yield deployment
        finally:
            self.in_flight[deployment.policy_id] -= 1
            self.in_flight += Counter()  # forget the zeros

    def _assigned(self, conversation_id: str) -> Deployment:
        first = first_answer_by(self.store, conversation_id, self.served)
        return assign(conversation_id, self.served, first_answer_by=first)

    def shadow_of(self, conversation_id: str) -> Deployment | None:
        """Return the shadow that is asked this conversation's questions too; None where none is, or not yet loaded."""
        shadow = self.served.shadow
        if shadow is None or shadow.policy_id not in self._checked:
            return None
        return shadow if is_drawn(conversation_id, shadow) else None

    async def approve(
        self,
        *,
        policy_id: str,
        person: Person,
        reason: str,
        canary_percent: float | None = None,
        shadow_percent: float | None = None,
    ) -> Deployment:
        """As `approve`, after the policy has been loaded and probed: a bad one never gets a row.

        The engine answers people meanwhile, so it is given nothing that would be refused then. What keeps it from following
        after that is no error of this step, which is recorded: see `trouble`.
        """
        policy = self.store.get(Policy, policy_id)
        check_approval(
            self.store,
            policy_id=policy_id,
            person=person,
            reason=reason,
            canary_percent=canary_percent,
            shadow_percent=shadow_percent,
        )
        with refusals_kept(self.store, policy_id):
            # it reads the whole adapter: answers stream on
            await asyncio.to_thread(check_files, self.store, policy)
        async with self._lock:  # until the row is there: a sync between would unload what nobody wants yet
            with refusals_kept(self.store, policy_id):
                await self._prepare(policy)
            deployment = await asyncio.to_thread(
                approve,
                self.store,
                policy_id=policy_id,
                person=person,
                reason=reason,
                canary_percent=canary_percent,
                shadow_percent=shadow_percent,
            )
        await self.try_sync()
        return deployment

    async def sync(self) -> Served:
        """Load what is wanted, check it, flip to it, and unload what nobody uses. Safe to call at any time.

        Where all that should answer was loaded and checked before, the flip comes first: a way back waits neither for a
        busy engine nor for another policy that is being loaded. If the engine has lost it since, the first question
        finds out, as with the policy before.

        Raises:
            EngineError: the engine cannot be reached; what was served goes on being served.
        """
        self._flip_if_checked()
        async with self._lock:
            await self._follow()
            return self.served

    async def put_back(self, policy_id: str) -> None:
        """Bring back a policy that a question found gone. One that cannot be loaded for now is tried at every look anyway.

        Raises:
            EngineAbsent: it is one of those.
            EngineError: as `sync`.
        """
        self._check_not_waiting(policy_id)
        async with self._lock:
            self._check_not_waiting(policy_id)  # by what another question's sync found meanwhile
            await self._follow()

    async def _follow(self) -> None:
        """Do what `sync` says, behind the lock."""
        wanted = serving(self.store)
        while (decided := await self._load_and_check(wanted)) != wanted:
            wanted = decided  # somebody decided meanwhile, or what is wanted was withdrawn
        self._flip(wanted)
        self.told.settle(wanted)
        for row in answering_rows(wanted):
            if row.policy_id in self._checked:
                lift(self.store, row)
        for reason in (await unload_unused(self.engine, self._in_use)).values():
            raise reason

    async def _load_and_check(self, served: Served) -> Served:
        """Make the engine ready to answer as `served` says, and return what should be served by now.

        Raises:
            EngineError: what should answer is not ready.
        """
        wanted = self._wanted(served)
        paths = {id: Path(p.adapter_path) for id, p in wanted.items() if p.adapter_path is not None}
        result = await load_missing(
            self.engine, paths, check=lambda policy_id: check_files(self.store, wanted[policy_id])
        )
        self.told.keep("replica", result.at_fault)
        for policy_id, error in result.at_fault.items():
            self.told.tell_once("replica", policy_id, f"{policy_id}: {error}")
        failed = {**result.failed, **await self._probe_unchecked(wanted, result)}
        refused = {
            id: error for id, error in failed.items() if isinstance(error, AdapterRefused | CorruptData)
        }
        self._failed = {id: str(error) for id, error in failed.items()}
        self._sound = wanted.keys() - result.failed.keys() - refused.keys()
        perhaps = {id for id in refused if isinstance(failed[id], PERHAPS_FOR_NOW) and self._has_answered(id)}
        self._failing_since = {id: self._failing_since.get(id, time.monotonic()) for id in perhaps}
        waits = set(filter(self._is_waited_for, perhaps))
        for policy_id in refused.keys() - waits:
            self._withdraw(policy_id, refused)
        for policy_id in waits:
            self._wait_for(policy_id, served)
        for policy_id in failed.keys() - refused.keys():
            if served.shadow is None or policy_id != served.shadow.policy_id:
                raise failed[policy_id]
            # it answers nobody, so nothing that does may wait for it
            log.warning("the shadow %s is not loaded: %s", policy_id, failed[policy_id])
        return serving(self.store)

    def _is_waited_for(self, policy_id: str) -> bool:
        since = self._failing_since.get(policy_id)
        return since is not None and time.monotonic() - since < WAITED_FOR_S

    def _has_answered(self, policy_id: str) -> bool:
        """Return whether an engine has served a policy before: what fails at it now may be the engine."""
        answers = self.store.all(Turn, "policy_id = ?", [policy_id], limit=1)
        return policy_id in self.behaviour.passed or bool(answers)

    def _wait_for(self, policy_id: str, served: Served) -> None:
        """Tell the operator of a policy that cannot answer for now; it is tried at every look.

        Raises:
            EngineAbsent: the policy should answer. What is asked of it meanwhile is not its fault.
        """
        why = f"{policy_id} cannot answer and is tried again: {self._failed[policy_id]}"
        self.told.tell_once("not loaded", policy_id, why)
        if policy_id in {row.policy_id for row in (served.stable, served.canary) if row is not None}:
            self._check_not_waiting(policy_id)

    def _check_not_waiting(self, policy_id: str) -> None:
        """Raise EngineAbsent where the last look found that the policy cannot answer for now."""
        if self._is_waited_for(policy_id):
            raise EngineAbsent(f"engine: {policy_id} cannot answer for now: {self._failed[policy_id]}")

    def _in_use(self) -> set[str]:
        """Return the policies that are served, stand by, or still answer somebody."""
        return {row.policy_id for row in rows_of(self.served)} | self.in_flight.keys()

    def _flip_if_checked(self) -> None:
        wanted = serving(self.store)
        answering = (wanted.stable, wanted.canary)
        if {row.policy_id for row in answering if row is not None} <= self._checked:
            self._flip(wanted)

    def _flip(self, served: Served) -> None:
        """Answer as `served` says from now on; a canary's evidence begins after that, when every draw is its own."""
        self.served = served
        if served.canary is not None and served.canary.id != self._noted:
            since = deployments.note_answering(self.store, served.canary)
            self.served = replace(served, canary_since=served.canary_since or since)
            self._noted = served.canary.id

    async def watch(self) -> None:
        """Sync at once, whenever another process committed, and on a timer (an engine may have lost its adapters).

        A sync may take as long as an engine takes to load; what needs nothing of the engine is followed meanwhile.
        """
        syncing = asyncio.create_task(self.try_sync())
        seen, changed, waited_s = self.store.data_version(), False, 0.0
        try:
            while True:
                await asyncio.sleep(POLL_S)
                waited_s += POLL_S
                version = self.store.data_version()
                changed = changed or (version != seen and serving(self.store) != self.served)
                seen = version
                if not syncing.done():
                    waited_s = 0.0
                    if changed:
                        self._flip_if_checked()
                elif changed or not syncing.result() or waited_s >= RECHECK_S:
                    syncing, changed, waited_s = asyncio.create_task(self.try_sync()), False, 0.0
        finally:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)

    async def try_sync(self) -> bool:
        """Sync, note what is in effect then, and tell whether it went well; `watch` goes on trying where it did not."""
        try:
            await self.sync()
        except KotaeError as error:
            self.trouble.note(error)
        else:
            self.trouble.end()
        with suppress(KotaeError):  # it is for the command line alone
            lasting = replace(self.in_effect(), trouble=self.trouble.lasting)
            await asyncio.to_thread(note, self.store, lasting)
        return not self.trouble.why

    def in_effect(self) -> InEffect:
        """Return what answers now, and what keeps the rest of the decided from it.

        What is served without having passed here is what answered before this process began.
        """
        answering = self._checked | (self._sound - self.behaviour.passed)
        shadow = self.served.shadow
        if shadow is not None and shadow.policy_id not in self._checked:
            answering.discard(shadow.policy_id)
        return InEffect(
            deployments=tuple(row.id for row in answering_rows(self.served) if row.policy_id in answering),
            reasons=self._failed,
            trouble=self.trouble.why,
        )

    def _wanted(self, served: Served) -> dict[str, Policy]:
        return {row.policy_id: self.store.get(Policy, row.policy_id) for row in rows_of(served)}

    async def _prepare(self, policy: Policy) -> None:
        """Load and probe a policy that may not be served yet; unload it again when it fails."""
        if policy.adapter_path is None:
            return
        self._checked.discard(policy.id)
        await self.engine.load(policy_id=policy.id, adapter=Path(policy.adapter_path))
        try:
            await self._probe(policy)
        except AdapterRefused:
            if policy.id not in self._in_use():
                await self.engine.unload(policy.id)
            raise
        self._pass(policy.id)

    async def _probe_unchecked(
        self, wanted: Mapping[str, Policy], result: LoadResult
    ) -> dict[str, KotaeError]:
        """Probe what the engine has of `wanted` and did not pass yet; return why some of it did not now.

        Not only what was just loaded: its probes may have found the engine busy, or an earlier process loaded it, or a
        replica came back. One that fails what another passes is asked nothing of it: the operator hears of it, no one waits.
        """
        self._checked &= wanted.keys() - result.failed.keys() - result.loaded
        failed: dict[str, KotaeError] = {}
        for policy_id in sorted(wanted.keys() - result.failed.keys()):
            if policy_id in self._checked and not self.engine.awaits_proof(policy_id):
                continue
            try:
                await self._probe(wanted[policy_id])
            except ReplicaAtFault as error:
                self.told.tell_once("replica's answers", policy_id, f"{policy_id}: {error}")
                self._checked.add(policy_id)
            except KotaeError as error:
                failed[policy_id] = error
                self._checked.discard(policy_id)
            else:
                self._pass(policy_id)
        return failed

    def _pass(self, policy_id: str) -> None:
        """Remember that the engine has the policy and answers as it should; whatever was wrong with it is put right."""
        self._checked.add(policy_id)
        self.told.drop(policy_id, "not loaded", "no way back", "replica's answers")

    async def _probe(self, policy: Policy) -> None:
        if policy.adapter_path is not None:
            await self.behaviour.check(policy.id, Path(policy.adapter_path))

    def _withdraw(self, policy_id: str, refused: Mapping[str, KotaeError]) -> None:
        kind, why = withdraw_refused(self.store, policy_id, refused, base_name=self.engine.base_name)
        if kind == "no way back":
            self.told.tell_once(kind, policy_id, why)
        else:
            self.told.tell(kind, policy_id, why)

    @property
    def alerts(self) -> list[str]:
        """What the operators have to know now, the latest last."""
        return [alert.message for alert in self.told.latest()]


def rows_of(served: Served) -> list[Deployment]:
    """Return all that the engine should have loaded."""
    return answering_rows(served) + ([served.previous] if served.previous is not None else [])


__all__ = [
    "EngineError",
    "Release",
    "approve",
    "check_files",
    "promote",
    "reject",
    "retire",
    "rollback",
    "serving",
    "withdraw",
]
