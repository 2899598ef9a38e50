"""What Kotae adds to the engine it stands before, on real vLLM: throughput, time to the first token, memory over time.

Usage: python tests/benchmarks/serving.py [--people 16] [--seconds 20] [--rounds 3] [--probes 200] [--without-page]
           [--soak-min 30] [--shape qwen-0.5b] [--out FILE.json]

The same questions go to vLLM directly and through our API, alternating in one run; people on the page press Enter through
Gradio's own protocol, as a browser does. Ratios and differences are what counts: engine and gateway share the processors.
The gateway asks for several tokens a chunk (`assistant.engine.pace`), who asks the engine directly gets each by itself;
`--chunk-tokens` asks both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import tell, write
from shaped_models import make_shaped_model

from alignment.starter.customers import questions
from parity.material import SIZES
from running_server import Server
from storage import people as staff
from storage.store import Store

MAX_TOKENS = 64
WAYS = ("engine", "api", "page")
ANSWER = {
    "temperature": 0,
    "max_tokens": MAX_TOKENS,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@dataclass
class Seen:
    """What one way of asking brought."""

    tokens: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Tokens a second of each round."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")


async def lines_of(reply: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of a stream; httpx would also break them at rarer marks, which a random model's words hold."""
    rest = b""
    async for part in reply.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode().rstrip("\r")


@dataclass(frozen=True)
class Way:
    """An address that streams chat completions."""

    client: httpx.AsyncClient
    model: str
    extra: dict[str, object] = field(default_factory=dict)

    async def ask(self, question: str, seen: Seen) -> None:
        """Stream one answer and note its tokens and when the first came."""
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, **ANSWER, **self.extra}
        started, first = time.monotonic(), 0.0
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                seen.failures.append((await reply.aread()).decode()[:200])
                return
            async for line in lines_of(reply):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                told = any(choice["delta"].get("content") for choice in event.get("choices", ()))
                if told and not first:
                    first = time.monotonic() - started
                    seen.first_token_s.append(first)
                seen.tokens += (event.get("usage") or {}).get("completion_tokens", 0)


async def crowd(
    ask: Callable[[str, Seen], Awaitable[None]], seen: Seen, *, people: int, seconds: float, texts: list[str]
) -> None:
    """Let so many people ask one question after the other for so long.

    They come within the first second: all at once they would wait for each other as they never do later.
    """
    numbers, ends = count(), time.monotonic() + seconds

    async def one(place: int) -> None:
        await asyncio.sleep(place / people)
        while time.monotonic() < ends:
            await ask(texts[next(numbers) % len(texts)], seen)

    started, tokens = time.monotonic(), seen.tokens
    await asyncio.gather(*(one(place) for place in range(people)))
    took = time.monotonic() - started
    seen.seconds += took
    seen.rates.append((seen.tokens - tokens) / took)


class Tab:
    """A browser tab that stays open on the chat page, by Gradio's protocol: one event asks, a second streams the answer,
    a third lists the conversations anew."""

    def __init__(self, client: httpx.AsyncClient, config: dict[str, object]) -> None:
        self.client, self.session = client, secrets.token_hex(6)
        by_name = {one["api_name"]: one for one in config["dependencies"]}  # type: ignore[attr-defined, union-attr]
        self.new_event, self.ask_event, self.stream_event, self.list_event = (
            by_name[name] for name in ("open_new", "ask", "stream", "refresh_list")
        )

    async def ask(self, question: str, seen: Seen) -> None:
        """Press "New conversation" (before the clock starts) and Enter; wait for the first words, then for the end.

        In one conversation each question would carry the whole dialogue so far, unlike those that the engine is asked.
        """
        if not await self._quick(self.new_event, [], seen):
            return
        started = time.monotonic()
        if not await self._quick(self.ask_event, [None, question], seen):
            return
        await self._send("/gradio_api/queue/join", self.stream_event, [None])
        await self._see_answer(seen, started)
        await self._quick(self.list_event, [None, ""], seen)

    async def _see_answer(self, seen: Seen, started: float) -> None:
        first = False
        url = f"/gradio_api/queue/data?session_hash={self.session}"
        async with self.client.stream("GET", url) as events:
            async for line in lines_of(events):
                event = json.loads(line[6:]) if line.startswith("data: ") else {}
                if event.get("msg") == "process_generating" and not first:
                    first = True
                    seen.first_token_s.append(time.monotonic() - started)
                if event.get("msg") == "process_completed":
                    if not event["success"]:
                        seen.failures.append(str(event["output"])[:200])
                    return

    async def _quick(self, event: dict[str, object], data: list[object], seen: Seen) -> bool:
        """Send an event that is answered at once and return whether it was."""
        reply = await self._send("/gradio_api/run/predict", event, data)
        if reply.status_code != 200:
            seen.failures.append(reply.text[:200])
        return reply.status_code == 200

    async def _send(self, path: str, event: dict[str, object], data: list[object]) -> httpx.Response:
        body = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": None}
        return await self.client.post(path, json=body)


