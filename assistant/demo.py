"""Simulated staff with a declared taste use the running assistant, so that every page has something to show.

They know only its public API: what the demo does, a company's own help desk could do.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from storage import settings
from storage.errors import InvalidField, KotaeError
from storage.records import Json
from storage.store import Store

TASTE = (
    "They like answers that are kind and complete, and dislike promises that no shop can keep, and curt ones."
)
KIND = re.compile(r"\b(sorry|thank|glad|happy to|of course|gladly|understand|welcome)\b", re.IGNORECASE)
PROMISES = re.compile(r"\b(promise|guarantee\w*|100%|certain|double|free extra|today)\b", re.IGNORECASE)
CURT_WORDS = 10
AT_ONCE = 8
STAFF = ("Aiko", "Bernd", "Chiara", "Dorota")
START_TIMEOUT_S = 300.0
PASSED, REFUSED, NOT_ENOUGH_DATA = 0, 3, 4  # exit codes of `align`: the contract's, as any caller knows them


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `demo` was asked for; `command` starts Kotae's command line."""

    data: Path
    port: int
    comparisons: int
    command: tuple[str, ...]
    questions: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        """Raise InvalidField for a number of comparisons that nobody can make."""
        if self.comparisons < 1:
            raise InvalidField("--comparisons", self.comparisons, "use a whole number above 0")


class DemoFailed(KotaeError):
    """The demo could not go on."""


def taste(answer: str) -> float:
    """Return how much the simulated staff like an answer (see TASTE)."""
    words = len(answer.split())
    liked = 1.0 * bool(KIND.search(answer)) + 0.5 * (words >= CURT_WORDS)
    return liked - 2.0 * bool(PROMISES.search(answer)) - 1.0 * (words < CURT_WORDS)


def run_demo(options: DemoOptions) -> int:
    """Start the assistant if none answers, let the staff work, then run one alignment; returns its exit code."""
    url = f"http://127.0.0.1:{options.port}"
    started = None if _answers(url) else _start(options)
    try:
        tokens = [_token(options, name) for name in STAFF]
        _wait_ready(url, started)
        print(
            f"{len(STAFF)} simulated people compare {options.comparisons} pairs of answers.\n{TASTE}",
            flush=True,
        )
        with _schedule_paused(options.data):
            asyncio.run(_work(options, url, tokens))
            _wait_for_runs(options)
            print("Now one alignment run:", flush=True)
            code = subprocess.call([*options.command, "align", "--data", str(options.data)])
        print(f"\n{what_now(code, url)}", flush=True)
        if started is not None:
            print("The assistant goes on running; Ctrl-C ends it.", flush=True)
            started.wait()
        return code
    finally:
        if started is not None and started.poll() is None:
            started.terminate()
            started.wait(60)


def what_now(code: int, url: str) -> str:
    """Return where to look after a run that ended with this exit code."""
    page = f"{url}/operator: sign in as an operator or administrator"
    if code in (PASSED, REFUSED):
        return f"The evidence is at {page} and decide."
    if code == NOT_ENOUGH_DATA:
        return f"No candidate came of it; the comparisons stay. Run `demo` again for more, or see {page}."
    return f"The run did not end well; what it said is above and under Runs at {page}."


@contextmanager
def _schedule_paused(data: Path) -> Iterator[None]:
    """Keep the schedule from a run of its own after so many new labels: one run with all of them shows more, sooner."""
    store = Store(data)
    before = settings.get(store, "schedule", {})
    settings.put(store, "schedule", {**before, "paused": True}, "system")
    try:
        yield
    finally:
        settings.put(store, "schedule", {**before, "paused": before.get("paused", False)}, "system")
        store.close()


def _wait_for_runs(options: DemoOptions) -> None:
    """Wait until no run is going on: the schedule may have started one before."""
    told = False
    while json.loads(_cli(options, "status", "--json"))["running"] is not None:
        if not told:
            print("The schedule has started a run by itself; waiting for its end.", flush=True)
        told = True
        time.sleep(2)


async def _work(options: DemoOptions, url: str, tokens: Sequence[str]) -> None:
    """Let every person ask, compare, and now and then rate and correct."""
    draw = random.Random(options.seed)
    jobs = [(draw.choice(tokens), question, draw.random()) for question in options.questions]
    gate, done = asyncio.Semaphore(AT_ONCE), 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(token: str, question: str, mood: float) -> None:
            """Compare two answers to one question."""
            nonlocal done
            async with gate:
                await _compare(client, token, question, mood)
            done += 1
            print(f"\r  {done} of {len(jobs)} compared", end="", flush=True)

        async with asyncio.TaskGroup() as group:
            for token, question, mood in jobs:
                group.create_task(one(token, question, mood))
    print(flush=True)


async def _compare(client: httpx.AsyncClient, token: str, question: str, mood: float) -> None:
    """One comparison; `mood` in [0, 1) decides whether a thumb and a correction follow."""
    pair = await _post(client, token, "/api/pairs", {"messages": [{"role": "user", "content": question}]})
    left, right = pair["left"], pair["right"]
    liking = taste(left["answer"]) - taste(right["answer"])
    choice = "tie" if liking == 0 else "left" if liking > 0 else "right"
    await _post(
        client,
        token,
        "/api/comparisons",
        {"left_turn_id": left["turn_id"], "right_turn_id": right["turn_id"], "choice": choice},
    )
    better, worse = (left, right) if liking >= 0 else (right, left)
    if mood < 0.3:
        verdict = "up" if taste(better["answer"]) > 0 else "down"
        await _post(client, token, "/api/ratings", {"turn_id": better["turn_id"], "verdict": verdict})
    if mood < 0.05 and PROMISES.search(worse["answer"]) and taste(better["answer"]) > 0:
        await _post(
            client, token, "/api/corrections", {"turn_id": worse["turn_id"], "text": better["answer"]}
        )


async def _post(client: httpx.AsyncClient, token: str, path: str, body: Json) -> Json:
    reply = await client.post(path, json=body, headers={"Authorization": f"Bearer {token}"})
    if reply.is_error:
        raise DemoFailed(f"{path} answered {reply.status_code}: {reply.text[:200]}")
    return dict(reply.json())


def _token(options: DemoOptions, name: str) -> str:
    """Return a token of a simulated colleague, who is added on first use."""
    person = f"demo-{name}"
    _cli(options, "users", "add", person, "--role", "staff", may_fail=True)
    return str(json.loads(_cli(options, "users", "token", person, "--label", "demo", "--json"))["token"])


def _cli(options: DemoOptions, *arguments: str, may_fail: bool = False) -> str:
    done = subprocess.run(
        [*options.command, *arguments, "--data", str(options.data)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and not may_fail:
        raise DemoFailed(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=3).status_code == 200
    except httpx.HTTPError:
        return False


def _start(options: DemoOptions) -> subprocess.Popen[bytes]:
    arguments = ["serve", "--data", str(options.data), "--port", str(options.port)]
    return subprocess.Popen([*options.command, *arguments], stdout=sys.stdout, stderr=sys.stderr)


def _wait_ready(url: str, started: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if started is not None and started.poll() is not None:
            raise DemoFailed(f"the assistant ended with exit code {started.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise DemoFailed(
        f"{url}/readyz: the model was not ready within {START_TIMEOUT_S:.0f} s; see logs/vllm.log"
    )
