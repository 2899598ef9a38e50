"""Health for supervisors and load balancers, metrics for Prometheus."""

from __future__ import annotations

import asyncio
import ipaddress

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from assistant.canary_watch import last_judged
from assistant.engine.protocol import Health, Queue
from assistant.shadow_watch import last_evidence
from assistant.web.metrics import CONTENT_TYPE, Present, exposition
from assistant.web.services import Services
from assistant.web.sessions import Sessions, caller
from assistant.web.totals import Totals
from storage import tallies
from storage.errors import KotaeError

ENGINE_TIMEOUT_S = 5.0
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class HealthApi:
    """The routes /healthz, /readyz and /metrics."""

    def __init__(self, services: Services, sessions: Sessions) -> None:
        self.services = services
        self.sessions = sessions
        self.totals = Totals(services.store)

    def router(self) -> APIRouter:
        """Return the routes, to be included before the mounts."""
        router = APIRouter()
        for path, handler in (("/healthz", self.alive), ("/readyz", self.ready), ("/metrics", self.metrics)):
            router.add_api_route(path, handler, methods=["GET"], response_model=None)
        return router

    async def alive(self) -> JSONResponse:
        """Say whether this process lives and its data can be read; the engine has no part in it."""
        try:
            await asyncio.to_thread(tallies.answers, self.services.store)
        except KotaeError as error:
            return JSONResponse({"status": "failed", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> JSONResponse:
        """Say whether questions would be answered: each policy that may answer is in a server that is up."""
        reason = await self._reason_against()
        if reason:
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready", "policy": self.services.release.served.stable.policy_id})

    async def metrics(self, request: Request) -> Response:
        """Return the metrics: to this machine itself, else to operators."""
        if not is_local(request):
            caller(request, self.sessions, "operator")
        health, queues = await self._engine_health(), await self._queues()
        release = self.services.release
        present = Present(
            in_flight=dict(release.in_flight),
            refused=dict(self.services.chat.admission.refused),
            served=release.served,
            engine_up=health.ready,
            queues=queues,
            judged=await asyncio.to_thread(last_judged, self.services.store),
            shadow=await asyncio.to_thread(last_evidence, self.services.store),
        )
        text = await asyncio.to_thread(exposition, self.totals, present)
        return Response(text, media_type=CONTENT_TYPE)

    async def _reason_against(self) -> str:
        """Return why no question should come here now; "" when one may."""
        health = await self._engine_health()
        if not health.ready:
            return f"engine: {health.detail}"
        served = self.services.release.served
        answering = [row.policy_id for row in (served.stable, served.canary) if row is not None]
        missing = [policy_id for policy_id in answering if policy_id not in health.policies]
        return f"policy: {', '.join(missing)} is not loaded in the engine yet" if missing else ""

    async def _engine_health(self) -> Health:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                return await self.services.engine.health()
        except TimeoutError:
            return Health(ready=False, detail=f"no answer within {ENGINE_TIMEOUT_S:g} s")

    async def _queues(self) -> list[Queue]:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                return await self.services.engine.queues()
        except TimeoutError:
            return []


def is_local(request: Request) -> bool:
    """Tell whether a program on this machine asks for itself, and not a proxy on it for somebody."""
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
