"""The vLLM client against servers that misbehave: every error becomes one of ours."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.engine import vllm_wire as wire
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    PolicyNotLoaded,
    StreamBroken,
    WrongPolicy,
)
from assistant.engine.protocol import Piece, Sampling
from assistant.engine.vllm import VllmEngine
from storage.errors import InvalidField, KotaeError
from vllm_fixtures import (
    BASE,
    CONTEXT,
    DONE,
    FIRST,
    GOOD,
    MESSAGES,
    ONE,
    POLICY,
    TWO,
    Body,
    Server,
    ask,
    chunk,
    engine_of,
    event,
    models,
    problem,
)


@pytest.fixture
def server() -> Server:
    return Server()


# -- requests ---------------------------------------------------------------------------------------------


def test_request_salts_the_cache_by_policy_and_hides_no_sampling_default(server: Server) -> None:
    server.chat("one", GOOD)
    ask(
        engine_of(server), sampling=Sampling(temperature=0.3, top_p=0.9, max_tokens=7, seed=11, stop=("END",))
    )
    body = json.loads(server.requests[-1].content)
    assert body["cache_salt"] == body["model"] == POLICY
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.3, 0.9, 7, 11)
    assert body["stop"] == ["END"]
    assert body["return_token_ids"] is body["stream"] is True
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
    assert server.requests[-1].headers["X-Request-Id"] == "turn_1"


def test_the_first_piece_brings_the_prompt_and_a_token(server: Server) -> None:
    server.chat("one", GOOD)
    assert ask(engine_of(server)) == [
        Piece(text="Hi", token_ids=(5,), prompt_token_ids=(1, 2), served_by=POLICY),
        Piece(text="", token_ids=(9,), finish_reason="stop", served_by=POLICY),
    ]


def test_a_quick_server_is_asked_for_several_tokens_a_chunk_once_it_is_known(server: Server) -> None:
    server.chat("one", GOOD)
    engine = engine_of(server)
    for _ in range(20):
        ask(engine)
    asked = [json.loads(request.content)["stream_interval"] for request in server.requests]
    assert asked[0] == 1
    assert asked[-1] > 1


def test_line_separators_of_unicode_inside_the_text_do_not_break_the_stream(server: Server) -> None:
    text = "a\u2028b\u0085c\u000bd"
    whole = b"".join((FIRST, chunk(text, [5], finish="stop"), DONE))
    server.chat("one", tuple(whole[at : at + 1] for at in range(len(whole))))  # also cut at every byte
    assert "".join(piece.text for piece in ask(engine_of(server))) == text


def test_a_server_run_elsewhere_may_call_the_base_what_it_likes(server: Server) -> None:
    server.on("one", "/v1/models", models("Qwen/Qwen2.5"))
    server.chat("one", (chunk("Hi", [5], finish="stop", model="Qwen/Qwen2.5", prompt_token_ids=[1]), DONE))
    pieces = ask(engine_of(server), BASE)
    assert json.loads(server.requests[-1].content)["model"] == "Qwen/Qwen2.5"
    assert {piece.served_by for piece in pieces} == {BASE}


# -- errors -----------------------------------------------------------------------------------------------

MANY_CHARACTERS = (
    "This model's maximum context length is 256 tokens. However, your prompt contains 3650 characters"
)
MAX_TOKENS = "max_tokens=5000 cannot be greater than max_model_len=256. Please request fewer output tokens."


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (problem(404, "The model `x` does not exist. Valid aliases: b."), PolicyNotLoaded, POLICY),
        (problem(400, "The model `x` does not exist."), PolicyNotLoaded, POLICY),
        (problem(400, CONTEXT, "input_tokens"), ContextTooLong, "more tokens than fit.*256"),
        (problem(400, MANY_CHARACTERS, "input_text"), ContextTooLong, "256"),
        (problem(400, MAX_TOKENS, "max_tokens"), InvalidField, "max_tokens: got 5000; use at most 256"),
        (problem(400, "temperature must be non-negative", "temperature"), InvalidField, "temperature"),
        (problem(429, "slow down"), EngineBusy, "try again"),
        (problem(503, "overloaded"), EngineBusy, "try again"),
        (problem(401, "Unauthorized"), EngineUnavailable, "API key"),
        (problem(404, "Not Found"), EngineUnavailable, "404"),
        (problem(500, "EngineCore encountered an issue"), EngineUnavailable, "500"),
        (httpx.Response(502, text="<html>bad gateway</html>"), EngineUnavailable, "bad gateway"),
        (httpx.Response(500, content=b"\xff\xfe"), EngineUnavailable, "500"),
        (httpx.Response(400, json=["odd"]), InvalidField, "odd"),
        (httpx.Response(422, json={"detail": "no"}), InvalidField, "no"),
        (httpx.ConnectError("refused"), EngineUnavailable, "refused"),
        (httpx.ConnectTimeout(""), EngineUnavailable, "ConnectTimeout"),
        (httpx.ReadTimeout(""), EngineUnavailable, "ReadTimeout"),
        (httpx.RemoteProtocolError("cut"), EngineUnavailable, "cut"),
        ((event(error={"message": "queue full", "code": 503}),), EngineBusy, "queue full"),
        ((event(error={"message": CONTEXT, "code": 400}),), ContextTooLong, "256"),
        ((event(error="odd"),), EngineUnavailable, "odd"),
        ((FIRST, event(error={"message": "died", "code": 500})), EngineUnavailable, "died"),
        (
            (FIRST, chunk("Hi", [5]), event(error={"message": "died", "code": 500})),
            StreamBroken,
            "mid-answer",
        ),
        ((FIRST, chunk("Hi", [5]), DONE), StreamBroken, "without a finish reason"),
        ((FIRST, chunk("Hi", [5])), StreamBroken, "without a finish reason"),
        ((), StreamBroken, "without a finish reason"),
        ((FIRST, chunk("Hi", [5]), httpx.ReadError("reset")), StreamBroken, "mid-answer"),
        ((FIRST, httpx.ReadError("reset")), EngineUnavailable, "reset"),
        ((b"data: {not json\n\n",), StreamBroken, "not JSON"),
        ((b"data: [1]\n\n",), StreamBroken, "not an object"),
        ((chunk("Hi", [5], model="someone-else"),), WrongPolicy, "someone-else"),
        ((event(choices=[]),), StreamBroken, "names no model"),
        ((FIRST, chunk("Hi", None)), StreamBroken, "token_ids"),
        ((FIRST, chunk("Hi", [5], finish="abort")), StreamBroken, "abort"),
    ],
)
def test_every_backend_error_becomes_one_of_ours(
    server: Server, answer: Any, expected: type[KotaeError], words: str
) -> None:
    server.chat("one", answer)
    with pytest.raises(expected, match=words):
        ask(engine_of(server))


@pytest.mark.parametrize(
    "refusal", [CONTEXT, MANY_CHARACTERS, "max_tokens must be at least 1, got 0. (parameter=max_tokens)"]
)
def test_a_prompt_that_does_not_fit_is_counted_to_its_end(server: Server, refusal: str) -> None:
    """vLLM's "at least 257" is all that its tokenizer looked at."""
    server.chat("one", problem(400, refusal))
    server.on(
        "one", "/tokenize", httpx.Response(200, json={"count": 5123, "max_model_len": 256, "tokens": []})
    )
    with pytest.raises(ContextTooLong) as refused:
        ask(engine_of(server))
    assert (refused.value.tokens, refused.value.limit) == (5123, 256)
    assert json.loads(server.requests[-1].content) == {"model": POLICY, "messages": MESSAGES}


