"""What every engine must do, run on each implementation: transformers in this process, and a real vLLM server."""

from __future__ import annotations

import asyncio
import math
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import aclosing, closing
from itertools import pairwise
from pathlib import Path

import pytest

from alignment.logprobs import completion_logprobs
from alignment.models import load_adapter, load_base, prompt_ids
from alignment.ppo_config import PpoConfig
from alignment.ppo_rollouts import Answers, take_answers
from alignment.probe_record import record_probes
from alignment.progress import Silent
from alignment.rollout_server import ServedRollouts
from assistant.engine.behaviour_gate import FLOAT32_NATS, BehaviourGate
from assistant.engine.errors import AdapterRefused, ContextTooLong, PolicyNotLoaded
from assistant.engine.local import LocalEngine
from assistant.engine.protocol import Engine, Sampling
from engine_fixtures import (
    BASE,
    CONTEXT,
    LoopThread,
    TinyWorld,
    collect,
    have_only,
    ids_of,
    make_world,
    running_engine,
    text_of,
)
from learning_fixtures import base_with_policy, randomise
from storage.errors import InvalidField
from storage.probes import write_probes
from tiny_models import EOS, make_tokenizer

Running = tuple[Engine, LoopThread]
QUESTION = "Where is my order? 注文 👍"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["local", pytest.param("vllm", marks=pytest.mark.vllm)])
def running(
    request: pytest.FixtureRequest, world: TinyWorld, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    with running_engine(request.param, world, tmp_path_factory.mktemp("data")) as found:
        yield found


@pytest.fixture
def adapters(running: Running, world: TinyWorld) -> None:
    engine, loop = running
    loop.run(have_only(engine, {"policy-0001-aaaaaa": world.first, "policy-0002-bbbbbb": world.second}))


def test_a_fresh_engine_lists_and_serves_the_base(running: Running) -> None:
    engine, loop = running
    assert loop.run(engine.loaded()) == {BASE}
    health = loop.run(engine.health())
    assert health.ready
    assert health.policies == {BASE}
    pieces = loop.run(collect(engine, BASE, QUESTION))
    assert {piece.served_by for piece in pieces} == {BASE}


def test_an_engine_at_rest_says_that_nothing_runs_or_waits(running: Running) -> None:
    engine, loop = running
    deadline = time.monotonic() + 30
    while True:  # vLLM's numbers follow the end of an answer by a step
        queues = loop.run(engine.queues())
        if [(queue.up, queue.running, queue.waiting) for queue in queues] == [(True, 0, 0)]:
            return
        assert time.monotonic() < deadline, queues
        time.sleep(0.2)


def test_first_piece_has_the_prompt_ids_and_only_the_last_a_finish_reason(
    running: Running, world: TinyWorld
) -> None:
    engine, loop = running
    pieces = loop.run(collect(engine, BASE, QUESTION))
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    assert pieces[0].prompt_token_ids == tuple(expected)
    assert [piece.prompt_token_ids for piece in pieces[1:]] == [None] * (len(pieces) - 1)
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_text_is_what_the_token_ids_say_and_no_piece_ends_in_half_a_character(running: Running) -> None:
    engine, loop = running
    sampling = Sampling(temperature=1.0, max_tokens=200, seed=5)
    pieces = loop.run(collect(engine, BASE, QUESTION, sampling=sampling))
    decoded = make_tokenizer().decode(ids_of(pieces), skip_special_tokens=True)
    assert text_of(pieces) == decoded
    assert not any(piece.text.endswith("\ufffd") for piece in pieces[:-1])


def test_max_tokens_ends_the_answer_with_length(running: Running) -> None:
    engine, loop = running
    pieces = loop.run(collect(engine, BASE, QUESTION, sampling=Sampling(temperature=0.0, max_tokens=5)))
    assert pieces[-1].finish_reason == "length"
    assert len(ids_of(pieces)) == 5


def test_an_answer_that_ends_by_itself_has_its_end_of_sequence_token(running: Running) -> None:
    engine, loop = running
    end = make_tokenizer().convert_tokens_to_ids(EOS)

    async def until_stop() -> list[int]:
        for seed in range(60):
            sampling = Sampling(temperature=2.0, max_tokens=200, seed=seed)
            pieces = await collect(engine, BASE, QUESTION, sampling=sampling)
            if pieces[-1].finish_reason == "stop":
                assert EOS not in text_of(pieces)
                return ids_of(pieces)
            assert end not in ids_of(pieces)
        raise AssertionError("no answer ended by itself")

    ids = loop.run(until_stop())
    assert ids[-1] == end
    assert end not in ids[:-1]


def test_a_stop_string_ends_the_answer_and_is_not_shown(running: Running) -> None:
    engine, loop = running
    whole = text_of(
        loop.run(collect(engine, BASE, QUESTION, sampling=Sampling(temperature=0.0, max_tokens=40)))
    )
    stop = next(a + b for a, b in pairwise(whole[4:]) if a.isalpha() and b.isalpha() and a.isascii())
    sampling = Sampling(temperature=0.0, max_tokens=40, stop=(stop,))
    pieces = loop.run(collect(engine, BASE, QUESTION, sampling=sampling))
    assert pieces[-1].finish_reason == "stop"
    assert text_of(pieces) == whole[: whole.index(stop)]


def test_the_same_seed_repeats_an_answer_and_another_one_does_not(running: Running) -> None:
    engine, loop = running
    answers = [
        ids_of(
            loop.run(
                collect(engine, BASE, QUESTION, sampling=Sampling(temperature=1.0, seed=seed, max_tokens=20))
            )
        )
        for seed in (7, 7, 8)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.usefixtures("adapters")
def test_policies_answer_side_by_side_each_with_its_own_weights(running: Running) -> None:
    engine, loop = running
    policies = [BASE, "policy-0001-aaaaaa", "policy-0002-bbbbbb"]
    assert loop.run(engine.loaded()) == set(policies)
    alone = {policy: ids_of(loop.run(collect(engine, policy, QUESTION))) for policy in policies}
    assert len({tuple(ids) for ids in alone.values()}) == 3

    async def all_at_once() -> list[list[int]]:
        return [
            ids_of(p) for p in await asyncio.gather(*(collect(engine, q, QUESTION) for q in policies * 4))
        ]

    for policy, ids in zip(policies * 4, loop.run(all_at_once()), strict=True):
        assert ids == alone[policy]


@pytest.mark.usefixtures("adapters")
def test_the_base_answers_as_itself_beside_more_policies_than_an_engine_holds_at_once(
    running: Running, world: TinyWorld
) -> None:
    engine, loop = running
    many = {f"policy-1{number:03}-dddddd": (world.first, world.second)[number % 2] for number in range(6)}
    loop.run(have_only(engine, many))
    alone = {policy: ids_of(loop.run(collect(engine, policy, QUESTION))) for policy in (*many, BASE)}
    last = list(many)[-1]

    async def in_a_mixed_batch() -> list[list[int]]:
        asked = [collect(engine, policy, QUESTION) for policy in [BASE, last] * 12]
        return [ids_of(pieces) for pieces in await asyncio.gather(*asked)]

    for policy, ids in zip([BASE, last] * 12, loop.run(in_a_mixed_batch()), strict=True):
        assert ids == alone[policy]


@pytest.mark.usefixtures("adapters")
def test_loading_twice_is_fine_but_a_name_keeps_its_files(running: Running, world: TinyWorld) -> None:
    engine, loop = running
    loop.run(engine.load(policy_id="policy-0001-aaaaaa", adapter=world.first))
    with pytest.raises(AdapterRefused, match="an id of its own"):
        loop.run(engine.load(policy_id="policy-0001-aaaaaa", adapter=world.second))
    with pytest.raises(AdapterRefused, match="base"):
        loop.run(engine.load(policy_id=BASE, adapter=world.second))


def test_health_tells_what_can_be_answered(running: Running, adapters: None) -> None:
    engine, loop = running
    assert loop.run(engine.health()).policies == {BASE, "policy-0001-aaaaaa", "policy-0002-bbbbbb"}


def test_a_folder_without_an_adapter_is_refused(running: Running, tmp_path: Path) -> None:
    engine, loop = running
    with pytest.raises(AdapterRefused, match="adapter_config"):
        loop.run(engine.load(policy_id="policy-0009-ffffff", adapter=tmp_path / "nothing"))
    assert "policy-0009-ffffff" not in loop.run(engine.loaded())


@pytest.mark.usefixtures("adapters")
def test_unloading_forgets_a_policy_and_twice_is_fine(running: Running, world: TinyWorld) -> None:
    engine, loop = running
    before = ids_of(loop.run(collect(engine, "policy-0002-bbbbbb", QUESTION)))
    loop.run(engine.unload("policy-0001-aaaaaa"))
    loop.run(engine.unload("policy-0001-aaaaaa"))
    assert loop.run(engine.loaded()) == {BASE, "policy-0002-bbbbbb"}
    with pytest.raises(PolicyNotLoaded, match="policy-0001-aaaaaa"):
        loop.run(collect(engine, "policy-0001-aaaaaa", QUESTION))
    assert ids_of(loop.run(collect(engine, "policy-0002-bbbbbb", QUESTION))) == before
    loop.run(engine.load(policy_id="policy-0001-aaaaaa", adapter=world.first))


def test_an_unknown_policy_is_named(running: Running) -> None:
    engine, loop = running
    with pytest.raises(PolicyNotLoaded, match="policy-0404-cccccc"):
        loop.run(collect(engine, "policy-0404-cccccc", QUESTION))


def test_messages_that_do_not_fit_are_refused_with_the_numbers(running: Running) -> None:
    engine, loop = running
    text = "order " * CONTEXT
    with pytest.raises(ContextTooLong) as refused:
        loop.run(collect(engine, BASE, text))
    prompt = make_tokenizer().apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert (refused.value.tokens, refused.value.limit) == (len(prompt), CONTEXT)
    with pytest.raises(InvalidField, match="max_tokens"):
        loop.run(collect(engine, BASE, QUESTION, sampling=Sampling(max_tokens=CONTEXT + 1)))


def test_an_answer_is_cut_where_the_context_ends(running: Running) -> None:
    engine, loop = running
    sampling = Sampling(temperature=2.0, max_tokens=CONTEXT, seed=1, stop=())
    pieces = loop.run(collect(engine, BASE, QUESTION, sampling=sampling))
    prompt = pieces[0].prompt_token_ids
    assert prompt is not None
    if pieces[-1].finish_reason == "length":
        assert len(prompt) + len(ids_of(pieces)) == CONTEXT


def test_a_probe_is_greedy_and_gives_a_log_prob_for_each_token(running: Running) -> None:
    engine, loop = running
    messages = [{"role": "user", "content": QUESTION}]
    result = loop.run(engine.probe(policy_id=BASE, messages=messages, max_tokens=6))
    pieces = loop.run(collect(engine, BASE, QUESTION, sampling=Sampling(temperature=0.0, max_tokens=6)))
    assert list(result.token_ids) == ids_of(pieces)
    assert result.text == text_of(pieces)
    assert len(result.logprobs) == 6
    assert all(math.isfinite(value) and value <= 0 for value in result.logprobs)


def test_closing_a_stream_early_frees_the_engine_at_once(running: Running) -> None:
    engine, loop = running

    async def stop_after_one() -> float:
        messages = [{"role": "user", "content": QUESTION}]
        sampling = Sampling(temperature=0.0, max_tokens=CONTEXT - 64)
        stream = engine.stream(policy_id=BASE, messages=messages, sampling=sampling, request_id="stopped")
        async with aclosing(stream) as pieces:
            async for _ in pieces:
                break
        started = time.monotonic()
        await collect(engine, BASE, QUESTION, sampling=Sampling(temperature=0.0, max_tokens=1))
        return time.monotonic() - started

    assert loop.run(stop_after_one()) < 1.0


def test_streams_do_not_block_the_event_loop(running: Running) -> None:
    engine, loop = running

    async def longest_pause_s() -> float:
        answers = asyncio.gather(*(collect(engine, BASE, QUESTION) for _ in range(4)))
        longest, last = 0.0, time.monotonic()
        while not answers.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await answers
        return longest

    assert loop.run(longest_pause_s()) < 0.5


def test_engines_agree_with_transformers_to_the_last_digits(running: Running, world: TinyWorld) -> None:
    """Greedy, float32 on both sides: the only difference is the order of sums."""
    engine, loop = running
    oracle = LocalEngine(str(world.model), base_name=BASE)
    messages = [{"role": "user", "content": QUESTION}]
    for policy, adapter in (
        (BASE, None),
        ("policy-0001-aaaaaa", world.first),
        ("policy-0002-bbbbbb", world.second),
    ):
        if adapter is not None:
            loop.run(oracle.load(policy_id=policy, adapter=adapter))
            loop.run(engine.load(policy_id=policy, adapter=adapter))
        expected = loop.run(oracle.probe(policy_id=policy, messages=messages, max_tokens=12))
        found = loop.run(engine.probe(policy_id=policy, messages=messages, max_tokens=12))
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    loop.run(oracle.close())


def test_engines_give_the_probes_the_log_probs_that_the_trainer_recorded(
    running: Running, world: TinyWorld, tmp_path: Path
) -> None:
    engine, loop = running
    adapter = Path(shutil.copytree(world.first, tmp_path / "adapter"))
    base = load_base(str(world.model), device="cpu")
    load_adapter(base, "policy", adapter, trainable=False)
    write_probes(adapter, record_probes(base, adapter="policy"))
    gate = BehaviourGate(engine, tolerance_nats=FLOAT32_NATS)
    loop.run(engine.load(policy_id="policy-0003-cccccc", adapter=adapter))
    loop.run(gate.check("policy-0003-cccccc", adapter))
    loop.run(engine.load(policy_id="policy-0002-bbbbbb", adapter=world.second))
    with pytest.raises(AdapterRefused, match="recorded token"):
        loop.run(gate.check("policy-0002-bbbbbb", adapter))  # the second's answers against the first's record
    for policy_id in ("policy-0002-bbbbbb", "policy-0003-cccccc"):  # what did not pass gets no questions
        loop.run(engine.unload(policy_id))


@pytest.mark.parametrize("running", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
def test_rollouts_of_a_vllm_server_come_from_the_policy_and_are_weighed_once_they_do_not(
    running: Running, world: TinyWorld, tmp_path: Path
) -> None:
    """PPO's answers (`alignment.rollout_server`) against log-probs of this process, float32 on both sides."""
    base = base_with_policy(world.model, spread=0.1)
    rows = [{"role": "user", "content": QUESTION}], [{"role": "user", "content": "Hello"}]
    prompts = [prompt_ids(base, messages) for messages in rows for _ in range(2)]
    config = PpoConfig(max_new_tokens=16, importance_cap=1.5)
    url = running[0]._replicas.all[0].url

    def answers(*, step: int) -> Answers:
        return take_answers(base, prompts, config, sampler=served, seed=1, step=step, progress=Silent())

    with closing(ServedRollouts(url, folder=tmp_path, name="rollouts-1")) as served:
        first = answers(step=0)
        assert [prompt for prompt, _ in first.rows] == prompts
        assert first.rows[0] != first.rows[1]  # a prompt given twice has two answers
        for row, (_, ids) in enumerate(first.rows):
            assert bool(first.finished[row]) is (ids[-1] in base.stop_ids)
            assert 0 < len(ids) == int(first.mask[row].sum()) <= 16
        ours = completion_logprobs(base, first.rows, adapter="policy")
        for row, expected in enumerate(ours):
            assert first.old[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
        # the weight is exp(ours - served): 1 says that the served log-probs are ours
        assert first.weights[first.mask].tolist() == pytest.approx([1.0] * int(first.mask.sum()), abs=1e-3)
        theirs = completion_logprobs(base, first.rows, adapter="reference")
        assert (
            max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
            > 0.1
        )
        randomise(base, "policy", seed=5, spread=0.1)
        late = answers(step=0)  # the server still answers for the former policy under this name
        weights = late.weights[late.mask]
        assert float(weights.min()) < 0.9
        assert float(weights.max()) == 1.5
        now = answers(step=1)
        assert now.weights[now.mask].tolist() == pytest.approx([1.0] * int(now.mask.sum()), abs=1e-3)


def test_a_probe_of_an_adapter_full_of_nan_shows_it(
    running: Running, world: TinyWorld, tmp_path: Path
) -> None:
    """The static gate stops such files; this is the second net. Last on purpose: it spoils vLLM's memory."""
    engine, loop = running
    raw = bytearray((world.first / "adapter_model.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = struct.pack("<f", math.nan) * ((len(raw) - start) // 4)
    bad = Path(shutil.copytree(world.first, tmp_path / "bad"))
    (bad / "adapter_model.safetensors").write_bytes(raw)
    loop.run(engine.load(policy_id="policy-0666-dddddd", adapter=bad))
    messages = [{"role": "user", "content": QUESTION}]
    result = loop.run(engine.probe(policy_id="policy-0666-dddddd", messages=messages, max_tokens=4))
    assert any(math.isnan(value) for value in result.logprobs)
