"""The vLLM client against servers that misbehave: every error becomes one of ours, and nothing is served twice."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.engine import vllm
from assistant.engine import vllm_wire as wire
from assistant.engine.errors import (
    AdapterRefused,
    ContextTooLong,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    PolicyNotLoaded,
    StreamBroken,
)
from assistant.engine.protocol import Piece, Queue, Sampling
from assistant.engine.vllm import VllmEngine
from assistant.web.health import ENGINE_TIMEOUT_S
from storage.errors import InvalidField, KotaeError
from storage.records import Json

BASE, POLICY = "policy-base-00000000", "policy-0001-aaaaaa"
MESSAGES: list[Json] = [{"role": "user", "content": "Hello"}]
ONE, TWO = "http://one", "http://two"


class Body(httpx.AsyncByteStream):
    """A streamed body, in the chunks given; an exception among them is raised. Remembers that it was closed."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self.chunks = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            await asyncio.sleep(0)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        self.closed = True


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n".encode()


def chunk(
    text: str, ids: list[int] | None, *, finish: str | None = None, model: str = POLICY, **more: Any
) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "token_ids": ids}
    return event(model=model, choices=[choice], **more)


FIRST = event(
    model=POLICY,
    choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}],
    prompt_token_ids=[1, 2],
)
DONE = b"data: [DONE]\n\n"
GOOD = (FIRST, chunk("Hi", [5]), chunk("", [9], finish="stop"), DONE)


