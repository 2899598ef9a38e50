"""Rollouts from a server: what is asked of it, and which of its failures are named.

The same against a real vLLM server is in `test_engine_contract.py`, which has one running.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from alignment.rollout_server import RolloutsFailed, ServedRollouts
from alignment.rollouts import Rollout
from learning_fixtures import base_with_policy
from storage.errors import InvalidField

PROMPTS = [(11, 12, 13), (14, 15), (16, 17, 18, 19)]


class FakeServer:
    """Speaks as much of vLLM's API as rollouts need."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.asked: list[dict] = []
        self.answer: dict = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}}

    def handle(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/v1/load_lora_adapter":
            assert Path(body["lora_path"], "adapter_model.safetensors").is_file()
            self.adapters.append(body["lora_name"])
            return httpx.Response(200, text="Success")
        if request.url.path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
            return httpx.Response(200, text="Success")
        self.asked.append(body)
        if body["model"] not in self.adapters:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        return httpx.Response(200, json={"choices": [self.answer]})


def test_a_server_gets_each_policy_under_a_new_name_and_every_answer_its_own_seed(
    model: Path, tmp_path: Path
) -> None:
    base = base_with_policy(model)
    base.stop_ids = frozenset({2})
    server = FakeServer()
    transport = httpx.MockTransport(server.handle)
    served = ServedRollouts("http://rollouts", folder=tmp_path, name="run-1", transport=transport)
    for step in range(2):
        found = served.sample(base, PROMPTS, temperature=1.0, max_new_tokens=8, seed=5, step=step)
        assert found == [Rollout(token_ids=(7, 2), finish_reason="stop", logprobs=(-0.5, -0.25))] * 3
        assert server.adapters == [f"run-1-{step}"]
    asked = sorted(server.asked[:3], key=lambda body: body["seed"])
    assert [tuple(body["prompt"]) for body in asked] == PROMPTS
    assert len({body["seed"] for body in asked}) == 3
    server.answer = {"token_ids": None, "logprobs": None}
    with pytest.raises(RolloutsFailed, match="without token ids"):
        served.sample(base, PROMPTS[:1], temperature=1.0, max_new_tokens=8, seed=5, step=1)
    with pytest.raises(InvalidField, match="processed_logprobs"):
        served.sample(base, PROMPTS[:1], temperature=0.7, max_new_tokens=8, seed=5, step=1)
    served.close()
    assert server.adapters == []


def test_a_server_that_is_gone_is_a_named_failure(model: Path, tmp_path: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    base = base_with_policy(model)
    served = ServedRollouts(
        "http://rollouts", folder=tmp_path, name="run-1", transport=httpx.MockTransport(refuse)
    )
    with pytest.raises(RolloutsFailed, match="is it running"):
        served.sample(base, PROMPTS[:1], temperature=1.0, max_new_tokens=8, seed=5, step=0)