def test_a_count_that_vllm_gives_itself_is_taken(server: Server) -> None:
    server.chat("one", problem(400, CONTEXT.replace("at least 257", "300")))
    with pytest.raises(ContextTooLong, match="300 tokens"):
        ask(engine_of(server))
    assert [request.url.path for request in server.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.Response(500, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"count": None, "max_model_len": 256}),
    ],
)
def test_a_refusal_stands_when_nobody_counts(server: Server, answer: Any) -> None:
    server.chat("one", problem(400, CONTEXT))
    server.on("one", "/tokenize", answer)
    with pytest.raises(ContextTooLong) as refused:
        ask(engine_of(server))
    assert (refused.value.tokens, refused.value.limit) == (None, 256)


def test_an_error_after_the_last_piece_does_not_spoil_a_complete_answer(server: Server) -> None:
    server.chat("one", (*GOOD[:-1], httpx.ReadError("reset")))
    assert ask(engine_of(server))[-1].finish_reason == "stop"


# -- closing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["aclose", "cancel"])
def test_stopping_early_closes_the_response_upstream(server: Server, way: str) -> None:
    body = Body(FIRST, chunk("Hi", [5]), *[chunk("x", [6])] * 1000)
    server.chat("one", body)
    engine = engine_of(server)

    async def stop() -> None:
        stream = engine.stream(policy_id=POLICY, messages=MESSAGES, sampling=Sampling(), request_id="r")
        if way == "aclose":
            async with aclosing(stream) as pieces:
                await anext(pieces)
            return

        async def read() -> None:
            async with aclosing(stream) as pieces:
                async for _ in pieces:
                    pass

        reading = asyncio.create_task(read())
        for _ in range(20):
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(stop())
    assert body.closed
    assert engine._replicas.all[0].in_flight == 0


# -- adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def load(engine: VllmEngine, adapter: Path) -> None:
    asyncio.run(engine.load(policy_id=POLICY, adapter=adapter))


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LOADED_ALREADY = "The lora adapter has already been loaded. If you want to load the adapter in place, set ..."


