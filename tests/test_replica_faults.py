"""Replicas that misbehave beside one that is well: what they hold up, which is nothing, and when they are asked again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from assistant.engine.vllm import VllmEngine
from assistant.release import Release
from chat_fixtures import add_random_candidate, make_real_desk
from engine_fixtures import collect, text_of
from storage.records import Json, Policy
from storage_fixtures import World

ONE, TWO = "http://one", "http://two"


class Twin:
    """One of two fake vLLM servers, which loads, lists and answers as vLLM does, unless it is told to misbehave."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.adapters: dict[str, str] = {}
        self.status = 200
        """Of every answer."""
        self.load_status = 200
        self.ignores_adapters = False
        """Takes adapters and answers with the base all the same."""
        self.asked: list[str] = []
        """Which policies were asked questions, probes left out."""
        self.probed: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.status != 200:
            return httpx.Response(self.status, text="<html>no server is available</html>")
        body: Json = json.loads(request.content) if request.content else {}
        if request.url.path == "/v1/models":
            rows = [{"id": name, "parent": self.base, "root": path} for name, path in self.adapters.items()]
            return httpx.Response(200, json={"data": [{"id": self.base, "parent": None}, *rows]})
        if request.url.path == "/v1/load_lora_adapter":
            return self._load(body)
        if request.url.path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"], None)
        if request.url.path == "/v1/chat/completions":
            return self._answer(body["model"], is_probe="logprobs" in body)
        return httpx.Response(200)

    def restart(self) -> None:
        self.adapters.clear()

    def _load(self, body: Json) -> httpx.Response:
        if self.load_status != 200:
            return httpx.Response(self.load_status, json={"error": {"message": "CUDA out of memory"}})
        if body["lora_name"] in self.adapters:
            return httpx.Response(400, json={"error": {"message": "has already been loaded"}})
        self.adapters[body["lora_name"]] = body["lora_path"]
        return httpx.Response(200)

    def _answer(self, policy_id: str, *, is_probe: bool) -> httpx.Response:
        if policy_id not in {self.base, *self.adapters}:
            return httpx.Response(
                404, json={"error": {"message": f"The model `{policy_id}` does not exist."}}
            )
        (self.probed if is_probe else self.asked).append(policy_id)
        path = "" if self.ignores_adapters else self.adapters.get(policy_id, "")
        choice: Json = {"token_ids": [5], "finish_reason": "stop"}
        if is_probe:
            logprob = -1.0 - len(path)
            choice |= {"message": {"content": "Hi"}, "logprobs": {"content": [{"logprob": logprob}]}}
            return httpx.Response(200, json={"model": policy_id, "choices": [choice]})
        event = {"model": policy_id, "choices": [{**choice, "delta": {"content": path or "base"}}]}
        event["prompt_token_ids"] = [1]
        return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")


class Pair:
    """Two servers, the engine before them, and what is decided about policies."""

    def __init__(self, folder: Path) -> None:
        self.desk = make_real_desk(folder)
        self.world: World = self.desk.world
        self.one, self.two = (Twin(self.world.base.id) for _ in range(2))
        self.twins = {"one": self.one, "two": self.two}
        self.start()

    def start(self) -> None:
        """Begin a new process before the servers as they are."""
        self.engine = VllmEngine(
            [ONE, TWO], base_name=self.world.base.id, transport=httpx.MockTransport(self._send)
        )
        self.release = Release(self.world.store, self.engine)

    def _send(self, request: httpx.Request) -> httpx.Response:
        return self.twins[str(request.url.host)](request)

    def approve(self, policy: Policy) -> None:
        asyncio.run(self.release.approve(policy_id=policy.id, person=self.world.admin, reason="better"))

    def sync(self) -> None:
        asyncio.run(self.release.sync())

    def ask(self, policy: Policy) -> str:
        """Return what `policy` says, straight from the engine."""
        return text_of(asyncio.run(collect(self.engine, policy.id, "Hello?")))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def policy(pair: Pair, tmp_path: Path) -> Policy:
    return add_random_candidate(pair.world, tmp_path, seed=1)


# -- one that is away behind its proxy ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_replica_whose_proxy_answers_for_it_holds_nothing_up(
    pair: Pair, policy: Policy, status: int
) -> None:
    pair.one.status = status
    pair.sync()
    pair.approve(policy)
    assert pair.release.served.stable.policy_id == policy.id
    pair.two.restart()
    pair.sync()
    assert pair.ask(policy) == str(policy.adapter_path)
    asked = len(pair.two.asked)
    pair.one.status = 200
    pair.sync()  # it is back, and gets what it missed
    assert pair.one.adapters == pair.two.adapters
    pair.ask(policy)
    assert (pair.one.asked, len(pair.two.asked)) == ([policy.id], asked)
