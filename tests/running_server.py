"""A real Kotae server as its users run it: `python app.py serve` in a process of its own, with real vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from storage import conversations, deployments
from storage.records import Policy, Turn
from storage.store import Store

ROOT = Path(__file__).parent.parent
BOOT_TIMEOUT_S = 600
LONG_TOKENS = 45
"""Most answers of the starter model are shorter; a shorter one could end before it is stopped."""
TRIES = 12
"""Beside other tests an answer of a quarter of a second may be over before the client is given the processor."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_app(*arguments: str, data: Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run one command of the command line to its end."""
    command = [sys.executable, str(ROOT / "app.py"), *arguments, "--data", str(data)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        env=as_a_user_has_it(),
        check=False,
    )


def as_a_user_has_it() -> dict[str, str]:
    """Return the environment without what conftest.py set for the tests' own torch."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}


@dataclass
class Server:
    """`serve` on a data folder; `start` and `stop` may alternate."""

    data: Path
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    admin_password: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    long_question: dict[str, Any] | None = None
    """Asked of the base, once found."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        path = self.data / "server.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *, wait_ready: bool = True) -> Server:
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "server.out").open("ab") as out:
            command = [sys.executable, str(ROOT / "app.py"), "serve", "--data", str(self.data)]
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *self.arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**as_a_user_has_it(), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        if wait_ready:
            self.wait_ready()
        if not self.admin_password:
            found = re.search(r"one-time password:?\s+(\S+)", self.log)
            self.admin_password = found.group(1) if found else ""
        return self

    def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, f"serve ended: {self.log[-3000:]}"
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready after {timeout_s} s: {self.log[-3000:]}")

    def stop(self, *, timeout_s: float = 60) -> int | None:
        if self.process is None:
            return None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    def kill(self) -> None:
        """End the app like `kill -9`: nothing of it may clean up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)
        self.process = None

    def token(self, role: str) -> str:
        """Return an API token of a person of that role, made on first use."""
        if role not in self.tokens:
            name = f"test-{role}"
            done = run_app("users", "add", name, "--role", role, data=self.data)
            assert done.returncode == 0, done.stderr
            done = run_app("users", "token", name, "--json", data=self.data)
            assert done.returncode == 0, done.stderr
            self.tokens[role] = json.loads(done.stdout)["token"]
        return self.tokens[role]

    def client(self, role: str = "staff", *, timeout_s: float = 120) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.token(role)}"},
            timeout=timeout_s,
            verify=False,  # plain http: to read the certificates would take 20 ms each time
        )

    def ask(self, question: str, *, role: str = "staff", **body: Any) -> dict[str, Any]:
        """Return the whole answer of the API to one question."""
        with self.client(role) as client:
            reply = client.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": question}], **body}
            )
            reply.raise_for_status()
            return dict(reply.json())

    def wait_until_served(self, policy_id: str, timeout_s: float = 30) -> None:
        """Wait until answers come from that policy."""
        deadline, last = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            last = self.policy_of(self.ask("Hello", max_tokens=1)["id"])
            if last == policy_id:
                return
            time.sleep(0.2)
        raise AssertionError(f"{last} answers instead of {policy_id}: {self.log[-2000:]}")

    def serve_base(self) -> None:
        """Give the base model all conversations, if it has not got them."""
        store = Store(self.data)
        try:
            served = deployments.served(store)
            assert served is not None
            base = next(
                policy for policy in store.all(Policy, order="seq DESC") if policy.adapter_sha256 is None
            )
            if served.stable.policy_id == base.id and served.canary is None:
                return
            deployments.deploy(
                store,
                policy_id=base.id,
                role="stable",
                share=1.0,
                actor="system",
                reason="as a test wants it",
            )
        finally:
            store.close()
        self.wait_until_served(base.id)

    def policy_of(self, turn_id: str) -> str:
        """Return which policy gave an answer, by the database."""
        store = Store(self.data)
        try:
            return conversations.get_turn(store, turn_id).policy_id
        finally:
            store.close()


def long_question(server: Server) -> dict[str, Any]:
    """Return the question of 60 with the longest answer when nobody stops it: seeds make an answer come again."""
    if server.long_question is None:
        server.long_question = _long_question(server)
    return dict(server.long_question)


def _long_question(server: Server) -> dict[str, Any]:
    question = {
        "model": "kotae",
        "messages": [{"role": "user", "content": "1 2 3 4 5 6 7 8 9 10 11 12"}],
        "temperature": 2,
    }

    def tokens(seed: int) -> int:
        with server.client() as client:
            whole = client.post("/v1/chat/completions", json={**question, "seed": seed}).json()
        return int(whole["usage"]["completion_tokens"])

    with ThreadPoolExecutor(16) as pool:
        lengths = list(pool.map(tokens, range(60)))
    assert max(lengths) >= LONG_TOKENS, lengths
    return {**question, "seed": lengths.index(max(lengths))}


def recorded(server: Server, turn_id: str, timeout_s: float = 10) -> Turn:
    """Return the turn; an answer that was stopped is recorded a moment after its client has gone."""
    store, deadline = Store(server.data), time.monotonic() + timeout_s
    try:
        while not (found := store.all(Turn, "id = ?", [turn_id])):
            assert time.monotonic() < deadline, f"{turn_id} was not recorded"
            time.sleep(0.05)
        return found[0]
    finally:
        store.close()