def quantile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies; nan without values."""
    return float(np.quantile(values, share)) if values else float("nan")


def ratio_interval(rates: list[float], others: list[float], *, resamples: int = 10_000) -> list[float]:
    """Return the 95% interval of the ratio of two ways' rates, over rounds that were drawn anew (paired bootstrap)."""
    pairs = np.array([rates, others])
    drawn = np.random.default_rng(0).integers(len(rates), size=(resamples, len(rates)))
    sums = pairs[:, drawn].sum(axis=2)  # (2, resamples): rounds last about equally long
    return np.quantile(sums[0] / sums[1], (0.025, 0.975)).tolist()


@asynccontextmanager
async def ways(server: Server, *, chunk_tokens: int = 1) -> AsyncIterator[tuple[Way, Way]]:
    """Yield the engine itself, asked for so many tokens a chunk, and our API before it."""
    words = psutil.Process(json.loads((server.data / "vllm.pid.json").read_text())["pid"]).cmdline()
    engine_url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    limits = httpx.Limits(max_connections=None)
    token = {"Authorization": f"Bearer {server.token('staff')}"}
    async with (
        httpx.AsyncClient(base_url=engine_url, timeout=300, limits=limits) as engine,
        httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, headers=token) as api,
    ):
        models = (await engine.get("/v1/models")).json()["data"]
        yield Way(engine, models[0]["id"], {"stream_interval": chunk_tokens}), Way(api, "kotae")


