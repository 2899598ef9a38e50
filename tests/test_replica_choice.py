"""Which of several vLLM servers is asked, that none is after the first token, and what is told of those that fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from assistant.engine import vllm_replicas
from assistant.engine.errors import ContextTooLong, EngineBusy, StreamBroken, WrongPolicy
from assistant.engine.protocol import Queue, Sampling
from assistant.engine.vllm import VllmEngine
from assistant.web.health import ENGINE_TIMEOUT_S
from vllm_fixtures import (
    BASE,
    CONTEXT,
    FIRST,
    GOOD,
    MESSAGES,
    ONE,
    POLICY,
    TWO,
    Server,
    ask,
    chunk,
    engine_of,
    models,
    problem,
)


@pytest.fixture
def server() -> Server:
    return Server()


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


def test_another_policys_answer_is_told_and_not_covered_up_by_another_replica(server: Server) -> None:
    server.chat("one", (chunk("Hi", [5], model="someone-else"),))
    server.chat("two", GOOD)
    with pytest.raises(WrongPolicy):
        ask(engine_of(server, ONE, TWO))
    assert {request.url.host for request in server.requests} == {"one"}


def test_another_policys_probe_is_told_too(server: Server) -> None:
    server.chat("one", httpx.Response(200, json={"model": "someone-else"}))
    server.chat("two", httpx.Response(200, json={"model": "someone-else"}))
    with pytest.raises(WrongPolicy):
        asyncio.run(engine_of(server, ONE, TWO).probe(policy_id=POLICY, messages=MESSAGES, max_tokens=2))
    assert {request.url.host for request in server.requests} == {"one"}


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
    assert [replica.in_flight for replica in engine._replicas.all] == [0, 0]


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


def test_a_replica_that_came_back_is_asked_again_without_a_health_check_from_outside(server: Server) -> None:
    """Whoever keeps the engine at what should be served lists the policies every few seconds: that is enough."""
    for host in ("one", "two"):
        server.on(host, "/v1/models", models(BASE, policy_0001_aaaaaa="/a"))
        server.chat(host, GOOD)
    server.chat("two", httpx.ConnectError("refused"), GOOD)
    engine = engine_of(server, TWO, ONE)
    ask(engine)  # two is down: one answers
    server.requests.clear()
    asyncio.run(engine.loaded())
    ask(engine)
    assert server.requests[-1].url.host == "two"


def test_a_replica_that_lists_its_models_but_is_not_well_stays_out(server: Server) -> None:
    """vLLM's HTTP server outlives its engine for a moment."""
    for host in ("one", "two"):
        server.on(host, "/v1/models", models(BASE, policy_0001_aaaaaa="/a"))
        server.chat(host, GOOD)
    server.on("two", "/health", problem(503, "dead"))
    engine = engine_of(server, TWO, ONE)
    asyncio.run(engine.health())
    assert asyncio.run(engine.loaded()) == {BASE, POLICY}  # of the other, which is not held up by it
    ask(engine)
    assert server.requests[-1].url.host == "one"


def test_what_any_replica_that_is_well_can_serve_is_told(server: Server) -> None:
    server.on("one", "/v1/models", models(BASE, policy_0001_aaaaaa="/a"))
    engine = engine_of(server, ONE, TWO)
    assert asyncio.run(engine.health()).policies == {BASE, POLICY}
    assert asyncio.run(engine.loaded()) == {BASE}  # two still has to load it
    server.on("one", "/health", problem(503, "dead"))
    assert asyncio.run(engine.health()).policies == {BASE}


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
    assert vllm_replicas.HEALTH_TIMEOUT_S < ENGINE_TIMEOUT_S
    monkeypatch.setattr(vllm_replicas, "HEALTH_TIMEOUT_S", 0.1)

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
