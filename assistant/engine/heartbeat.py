"""Whether a vLLM server still computes: its HTTP side and its engine are processes of their own.

`/health` says that the engine has not failed; one that waits for a lock or a GPU for ever has not. So its counters of tokens
are watched, and where they stand still the engine is asked for one token.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

import httpx

ASK_AFTER_S = 30.0
"""A server that counted no token for this long is asked for one."""
STUCK_S = 300.0
"""One that neither gave it nor counted another for this long is stuck. A single step may take long: a large model reads
thousands of tokens of prompts in one."""


def tokens_counted(metrics: str) -> float | None:
    """Return how many tokens a server has read and written, from vLLM's Prometheus text; None where it does not say."""
    row = r"^vllm:(?:prompt|generation)_tokens_total\{[^}]*\} ([0-9.e+]+)$"
    found = re.findall(row, metrics, re.MULTILINE)
    return sum(map(float, found)) if found else None


class Heartbeat:
    """Whether a server still computes, as far as it shows."""

    def __init__(self, url: str, model: str) -> None:
        """Watch the server at `url`, which serves its base as `model`."""
        self._url, self._model = url, model
        self._tokens: float | None = None
        self._counted_at = time.monotonic()
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def stuck(self) -> bool:
        """Whether it has owed a token for too long, and counted none meanwhile."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > STUCK_S

    async def look(self, client: httpx.AsyncClient) -> None:
        """Read the counters; ask for a token if they have stood still."""
        try:
            tokens = tokens_counted((await client.get(f"{self._url}/metrics")).text)
        except httpx.TransportError:
            return  # whether it answers at all is `/health`'s to say
        if tokens is None or tokens != self._tokens:
            self._tokens = tokens
            self._show()
        elif self._asked_at is None and time.monotonic() - self._counted_at > ASK_AFTER_S:
            self._asked_at = time.monotonic()
            await self.stop()
            self._asking = asyncio.create_task(self._ask(client), name="vllm-heartbeat")

    async def stop(self) -> None:
        """Wait for no answer any longer."""
        if self._asking is not None:
            self._asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._asking

    async def _ask(self, client: httpx.AsyncClient) -> None:
        """Ask the base for one token; any answer shows that it computes."""
        body = {"model": self._model, "prompt": [1], "max_tokens": 1}
        with contextlib.suppress(httpx.TransportError):
            await client.post(f"{self._url}/v1/completions", json=body, timeout=STUCK_S)
            self._show()

    def _show(self) -> None:
        self._counted_at, self._asked_at = time.monotonic(), None