@asynccontextmanager
async def tabs(server: Server, people: int) -> AsyncIterator[list[Tab]]:
    """Yield so many tabs of one signed-in person."""
    async with httpx.AsyncClient(
        base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as client:
        password = secrets.token_urlsafe(12)
        with closing(Store(server.data)) as store:
            person = staff.person_named(store, "reader") or staff.add_person(
                store, name="reader", role="staff", actor="system"
            )
            staff.set_password(store, person.id, password=password, actor="system")
        reply = await client.post("/login", data={"name": person.name, "password": password})
        assert reply.status_code == 303, reply.text
        config = (await client.get("/config")).json()
        yield [Tab(client, config) for _ in range(people)]


async def measure(
    server: Server,
    *,
    people: int,
    seconds: float,
    rounds: int,
    chunk_tokens: int,
    probes: int,
    names: list[str],
    out: Path | None,
) -> dict[str, object]:
    """Run the comparisons, each way in turn; what there is after a round is written at once."""
    texts = [question.text for question in questions(400, seed=7)]
    alone = {"engine": Seen(), "api": Seen()}
    busy = {"engine": Seen(), "api": Seen(), "page": Seen()}
    async with ways(server, chunk_tokens=chunk_tokens) as (engine, api), tabs(server, people) as opened:
        by_name = {"engine": engine, "api": api}
        for number in range(probes):  # one after the other, by turns; the first ones warm up
            for name in ("engine", "api") if number % 2 else ("api", "engine"):
                await by_name[name].ask(texts[number % len(texts)], Seen() if number < 8 else alone[name])
        free = asyncio.Queue[Tab]()
        for tab in opened:
            free.put_nowait(tab)

        async def on_the_page(question: str, seen: Seen) -> None:
            tab = await free.get()
            await tab.ask(question, seen)
            free.put_nowait(tab)

        asks = {"engine": engine.ask, "api": api.ask, "page": on_the_page}
        asks = {name: ask for name, ask in asks.items() if name in names}
        found: dict[str, object] = {}
        for number in range(rounds):
            for name, ask in asks.items() if number % 2 == 0 else reversed(asks.items()):
                await crowd(ask, busy[name], people=people, seconds=seconds, texts=texts)
                print(f"  round {number + 1} of {rounds}: {name}", flush=True)
            found = {
                **report(alone, busy),
                "people": people,
                "rounds": number + 1,
                "seconds": seconds,
            }
            if out:
                write(found, out)
    return found


def report(alone: dict[str, Seen], busy: dict[str, Seen]) -> dict[str, object]:
    """Return ratios and differences, the throughput's with its interval: single rounds differ by several percent."""
    failures = [text for seen in (*alone.values(), *busy.values()) for text in seen.failures]
    first = {name: seen.first_token_s for name, seen in busy.items()}
    return {
        "failures": len(failures),
        "first_failures": failures[:3],
        "engine_tokens_per_s": busy["engine"].tokens_per_s,
        "api_tokens_per_s": busy["api"].tokens_per_s,
        "throughput_ratio": busy["api"].tokens_per_s / busy["engine"].tokens_per_s,
        "throughput_ratio_95": ratio_interval(busy["api"].rates, busy["engine"].rates),
        "tokens_per_s_by_round": {name: seen.rates for name, seen in busy.items()},
        "alone_engine_first_token_p50_ms": 1e3 * quantile(alone["engine"].first_token_s, 0.5),
        "gateway_adds_p50_ms": 1e3
        * (quantile(alone["api"].first_token_s, 0.5) - quantile(alone["engine"].first_token_s, 0.5)),
        "busy_engine_first_token_p95_ms": 1e3 * quantile(first["engine"], 0.95),
        "busy_api_first_token_p95_ms": 1e3 * quantile(first["api"], 0.95),
        "busy_page_first_token_p95_ms": 1e3 * quantile(first["page"], 0.95),
        "page_adds_p95_ms": 1e3 * (quantile(first["page"], 0.95) - quantile(first["engine"], 0.95)),
        "answers": {name: len(times) for name, times in first.items()},
    }


async def soak(server: Server, *, minutes: float, people: int) -> dict[str, object]:
    """Use API and page for a while and return the web process's memory at the start of each tenth, MiB."""
    texts = [question.text for question in questions(400, seed=8)]
    assert server.process is not None
    process, memory = psutil.Process(server.process.pid), []
    async with ways(server) as (_, api), tabs(server, people) as opened:
        for _ in range(10):
            await crowd(api.ask, Seen(), people=people, seconds=minutes * 3, texts=texts)
            asking = [
                crowd(tab.ask, Seen(), people=1, seconds=minutes * 3, texts=texts[number:])
                for number, tab in enumerate(opened)
            ]
            await asyncio.gather(*asking)
            memory.append(process.memory_info().rss / 2**20)
            print(f"  soak: {memory[-1]:.0f} MiB", flush=True)
    return {
        "soak_min": minutes,
        "soak_memory_mib": memory,
        "soak_growth_after_first_fifth": memory[-1] / memory[1] - 1,
    }


def main() -> None:
    """Measure and print; write the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=16, help="who ask at once (16)")
    parser.add_argument("--seconds", type=float, default=20, help="of each way in a round (20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-page", action="store_true", help="engine and API alone")
    parser.add_argument(
        "--probes", type=int, default=200, help="questions one by one, for what the gateway adds (200)"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=1, help="tokens a chunk that the engine itself is asked for (1)"
    )
    parser.add_argument(
        "--soak-min", type=float, default=0, help="minutes of steady use, for the memory (0: none)"
    )
    parser.add_argument("--shape", choices=SIZES, help="of a random model instead of the starter")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_shaped_model(Path(folder) / "model", options.shape) if options.shape else None
        server = Server(Path(folder) / "data", arguments=("--model", str(model)) if model else ()).start()
        try:
            found = asyncio.run(
                measure(
                    server,
                    people=options.people,
                    seconds=options.seconds,
                    rounds=options.rounds,
                    chunk_tokens=options.chunk_tokens,
                    probes=options.probes,
                    names=["engine", "api"] if options.without_page else list(WAYS),
                    out=options.out,
                )
            )
            if options.soak_min:
                found |= asyncio.run(soak(server, minutes=options.soak_min, people=options.people))
        finally:
            server.stop()
    tell(found, options.out)


if __name__ == "__main__":
    main()
