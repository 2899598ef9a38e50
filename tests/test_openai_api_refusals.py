"""What the chat completions API refuses, and how it says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from assistant.engine.errors import (
    ContextTooLong,
    EngineBusy,
    EngineUnavailable,
    PolicyNotLoaded,
    StreamBroken,
)
from assistant.web.bodies import read_json
from assistant.web.errors import ClientGone, error_response
from storage import people
from web_fixtures import PAGES, QUESTION, Site, error_of, make_site, post


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 2}, "n", "leave it out"),
        ({"n": True}, "n", "leave it out"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice", "leave it out"),
        ({"tools": [{}], "tool_choice": {"type": "function"}}, "tool_choice", "leave it out"),
        ({"functions": [{}], "function_call": {"name": "f"}}, "function_call", "leave it out"),
        ({"tools": "search"}, "tools", "send a list"),
        ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"logprobs": True}, "logprobs", "leave it out"),
        ({"top_logprobs": 5}, "top_logprobs", "leave it out"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "leave it out"),
        ({"presence_penalty": 0.5}, "presence_penalty", "leave it out"),
        ({"temprature": 0.1}, "temprature", "known are"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"temperature": True}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"seed": 2**64}, "seed", "whole number"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "not empty"),
        ({"stop": [1]}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": "usage"}, "stream_options", "include_usage"),
        ({"user": 7}, "user", "send a text"),
        ({"user": "x" * 201}, "user", "at most 200"),
        ({"messages": None}, "messages", "send a list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": ["hi"]}, "messages[0]", "role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "use system"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "use system"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "some text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "some text"),
        ({"messages": [{"role": "user", "content": "x" * 32_769}]}, "messages[0].content", "32,768"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages[-1].role", "user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "send text only",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *QUESTION]},
            "messages[0].tool_calls",
            "text only",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name_with_the_fix_and_nothing_is_written(
    site: Site, body: dict[str, Any], param: str, words: str
) -> None:
    reply = post(site, **body)
    assert reply.status_code == 400
    error = error_of(reply)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: got ")
    assert words in error["message"]
    assert not site.engine.calls
    assert site.store.rows("SELECT count(*) AS n FROM conversations")[0]["n"] == 0


def test_a_dialogue_that_does_not_fit_is_refused_and_not_shortened(site: Site) -> None:
    reply = post(site, messages=[{"role": "user", "content": "word " * 5000}])
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineUnavailable("engine: nobody answers"), 503, "engine_unavailable"),
        (EngineBusy("engine: full"), 429, "engine_busy"),
        (PolicyNotLoaded("policy-1"), 503, "policy_not_loaded"),
        (ContextTooLong(9, 8), 400, "context_length_exceeded"),
        (StreamBroken("engine: broke"), 502, "engine_error"),
    ],
)
def test_errors_of_the_engine_have_a_status_of_their_own(error: Exception, status: int, code: str) -> None:
    reply = error_response(error)
    assert reply.status_code == status
    assert json.loads(bytes(reply.body))["error"]["code"] == code


@pytest.mark.parametrize("authorization", [None, "Bearer nonsense", "Bearer ", "Basic YTpi", "kotae_x"])
def test_without_a_valid_token_there_is_a_401_that_names_the_scheme(
    site: Site, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/kotae"),
    ):
        reply = site.client(None).request(method, path, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert error_of(reply)["code"] == "invalid_api_key"


def test_a_disabled_person_is_out_at_once(site: Site) -> None:
    assert post(site).status_code == 200
    people.disable(site.store, site.people["staff"].id, actor=site.people["admin"].id)
    assert post(site).status_code == 401


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Return the app as it is served: the staff page stands at / and would answer for every other path."""
    return make_site(tmp_path_factory.mktemp("whole"), pages=PAGES)


@pytest.mark.parametrize("name", ["staff", None])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/embeddings"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/chat/completions/"),
        ("GET", "/v1/models/"),
        ("GET", "/v1"),
        ("PUT", "/api/nothing"),
        ("GET", "/api/"),
    ],
)
def test_an_unknown_path_is_answered_in_the_same_form(
    whole: Site, name: str | None, method: str, path: str
) -> None:
    """Before anybody asks who calls, as OpenAI does: a 401 would send people looking for another key."""
    reply = whole.client(name).request(method, path)
    assert reply.status_code == 404
    error = error_of(reply)
    assert error["message"].startswith(f"{method} {path}: ")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["staff", None])
@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/kotae", "GET"),
        ("GET", "/api/ratings", "POST"),
    ],
)
def test_another_method_is_answered_with_those_that_there_are(
    whole: Site, name: str | None, method: str, path: str, allowed: str
) -> None:
    reply = whole.client(name).request(method, path)
    assert reply.status_code == 405
    assert reply.headers["allow"] == allowed
    assert error_of(reply)["message"].startswith(f"{method} {path}: ")


def test_pages_and_known_paths_are_answered_as_before(whole: Site) -> None:
    assert whole.client().get("/v1/models/kotae").status_code == 200
    assert post(whole).status_code == 200
    assert whole.client(None).get("/v1beta").status_code == 401  # a page's affair
    assert whole.signed_in().get("/").status_code == 200


def test_a_client_that_hangs_up_in_mid_question_is_no_fault_of_the_server() -> None:
    messages = [
        {"type": "http.request", "body": b'{"messages": [', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(ClientGone, match="before the request was complete"):
        asyncio.run(read_json(request))
    assert error_response(ClientGone("connection: closed")).status_code == 499