def test_an_adapter_is_loaded_everywhere_by_its_absolute_path(
    server: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("one", "two"):
        server.on(host, LOAD, httpx.Response(200))
    monkeypatch.chdir(adapter.parent)
    load(engine_of(server, ONE, TWO), Path(adapter.name))
    bodies = [json.loads(request.content) for request in server.requests]
    assert bodies == [{"lora_name": POLICY, "lora_path": str(adapter)}] * 2


def test_a_replica_that_is_down_does_not_stop_the_others_from_loading(server: Server, adapter: Path) -> None:
    server.on("one", LOAD, httpx.ConnectError("refused"))
    server.on("two", LOAD, httpx.Response(200))
    load(engine_of(server, ONE, TWO), adapter)
    server.on("two", LOAD, httpx.ConnectError("refused"))
    with pytest.raises(EngineUnavailable):
        load(engine_of(server, ONE, TWO), adapter)


def test_already_loaded_is_fine_from_the_same_path_only(server: Server, adapter: Path) -> None:
    server.on("one", LOAD, problem(400, LOADED_ALREADY))
    server.on("one", "/v1/models", models(BASE, policy_0001_aaaaaa=str(adapter)))
    load(engine_of(server), adapter)
    server.on("one", "/v1/models", models(BASE, policy_0001_aaaaaa="/elsewhere"))
    with pytest.raises(AdapterRefused, match="/elsewhere"):
        load(engine_of(server), adapter)


def test_a_refused_adapter_differs_from_an_engine_that_died_of_it(server: Server, adapter: Path) -> None:
    server.on("one", LOAD, problem(500, "LoRA rank 128 is greater than max_lora_rank 64."))
    with pytest.raises(AdapterRefused, match="rank 128"):
        load(engine_of(server), adapter)
    server.on("one", "/health", httpx.Response(503))
    with pytest.raises(EngineUnavailable):
        load(engine_of(server), adapter)


def test_a_replica_that_refuses_what_another_took_is_itself_at_fault(server: Server, adapter: Path) -> None:
    """Else one server that does not see the adapters' folder would withdraw the policy that all others answer with."""
    server.on("one", LOAD, problem(500, "No adapter found for /a"))
    server.on("two", LOAD, httpx.Response(200))
    with pytest.raises(EngineUnavailable, match=r"one replica refuses what another took.*No adapter found"):
        load(engine_of(server, ONE, TWO), adapter)
    server.on("two", LOAD, problem(500, "No adapter found for /a"))
    with pytest.raises(AdapterRefused):
        load(engine_of(server, ONE, TWO), adapter)


def test_a_server_without_runtime_adapters_says_how_to_start_it(server: Server, adapter: Path) -> None:
    server.on("one", LOAD, httpx.Response(404, json={"detail": "Not Found"}))
    with pytest.raises(EngineUnavailable, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        load(engine_of(server), adapter)


def test_unloading_what_is_not_loaded_is_fine(server: Server) -> None:
    server.on("one", UNLOAD, problem(404, "The lora adapter cannot be found."))
    asyncio.run(engine_of(server).unload(POLICY))
    server.on("one", UNLOAD, problem(500, "died"))
    with pytest.raises(EngineError):
        asyncio.run(engine_of(server).unload(POLICY))


def test_a_policy_counts_as_loaded_when_every_replica_that_answers_has_it(server: Server) -> None:
    server.on("one", "/v1/models", models(BASE, a="/a", b="/b"))
    server.on("two", "/v1/models", models("other-name", b="/b"))
    assert asyncio.run(engine_of(server, ONE, TWO).loaded()) == {BASE, "b"}
    server.on("two", "/v1/models", httpx.ConnectError("refused"))
    assert asyncio.run(engine_of(server, ONE, TWO).loaded()) == {BASE, "a", "b"}


# -- probes -----------------------------------------------------------------------------------------------


def probe_answer(logprobs: list[float | None], model: str = POLICY) -> httpx.Response:
    content = [{"logprob": value} for value in logprobs]
    choice = {"message": {"content": "ab"}, "token_ids": [4, 5], "logprobs": {"content": content}}
    return httpx.Response(200, json={"model": model, "choices": [choice]})


def probe(server: Server) -> Any:
    return asyncio.run(engine_of(server).probe(policy_id=POLICY, messages=MESSAGES, max_tokens=2))


def test_a_probe_reads_ids_and_log_probs_and_shows_missing_numbers_as_nan(server: Server) -> None:
    server.chat("one", probe_answer([-0.5, None]))
    result = probe(server)
    assert result.token_ids == (4, 5)
    assert result.logprobs[0] == -0.5
    assert math.isnan(result.logprobs[1])
    server.chat("one", problem(400, "Out of range float values are not JSON compliant"))
    assert math.isnan(probe(server).logprobs[0])


def test_a_probe_of_the_wrong_shape_or_policy_is_broken(server: Server) -> None:
    server.chat("one", httpx.Response(200, json={"model": POLICY}))
    with pytest.raises(StreamBroken, match="no log-probs"):
        probe(server)
    server.chat("one", probe_answer([-1], model="other"))
    with pytest.raises(WrongPolicy, match="other"):
        probe(server)


def test_the_client_needs_an_address() -> None:
    with pytest.raises(InvalidField, match="engine_url"):
        VllmEngine([], base_name=BASE)


def test_translations_never_raise_themselves() -> None:
    for status in range(400, 600):
        for error in ({}, {"message": None}, {"message": "x" * 9999, "param": 3}):
            translated = wire.translate(dict(error), status=status, policy_id=POLICY, url=ONE)
            assert isinstance(translated, KotaeError)
