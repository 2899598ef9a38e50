"""The vLLM servers behind one engine: which of them answer, what each can serve, which is asked first.

What is known of a server is how it was last seen. One that fell out is tried last until it has been found well again,
by its health check or by what it lists: nobody needs to ask it a question first. Answers are streamed in `vllm.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from assistant.engine import vllm_wire as wire
from assistant.engine.errors import (
    AdapterRefused,
    EngineAbsent,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    NotProven,
    PolicyNotLoaded,
    ReplicaAtFault,
    StreamBroken,
)
from assistant.engine.pace import Pace
from assistant.engine.protocol import Health, Queue
from storage.errors import KotaeError
from storage.records import Json

T = TypeVar("T")
HEALTH_TIMEOUT_S = 4.0
"""For one replica, below what the web side waits for all: a silent one must not make the others look absent."""
PROBED_AGAIN_AFTER_S = 60.0
"""A replica that failed is looked at again after this: every replica answers the probes then, and each look would be enough
to slow the good ones. Somebody who mends it waits a minute at most, and not at all where it is loaded anew."""
AWAY = (429, 502, 503, 504)
"""To a control call vLLM has no such answer, as it queues none: a proxy says so of a server that is down."""


@dataclass(slots=True)
class Replica:
    """One server, as last seen."""

    url: str
    in_flight: int = 0
    ready: bool = True
    base: str | None = None
    """The name under which it serves the base model; learnt from its model list."""
    policies: set[str] = field(default_factory=set)
    """What it can serve; learnt from its model list and from what was done since."""
    proven: set[str] = field(default_factory=set)
    """Of the policies that were judged, those that passed here since they were loaded here."""
    failed_at: dict[str, float] = field(default_factory=dict)
    """Of the policies that were judged, when they last failed here since they were loaded here (`time.monotonic`)."""
    pace: Pace = field(default_factory=Pace)

    def gains(self, policy_id: str) -> None:
        """Note that it has just loaded a policy: what was proven before is not of these weights in this server."""
        self.policies.add(policy_id)
        self._unjudge(policy_id)

    def lacks(self, policy_id: str) -> None:
        """Note that it does not have a policy."""
        self.policies.discard(policy_id)
        self._unjudge(policy_id)

    def judge(self, policy_id: str, *, passed: bool) -> None:
        """Note how a policy did here just now."""
        self._unjudge(policy_id)
        if passed:
            self.proven.add(policy_id)
        else:
            self.failed_at[policy_id] = time.monotonic()

    def has_rested(self, policy_id: str) -> bool:
        """Return whether the policy did not fail here a moment ago."""
        return time.monotonic() - self.failed_at.get(policy_id, -math.inf) >= PROBED_AGAIN_AFTER_S

    def _unjudge(self, policy_id: str) -> None:
        self.proven.discard(policy_id)
        self.failed_at.pop(policy_id, None)

    def forget(self) -> None:
        """Take it for gone: whoever answers here next may be another server, with nothing loaded."""
        self.ready, self.base, self.policies = False, None, set()


class Replicas:
    """One or more vLLM servers that serve the same base model."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        base_name: str,
        client: httpx.AsyncClient,
        explain: Callable[[], EngineAbsent | None],
    ) -> None:
        """Remember the addresses; nothing is sent yet. `explain` as of `VllmEngine`."""
        self.all = [Replica(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self.judged: set[str] = set()
        """The policies that passed or failed somewhere: only replicas where they passed are asked for them."""
        self._base_name = base_name
        self._client = client
        self._explain = explain

    def by_load(self, policy_id: str) -> list[Replica]:
        """Return the replicas in the order to try: those that answer and have the policy, least in flight first.

        One that came back without its adapters is asked for them only when no other is left, and one where a policy did
        not pass never.
        """

        def last(replica: Replica) -> tuple[bool, bool, int]:
            return not replica.ready, policy_id not in replica.policies, replica.in_flight

        return sorted((replica for replica in self.all if self._may_ask(replica, policy_id)), key=last)

    def nobody(self, policy_id: str) -> EngineError:
        """Return what to say when `by_load` has no replica, which is cured by looking after them."""
        may_all = all(self._may_ask(replica, policy_id) for replica in self.all)
        return EngineAbsent("engine: no replica answers") if may_all else PolicyNotLoaded(policy_id)

    def _may_ask(self, replica: Replica, policy_id: str) -> bool:
        return policy_id not in self.judged or policy_id in replica.proven

    async def prove(self, policy_id: str, judge: Callable[[Replica], Awaitable[None]]) -> None:
        """Judge all replicas that have a policy at once. See `Engine.prove`.

        One that had no time or was lost meanwhile proves nothing: it keeps what it had, and is judged again.
        """
        having = [replica for replica in self.all if policy_id in replica.policies]
        asked = [replica for replica in having if replica.ready] or having
        verdicts = await asyncio.gather(*(judge(replica) for replica in asked), return_exceptions=True)
        faults = []
        for replica, verdict in zip(asked, verdicts, strict=True):
            if verdict is None:
                replica.judge(policy_id, passed=True)
            elif not isinstance(verdict, KotaeError):
                raise verdict
            elif not isinstance(verdict, EngineUnavailable | EngineBusy | PolicyNotLoaded):
                replica.judge(policy_id, passed=False)
                faults.append((replica, verdict))
        if faults or None in verdicts:  # else nothing is known: what may be asked stays as it was
            self.judged.add(policy_id)
        if any(policy_id in replica.proven for replica in self.all):
            for replica, fault in faults:
                raise ReplicaAtFault(
                    f"engine: {replica.url} does not answer as another replica does ({fault}); "
                    "give it the same base and adapters"
                ) from fault
            return
        errors = [verdict for verdict in verdicts if verdict is not None]
        errors.sort(key=lambda error: isinstance(error, AdapterRefused))  # refused is what all refuse
        error = errors[0] if errors else PolicyNotLoaded(policy_id)
        if isinstance(error, AdapterRefused) and len(asked) < len(self.all):
            raise NotProven(
                f"{error}; the other replicas are away or do not have it, so either may be at fault"
            )
        raise error

    def awaits_proof(self, policy_id: str) -> bool:
        """Return whether a replica that answers has a policy that was judged, and did not pass or was not asked yet.

        One that failed is left alone for a while as long as the policy passes elsewhere.
        """
        passes = any(policy_id in replica.proven for replica in self.all)
        return any(
            replica.ready
            and policy_id in replica.policies
            and not self._may_ask(replica, policy_id)
            and (replica.has_rested(policy_id) or not passes)
            for replica in self.all
        )

    async def on_every(self, act: Callable[[Replica], Awaitable[T]]) -> list[T]:
        """Act on all replicas at once and return the results of those that answer.

        Raises:
            EngineUnavailable: none answered.
            ReplicaAtFault: one refused an adapter that another took.
            KotaeError: the first other failure; all of them were tried.
        """
        done = await asyncio.gather(*(act(replica) for replica in self.all), return_exceptions=True)
        results = [outcome for outcome in done if not isinstance(outcome, BaseException)]
        absent: list[EngineUnavailable] = []
        for replica, outcome in zip(self.all, done, strict=True):
            if isinstance(outcome, EngineUnavailable):
                absent.append(outcome)
            elif isinstance(outcome, AdapterRefused) and results:
                raise ReplicaAtFault(
                    f"engine: one replica refuses what another took ({replica.url}: {outcome}); "
                    "give it the same base and adapters"
                ) from outcome
            elif isinstance(outcome, BaseException):
                raise outcome
        if not results:
            raise absent[0]
        return results

    async def health(self) -> Health:
        """Say how many replicas answer, what they can serve and what is wrong with the others; never raises."""
        checks = await asyncio.gather(*(self.check(replica) for replica in self.all))
        wrong = [detail for detail in checks if detail]
        well = len(checks) - len(wrong)
        return Health(
            ready=well > 0,
            detail="; ".join([f"{well} of {len(checks)} replicas answer", *wrong]),
            policies=frozenset(
                policy_id
                for replica in self.all
                for policy_id in replica.policies
                if replica.ready and self._may_ask(replica, policy_id)
            ),
        )

    async def check(self, replica: Replica) -> str:
        """Return what is wrong with a replica, or an empty text; remembers the outcome."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._found_well(replica)
        except (KotaeError, TimeoutError) as error:
            replica.ready = False
            return str(error) or f"engine: {replica.url} does not answer within {HEALTH_TIMEOUT_S:g} s"
        return ""

    async def listed(self, replica: Replica) -> dict[str, str | None]:
        """As `models`; one that had fallen out is asked how it is first, and is asked questions again from then on."""
        return await (self.models(replica) if replica.ready else self._found_well(replica))

    async def _found_well(self, replica: Replica) -> dict[str, str | None]:
        """Return what a healthy replica can serve; raises when it is not healthy."""
        response = await self.control(replica, "GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
        if response.status_code >= 400:
            raise EngineUnavailable(
                f"engine: {replica.url} is not well ({response.status_code}); see its log"
            )
        models = await self.models(replica)
        replica.ready = True
        return models

    async def models(self, replica: Replica) -> dict[str, str | None]:
        """Return what a replica can serve: our name of it → the path it was loaded from."""
        response = await self.control(replica, "GET", "/v1/models", timeout_s=HEALTH_TIMEOUT_S)
        await self.raise_for_status(replica, response)
        try:
            rows = response.json()["data"]
            bases = [row["id"] for row in rows if row.get("parent") is None]
            paths = {row["id"]: row.get("root") for row in rows if row.get("parent") is not None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineUnavailable(f"engine: {replica.url} is not vLLM; check the address") from error
        if not bases:
            raise EngineUnavailable(f"engine: {replica.url} lists no base model; check the address")
        replica.base = self._base_name if self._base_name in bases else bases[0]
        replica.policies = {self._base_name, *paths}
        replica.proven &= replica.policies  # what it has lost is loaded anew
        return {self._base_name: None, **paths}

    async def name_on(self, replica: Replica, policy_id: str) -> str:
        """Return what a replica calls a policy: a server run elsewhere has its own name for the base."""
        if policy_id != self._base_name:
            return policy_id
        if replica.base is None:
            await self.models(replica)
        return replica.base or self._base_name

    async def queues(self) -> list[Queue]:
        """Return how many answers each replica makes and holds waiting, by its own metrics; never raises."""
        return await asyncio.gather(*(self._queue(replica) for replica in self.all))

    async def _queue(self, replica: Replica) -> Queue:
        lengths = None
        if replica.ready:  # one that is known to be silent would only hold up the others' numbers
            with suppress(KotaeError):
                response = await self.send(replica, "GET", "/metrics", timeout_s=HEALTH_TIMEOUT_S)
                lengths = wire.queue_lengths(response.text)
        running, waiting = lengths or (None, None)
        return Queue(replica=replica.url, up=replica.ready, running=running, waiting=waiting)

    async def control(
        self,
        replica: Replica,
        method: str,
        path: str,
        *,
        json: Json | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """As `send`, for what is no question: whoever is too busy even for that is away, and is tried last from then on.

        Raises:
            EngineAbsent: it answers one of `AWAY`.
        """
        response = await self.send(replica, method, path, json=json, timeout_s=timeout_s)
        if response.status_code in AWAY:
            replica.forget()
            raise EngineAbsent(
                f"engine: {replica.url} is not well ({response.status_code}); see its log, or its proxy's"
            )
        return response

    async def send(
        self,
        replica: Replica,
        method: str,
        path: str,
        *,
        json: Json | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """Return the whole response to a request; raises what `lost` returns when the connection fails."""
        limit = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            return await self._client.request(method, replica.url + path, json=json, timeout=limit)
        except httpx.TransportError as error:
            raise self.lost(replica, error, begun=False) from error

    def lost(self, replica: Replica, error: httpx.TransportError, *, begun: bool) -> EngineError:
        """Return a failed connection as our error, and try this replica last from now on."""
        replica.forget()
        reason = str(error) or type(error).__name__
        if begun:
            return StreamBroken(f"stream: lost {replica.url} in mid-answer ({reason}); ask again")
        silent = f"engine: {replica.url} does not answer ({reason}); is it running?"
        is_absent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        return self._explain() or (EngineAbsent if is_absent else EngineUnavailable)(silent)

    async def raise_for_status(
        self, replica: Replica, response: httpx.Response, *, policy_id: str | None = None
    ) -> None:
        """Raise an error response as one of ours; `policy_id` is what was asked for, by default the base."""
        if response.status_code >= 400:
            await response.aread()
            error = wire.error_of_body(response.text)
            raise wire.translate(
                error,
                status=response.status_code,
                policy_id=policy_id or self._base_name,
                url=replica.url,
            )
