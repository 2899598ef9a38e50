"""How a dialogue that outgrew the context is shortened: in few requests, and by no more turns than must go."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from assistant.answering import Prompt, drop_oldest_turns, pieces_of
from assistant.engine.errors import ContextTooLong
from assistant.engine.local import LocalEngine
from assistant.engine.protocol import Engine, Piece, Sampling
from assistant.engine.vllm import VllmEngine
from assistant.release import Release
from storage.records import Json
from storage_fixtures import World, make_world
from vllm_fixtures import BASE, CONTEXT, GOOD, ONE, POLICY, problem

SYSTEM = {"role": "system", "content": "You help customers of a shop. " * 10}
LIMIT = 2000
LATIN, JAPANESE = "a word ", "荷物"
KINDS = {
    "latin": (LATIN, LATIN),
    "japanese": (JAPANESE, JAPANESE),
    "latin first": (LATIN, JAPANESE),
    "japanese first": (JAPANESE, LATIN),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def tokens_of(messages: list[Json]) -> int:
    """Count as a byte-level tokenizer might: a token for 4 Latin letters or one of Japanese, 5 around each message."""
    return sum(
        5 + math.ceil(sum(0.25 if letter.isascii() else 1 for letter in message["content"]))
        for message in messages
    )


class Narrow:
    """An engine whose context has `LIMIT` tokens; remembers every request."""

    def __init__(self, *, counts: bool) -> None:
        self.counts = counts
        self.asked: list[list[Json]] = []

    async def stream(self, *, messages: list[Json], policy_id: str, **_: object) -> AsyncIterator[Piece]:
        self.asked.append(messages)
        tokens = tokens_of(messages)
        if tokens >= LIMIT:
            raise ContextTooLong(tokens if self.counts else None, LIMIT)
        yield Piece(text="Yes.", finish_reason="stop", served_by=policy_id)


class Counted:
    """Another engine, its requests counted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked: list[list[Json]] = []

    def stream(self, *, messages: list[Json], **options: object) -> AsyncIterator[Piece]:
        self.asked.append(messages)
        return self.engine.stream(messages=messages, **options)  # type: ignore[arg-type]


def dialogue(turns: int, kind: str) -> list[Json]:
    """Return a system prompt, so many turns of 5 to 400 bytes in the kinds of letters named, and a question."""
    rng = random.Random(3)
    first, then = KINDS[kind]

    def said(number: int) -> str:
        unit = first if number < turns // 2 else then
        return unit * (rng.randint(5, 400) // len(unit.encode())) + "?"

    rows = [
        {"role": role, "content": said(number)} for number in range(turns) for role in ("user", "assistant")
    ]
    return [SYSTEM, *rows, {"role": "user", "content": "And now?"}]


def ask(world: World, engine: object, messages: list[Json], *, policy_id: str | None = None) -> None:
    async def listen() -> None:
        release = Release(world.store, engine)  # type: ignore[arg-type]
        deployment = replace(world.deployment, policy_id=policy_id or world.base.id)
        sampling = Sampling(temperature=0.0, max_tokens=16)
        prompt = Prompt(messages=messages, sampling=sampling, request_id="r", may_shorten=True)
        async for _ in pieces_of(release, deployment, prompt):
            pass

    asyncio.run(listen())


def fewest_dropped(messages: list[Json]) -> int:
    """Return how many turns must go, tried one by one."""
    return next(n for n in range(len(messages)) if tokens_of([SYSTEM, *messages[1 + 2 * n :]]) < LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_100_turns_are_shortened_in_three_requests_by_hardly_more_than_must_go(
    world: World, kind: str
) -> None:
    messages, engine = dialogue(100, kind), Narrow(counts=True)
    ask(world, engine, messages)
    sent, must = engine.asked[-1], fewest_dropped(messages)
    assert must > 80
    assert len(engine.asked) <= 3
    assert must <= 100 - len(sent) // 2 + 1 <= must + 3  # of some 15 that fit
    assert sent[:2] == [SYSTEM, messages[-len(sent) + 1]]


def test_without_a_count_the_older_half_goes_each_time(world: World) -> None:
    engine = Narrow(counts=False)
    ask(world, engine, dialogue(100, "latin"))
    assert [len(asked) // 2 - 1 for asked in engine.asked] == [100, 50, 25, 12]


def test_vllm_is_asked_three_times_once_of_them_for_the_count(world: World) -> None:
    asked: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        tokens = tokens_of(json.loads(request.content)["messages"])
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"count": tokens, "max_model_len": LIMIT})
        if tokens > LIMIT:
            return problem(400, CONTEXT.replace("256", str(LIMIT)).replace("257", str(LIMIT + 1)))
        return httpx.Response(200, content=b"".join(GOOD))

    engine = VllmEngine([ONE], base_name=BASE, transport=httpx.MockTransport(server))
    ask(world, engine, dialogue(100, "latin"), policy_id=POLICY)
    assert asked == ["/v1/chat/completions", "/tokenize", "/v1/chat/completions"]


def test_the_engine_in_this_process_is_asked_as_few_times(world: World, model: Path) -> None:
    engine = LocalEngine(str(model), base_name=world.base.id)
    counted = Counted(engine)
    rows = [{"role": role, "content": "order 7"} for _ in range(100) for role in ("user", "assistant")]
    ask(world, counted, [*rows, {"role": "user", "content": "order 7?"}])
    asyncio.run(engine.close())
    assert len(counted.asked) <= 3
    assert len(counted.asked[-1]) > 3


def test_dropping_turns_keeps_the_system_prompt_and_the_question() -> None:
    system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    old = [{"role": "user", "content": "o"}, {"role": "assistant", "content": "a"}]
    for refusal in (ContextTooLong(None, None), ContextTooLong(9, 8), ContextTooLong(9000, 8)):
        assert drop_oldest_turns([system, *old, question], refusal) == [system, question]
        assert drop_oldest_turns([system, question], refusal) is None


def test_a_refusal_by_one_token_costs_one_turn_and_numbers_that_contradict_it_too() -> None:
    turn = [{"role": "user", "content": "o" * 40}, {"role": "assistant", "content": "a" * 40}]
    messages = [*turn * 10, {"role": "user", "content": "q"}]
    for refusal in (ContextTooLong(257, 256), ContextTooLong(256, 256), ContextTooLong(3, 256)):
        assert drop_oldest_turns(messages, refusal) == messages[2:]
