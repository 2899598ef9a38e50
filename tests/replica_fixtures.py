"""Two fake vLLM servers behind one engine, and what is decided about policies there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import httpx

from assistant.chat import Chat
from assistant.engine.errors import EngineError
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
        self.is_down = False
        """Nobody listens at its address."""
        self.load_status = 200
        self.is_full = False
        """Turns questions and probes away."""
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
        if request.url.path == "/v1/chat/completions" and self.is_full:
            return httpx.Response(503, json={"error": {"message": "The queue is full."}})
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

    def start(self, urls: Sequence[str] = (ONE, TWO)) -> None:
        """Begin a new process before the servers as they are."""
        self.engine = VllmEngine(
            urls, base_name=self.world.base.id, transport=httpx.MockTransport(self._send)
        )
        self.release = Release(self.world.store, self.engine)

    def _send(self, request: httpx.Request) -> httpx.Response:
        twin = self.twins[str(request.url.host)]
        if twin.is_down:
            raise httpx.ConnectError("refused", request=request)
        return twin(request)

    def add_candidate(self, folder: Path, *, seed: int = 1) -> Policy:
        return add_random_candidate(self.world, folder, seed=seed)

    def approve(self, policy: Policy, **share: float) -> None:
        asyncio.run(
            self.release.approve(policy_id=policy.id, person=self.world.admin, reason="better", **share)
        )

    def sync(self) -> None:
        asyncio.run(self.release.sync())

    def ask(self, policy: Policy) -> str:
        """Return what `policy` says, straight from the engine."""
        return text_of(asyncio.run(collect(self.engine, policy.id, "Hello?")))

    def chat(self, questions: int) -> tuple[list[str], list[EngineError]]:
        """Ask in as many conversations of their own; return which policies answered, and the errors."""

        async def ask_all() -> tuple[list[str], list[EngineError]]:
            chat, by, errors = Chat(self.world.store, self.engine, self.release), [], []
            for _ in range(questions):
                conversation = chat.conversation_for(self.world.staff, None)
                try:
                    turn = await chat.complete(chat.ask(self.world.staff, conversation, "Hello?"))
                except EngineError as error:
                    errors.append(error)
                else:
                    by.append(turn.policy_id)
            await chat.stop()
            return by, errors

        return asyncio.run(ask_all())


def lose_adapters(pair: Pair, *, load_status: int) -> None:
    for twin in (pair.one, pair.two):
        twin.restart()
        twin.load_status = load_status
