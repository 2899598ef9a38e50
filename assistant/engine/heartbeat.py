"""Whether a vLLM server still computes: its HTTP side and its engine are processes of their own.

`/health` says that the engine has not failed; one that waits for a lock or a GPU for ever has not. So its counters of tokens
are watched, and where they stand still the engine is asked for one token.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

import httpx

log = logging.getLogger("kotae.engine")

ASK_AFTER_S = 30.0
"""A server that showed nothing for this long is asked for a token."""
STUCK_S = 300.0
"""One that neither gave it nor showed anything for this long is stuck. Long prompts take many steps, before whose end no
token is counted; the memory that they take is."""


def signs_of_life(metrics: str) -> tuple[str, ...]:
    """Return, from vLLM's Prometheus text, what changes while it computes: tokens read and written, and memory in use.

    Nothing where it does not say.
    """
    row = r"^vllm:(?:prompt_tokens_total|generation_tokens_total|kv_cache_usage_perc)\{[^}]*\} ([0-9.e+-]+)$"
    return tuple(re.findall(row, metrics, re.MULTILINE))


class Heartbeat:
    """Whether a server still computes, as far as it shows."""

    def __init__(self, url: str, model: str) -> None:
        """Watch the server at `url`, which serves its base as `model`."""
        self._url, self._model = url, model
        self._signs: tuple[str, ...] = ()
        self.well_at = time.monotonic()
        """When it last showed that it computes."""
        self._quiet_since = self.well_at
        """The same, or when a question to it was lost: it is asked again some time after that."""
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def stuck(self) -> bool:
        """Whether it has owed a token for too long, and showed nothing meanwhile."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > STUCK_S

    async def look(self, client: httpx.AsyncClient) -> None:
        """Read the counters; ask for a token if they have stood still."""
        try:
            signs = signs_of_life((await client.get(f"{self._url}/metrics")).text)
        except httpx.HTTPError:
            return  # whether it answers at all is `/health`'s to say
        if not signs or signs != self._signs:
            self._signs = signs
            self._show()
        elif self._asked_at is None and time.monotonic() - self._quiet_since > ASK_AFTER_S:
            await self.stop()
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask(client), name="vllm-heartbeat")

    async def stop(self) -> None:
        """Wait for no answer any longer."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})  # a cancellation of whoever waits here stays one

    async def _ask(self, client: httpx.AsyncClient) -> None:
        """Ask the base for one token. Only an engine that is silent owes it: what was lost or refused says nothing of it."""
        body = {"model": self._model, "prompt": [1], "max_tokens": 1}
        try:
            reply = await client.post(f"{self._url}/v1/completions", json=body, timeout=STUCK_S)
        except httpx.ReadTimeout:
            return
        except httpx.HTTPError as error:
            log.info("the engine could not be asked for a token: %r", error)
            self._quiet_since, self._asked_at = time.monotonic(), None
        else:
            if reply.status_code != 200:
                log.warning("the engine refused to give a token: %s", reply.text[:300])
            self._show()

    def _show(self) -> None:
        self.well_at = self._quiet_since = time.monotonic()
        self._asked_at = None
