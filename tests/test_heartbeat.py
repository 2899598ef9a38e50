"""A server whose engine computes nothing any longer is noticed, a busy or an idle one is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from assistant.engine import heartbeat, supervisor
from assistant.engine.heartbeat import Heartbeat, signs_of_life
from assistant.engine.supervisor import VllmOptions, VllmProcess
from assistant.engine.vllm import VllmEngine
from engine_fixtures import BASE, collect, make_world
from supervisor_fixtures import alive, group_of, options, stuck, until

METRICS = """\
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="m"}} 12.0
vllm:prompt_tokens_created{{engine="0",model_name="m"}} 1.7e+09
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {written}
"""


class Stuck:
    """A server that counts as many tokens as it is told, and gives none."""

    def __init__(self) -> None:
        self.written, self.asked = 5.0, 0

    def client(self) -> httpx.AsyncClient:
        async def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/metrics":
                return httpx.Response(200, text=METRICS.format(written=self.written))
            self.asked += 1
            await asyncio.sleep(60)
            return httpx.Response(200)

        return httpx.AsyncClient(transport=httpx.MockTransport(answer))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "ASK_AFTER_S", 0.2)
    monkeypatch.setattr(heartbeat, "STUCK_S", 0.6)


async def watched(server: Stuck, *, seconds: float, written_a_look: float) -> bool:
    """Look at the server for so long; return whether it was ever taken for stuck."""
    beat, found, ends = Heartbeat("http://engine", BASE), False, time.monotonic() + seconds
    async with server.client() as client:
        while time.monotonic() < ends:
            await beat.look(client)
            found = found or beat.stuck
            server.written += written_a_look
            await asyncio.sleep(0.05)
        await beat.stop()
    return found


def test_tokens_read_and_written_and_memory_in_use_are_signs() -> None:
    memory = 'vllm:kv_cache_usage_perc{engine="0"} 0.25'
    assert signs_of_life(METRICS.format(written=2.5e3) + memory) == ("12.0", "2500.0", "0.25")
    assert signs_of_life('vllm:num_requests_running{engine="0"} 1.0') == ()


def test_one_that_owes_a_token_and_counts_none_is_stuck() -> None:
    server = Stuck()
    assert not asyncio.run(watched(server, seconds=0.5, written_a_look=0))
    assert server.asked == 1
    assert asyncio.run(watched(server, seconds=1.2, written_a_look=0))


def test_one_that_counts_is_busy_however_long_the_token_takes() -> None:
    server = Stuck()

    async def scenario() -> bool:
        beat = Heartbeat("http://engine", BASE)
        async with server.client() as client:
            ends, stuck = time.monotonic() + 2, False
            while time.monotonic() < ends:
                await beat.look(client)
                stuck = stuck or beat.stuck
                server.written += (
                    server.asked
                )  # it counts as soon as it is asked, and does not come to our token
                await asyncio.sleep(0.3)  # so that it is asked between two looks
            await beat.stop()
        return stuck

    assert not asyncio.run(scenario())
    assert server.asked >= 1


@pytest.mark.parametrize("answer", [httpx.ReadError("lost"), httpx.Response(401), httpx.Response(200)])
def test_one_that_answers_or_whose_question_was_lost_owes_nothing(answer: httpx.Response | Exception) -> None:
    asked: list[float] = []

    def reply(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=METRICS.format(written=1))
        asked.append(time.monotonic())
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def scenario() -> bool:
        beat, stuck = Heartbeat("http://engine", BASE), False
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as client:
            for _ in range(30):
                await beat.look(client)
                stuck = stuck or beat.stuck
                await asyncio.sleep(0.05)
            await beat.stop()
        return stuck

    assert not asyncio.run(scenario())
    assert len(asked) > 2  # it is asked again


def test_whoever_is_cancelled_while_a_question_is_given_up_is_cancelled() -> None:
    async def slow_to_leave(_: httpx.Request) -> httpx.Response:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)
        return httpx.Response(200)

    async def scenario() -> None:
        beat = Heartbeat("http://engine", BASE)
        async with httpx.AsyncClient(transport=httpx.MockTransport(slow_to_leave)) as client:
            beat._asking = asyncio.create_task(beat._ask(client))
            await asyncio.sleep(0.05)
            stopping = asyncio.create_task(beat.stop())
            await asyncio.sleep(0.05)
            stopping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopping

    asyncio.run(scenario())


@pytest.mark.parametrize("ends_after_s", [300, 1])
def test_one_that_gets_stuck_after_every_start_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_after_s: float
) -> None:
    """However long it takes to find out each time, or to end by itself, as vLLM does whose workers hang: that is no service,
    of which ten minutes would forgive it."""
    monkeypatch.setattr(heartbeat, "STUCK_S", 1.5)
    monkeypatch.setattr(supervisor, "backoff_s", lambda deaths: 0.0)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.1)
    monkeypatch.setattr(supervisor, "DEATH_WINDOW_S", 3.0)

    async def scenario() -> str:
        began = time.monotonic()
        async with VllmProcess(options(tmp_path), serve=partial(stuck, ends_after_s=ends_after_s)) as server:
            await until(lambda: server.state == "down", timeout_s=60)
            assert time.monotonic() - began > 4
            return server.detail

    why = "exit code 1" if ends_after_s < 1.5 else "its engine gave no token"
    assert why in asyncio.run(scenario())


@pytest.mark.vllm
@pytest.mark.slow
def test_real_vllm_whose_engine_is_stuck_behind_a_healthy_server_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path / "tiny")
    monkeypatch.setattr(supervisor, "LOOK_S", 0.5)
    monkeypatch.setattr(supervisor, "TERMINATE_TIMEOUT_S", 2.0)
    monkeypatch.setattr(heartbeat, "ASK_AFTER_S", 1.0)
    monkeypatch.setattr(heartbeat, "STUCK_S", 4.0)
    chosen = VllmOptions(
        model=str(world.model), base_name=BASE, data=tmp_path / "data", cpu_kv_cache_gib=0.25
    )

    async def scenario() -> None:
        async with VllmProcess(chosen) as server:
            first = server.pid
            assert first is not None
            await asyncio.sleep(8)  # nobody asks it anything, and it shows all the same that it computes
            assert (server.pid, server.state) == (first, "ready")
            (core,) = (pid for pid in group_of(first) if "EngineCore" in psutil.Process(pid).name())
            os.kill(core, signal.SIGSTOP)
            stopped = time.monotonic()
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
            await until(lambda: server.state == "restarting", timeout_s=30)
            assert time.monotonic() - stopped > 4
            assert "its engine gave no token for 4 s" in server.detail
            await until(lambda: server.state == "ready", timeout_s=240)
            assert server.pid != first
            assert not alive(core)
            client = VllmEngine([server.url], base_name=BASE)
            assert await collect(client, BASE, "Hello")
            await client.close()

    asyncio.run(scenario())