class Server:
    """Fake vLLM servers by host name; each answers a path with what was put in line for it, the last one again."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[tuple[str, str], list[Any]] = {}
        for host in ("one", "two"):
            self.on(host, "/health", httpx.Response(200))
            self.on(host, "/v1/models", models(BASE))

    def on(self, host: str, path: str, *answers: Any) -> None:
        self.answers[host, path] = list(answers)

    def chat(self, host: str, *answers: Any) -> None:
        self.on(host, "/v1/chat/completions", *answers)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        line = self.answers[request.url.host, request.url.path]
        answer = line.pop(0) if len(line) > 1 else line[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            return httpx.Response(200, stream=Body(*answer))
        if isinstance(answer, Body):
            return httpx.Response(200, stream=answer)
        return httpx.Response(answer.status_code, content=answer.content)


def models(base: str, **adapters: str) -> httpx.Response:
    rows = [{"id": base, "parent": None, "root": "/model"}]
    rows += [{"id": name.replace("_", "-"), "parent": base, "root": root} for name, root in adapters.items()]
    return httpx.Response(200, json={"data": rows})


def problem(status: int, message: str, param: str | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "param": param, "code": status}})


@pytest.fixture
def server() -> Server:
    return Server()


def engine_of(server: Server, *urls: str, read_timeout_s: float = 5) -> VllmEngine:
    transport = httpx.MockTransport(server)
    return VllmEngine(urls or [ONE], base_name=BASE, read_timeout_s=read_timeout_s, transport=transport)


def ask(engine: VllmEngine, policy_id: str = POLICY, *, sampling: Sampling | None = None) -> list[Piece]:
    async def collect() -> list[Piece]:
        stream = engine.stream(
            policy_id=policy_id, messages=MESSAGES, sampling=sampling or Sampling(), request_id="turn_1"
        )
        return [piece async for piece in stream]

    return asyncio.run(collect())


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

CONTEXT = (
    "This model's maximum context length is 256 tokens. However, your prompt contains at least 257 input tokens, "
    "which exceeds this limit even without any output tokens."
)
MANY_CHARACTERS = (
    "This model's maximum context length is 256 tokens. However, your prompt contains 3650 characters"
)
MAX_TOKENS = "max_tokens=5000 cannot be greater than max_model_len=256. Please request fewer output tokens."


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (problem(404, "The model `x` does not exist. Valid aliases: b."), PolicyNotLoaded, POLICY),
        (problem(400, "The model `x` does not exist."), PolicyNotLoaded, POLICY),
        (problem(400, CONTEXT, "input_tokens"), ContextTooLong, "257.*256"),
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
        ((chunk("Hi", [5], model="someone-else"),), StreamBroken, "someone-else"),
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


def test_an_error_after_the_last_piece_does_not_spoil_a_complete_answer(server: Server) -> None:
    server.chat("one", (*GOOD[:-1], httpx.ReadError("reset")))
    assert ask(engine_of(server))[-1].finish_reason == "stop"


# -- replicas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        problem(503, "busy"),
        problem(404, "The model `x` does not exist."),
        (FIRST,),
        (FIRST, httpx.ReadError("reset")),
    ],
)
def test_another_replica_answers_when_the_first_fails_before_a_token(server: Server, failure: Any) -> None:
    server.chat("one", failure)
    server.chat("two", GOOD)
    pieces = ask(engine_of(server, ONE, TWO))
    assert [piece.text for piece in pieces] == ["Hi", ""]


def test_no_replica_is_tried_after_the_first_token(server: Server) -> None:
    server.chat("one", (FIRST, chunk("Hi", [5]), httpx.ReadError("reset")))
    server.chat("two", GOOD)
    with pytest.raises(StreamBroken):
        ask(engine_of(server, ONE, TWO))
    assert {request.url.host for request in server.requests} == {"one"}


def test_a_request_that_is_wrong_is_not_repeated_elsewhere(server: Server) -> None:
    server.chat("one", problem(400, CONTEXT))
    server.chat("two", GOOD)
    with pytest.raises(ContextTooLong):
        ask(engine_of(server, ONE, TWO))


def test_when_all_fail_a_busy_one_is_reported_because_waiting_helps(server: Server) -> None:
    server.chat("one", problem(503, "busy"))
    server.chat("two", httpx.ConnectError("refused"))
    with pytest.raises(EngineBusy):
        ask(engine_of(server, ONE, TWO))


def test_requests_go_to_the_replica_with_the_least_in_flight(server: Server) -> None:
    server.chat("one", GOOD)
    server.chat("two", GOOD)
    engine = engine_of(server, ONE, TWO)

    async def two_at_once() -> None:
        def stream() -> Any:
            return engine.stream(policy_id=POLICY, messages=MESSAGES, sampling=Sampling(), request_id="r")

        async with aclosing(stream()) as first, aclosing(stream()) as second:
            await anext(first)
            await anext(second)

    asyncio.run(two_at_once())
    assert [request.url.host for request in server.requests] == ["one", "two"]
    assert [replica.in_flight for replica in engine._replicas] == [0, 0]


def test_a_replica_that_failed_is_tried_last_until_it_answers_again(server: Server) -> None:
    server.chat("one", httpx.ConnectError("refused"), GOOD)
    server.chat("two", GOOD)
    engine = engine_of(server, ONE, TWO)
    ask(engine)
    ask(engine)
    assert [request.url.host for request in server.requests] == ["one", "two", "two"]
    assert asyncio.run(engine.health()).ready
    ask(engine)
    assert server.requests[-1].url.host == "one"


def test_a_replica_that_came_back_is_asked_for_an_adapter_only_when_it_has_it_again(server: Server) -> None:
    engine = engine_of(server, ONE, TWO)
    for host in ("one", "two"):
        server.on(host, "/v1/models", models(BASE, policy_0001_aaaaaa="/a"))
        server.chat(host, GOOD)
    asyncio.run(engine.loaded())
    server.on("one", "/v1/models", httpx.ConnectError("refused"))  # it dies, comes back empty ...
    asyncio.run(engine.loaded())
    server.on("one", "/v1/models", models(BASE))
    assert asyncio.run(engine.health()).detail == "2 of 2 replicas answer"
    server.requests.clear()
    for _ in range(4):
        ask(engine)
    assert {request.url.host for request in server.requests} == {"two"}
    server.on("one", "/v1/models", models(BASE, policy_0001_aaaaaa="/a"))  # ... and catches up
    asyncio.run(engine.loaded())
    server.requests.clear()
    ask(engine)
    assert {request.url.host for request in server.requests} == {"one"}


def test_health_counts_replicas_and_never_raises(server: Server) -> None:
    server.on("two", "/health", httpx.ConnectError("refused"))
    health = asyncio.run(engine_of(server, ONE, TWO).health())
    assert health.ready
    assert "1 of 2" in health.detail
    assert "http://two" in health.detail
    server.on("one", "/health", problem(503, "dead"))
    assert not asyncio.run(engine_of(server, ONE, TWO).health()).ready


def test_a_replica_that_never_answers_does_not_make_the_others_look_absent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm.HEALTH_TIMEOUT_S < ENGINE_TIMEOUT_S
    monkeypatch.setattr(vllm, "HEALTH_TIMEOUT_S", 0.1)

    async def half_silent(request: httpx.Request) -> httpx.Response:
        if request.url.host == "two":
            await asyncio.sleep(60)
        return await server(request)

    engine = VllmEngine([ONE, TWO], base_name=BASE, transport=httpx.MockTransport(half_silent))
    answer = asyncio.run(engine.health())
    assert answer.ready
    assert answer.detail == "1 of 2 replicas answer; engine: http://two does not answer within 0.1 s"


def test_queues_are_those_that_each_replica_tells_of(server: Server) -> None:
    # vLLM 0.32 tells of each engine behind an address, and beside it of why requests wait
    text = (
        'vllm:num_requests_running{engine="0",model_name="b"} 2.0\n'
        'vllm:num_requests_running{engine="1",model_name="b"} 3.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="b"} 1.0\n'
        'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 1.0\n'
    )
    server.on("one", "/metrics", httpx.Response(200, text=text))
    server.on("two", "/metrics", httpx.Response(404, text="Not Found"))
    queues = asyncio.run(engine_of(server, ONE, TWO).queues())
    assert queues == [
        Queue(replica=ONE, up=True, running=5, waiting=1),
        Queue(replica=TWO, up=True, running=None, waiting=None),
    ]


def test_the_queue_of_a_replica_that_is_gone_is_not_asked_for_again(server: Server) -> None:
    server.on("one", "/metrics", httpx.ConnectError("refused"))
    engine = engine_of(server)
    gone = [Queue(replica=ONE, up=False)]
    assert asyncio.run(engine.queues()) == gone
    assert asyncio.run(engine.queues()) == gone
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [httpx.Response(200, text="hi"), httpx.Response(200, json=[]), httpx.Response(200, json={"data": []})],
)
def test_an_address_that_is_not_vllm_is_said_to_be_so(server: Server, answer: httpx.Response) -> None:
    server.on("one", "/v1/models", answer)
    health = asyncio.run(engine_of(server).health())
    assert not health.ready
    assert "check the address" in health.detail


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
    assert engine._replicas[0].in_flight == 0


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


@pytest.mark.parametrize(
    "answer", [probe_answer([-1], model="other"), httpx.Response(200, json={"model": POLICY})]
)
def test_a_probe_of_the_wrong_shape_or_policy_is_broken(server: Server, answer: httpx.Response) -> None:
    server.chat("one", answer)
    with pytest.raises(StreamBroken):
        probe(server)


def test_the_client_needs_an_address() -> None:
    with pytest.raises(InvalidField, match="engine_url"):
        VllmEngine([], base_name=BASE)


def test_translations_never_raise_themselves() -> None:
    for status in range(400, 600):
        for error in ({}, {"message": None}, {"message": "x" * 9999, "param": 3}):
            translated = wire.translate(dict(error), status=status, policy_id=POLICY, url=ONE)
            assert isinstance(translated, KotaeError)
