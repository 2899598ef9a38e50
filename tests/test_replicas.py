"""Two real vLLM servers behind one client: one dies in the middle of a swap, traffic goes on, it catches up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from assistant.engine.errors import StreamBroken
from assistant.engine.supervisor import VllmOptions, VllmProcess
from assistant.engine.vllm import VllmEngine
from assistant.release import Release
from chat_fixtures import add_random_candidate, make_real_desk
from engine_fixtures import collect, text_of
from storage.records import Policy
from storage_fixtures import World

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION = "Where is my order?"
CHAT, LOAD = "/v1/chat/completions", "/v1/load_lora_adapter"


class Recorder(httpx.AsyncHTTPTransport):
    """Remembers which server was asked what."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int | None, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.port, request.url.path))
        return await super().handle_async_request(request)


@dataclass
class Crowd:
    """People who ask all the time, each time the policy that is served then."""

    engine: VllmEngine
    release: Release
    answers: list[tuple[str, str]] = field(default_factory=list)
    """(policy, text)"""
    failures: list[Exception] = field(default_factory=list)
    pause_s: float = 0.1
    stopped: bool = False

    async def ask(self, number: int) -> None:
        while not self.stopped:
            with self.release.lease(f"{number}:{len(self.answers)}") as deployment:
                try:
                    pieces = await collect(self.engine, deployment.policy_id, QUESTION)
                    self.answers.append((deployment.policy_id, text_of(pieces)))
                except Exception as error:
                    self.failures.append(error)
            await asyncio.sleep(self.pause_s)


def kill_9(server: VllmProcess) -> None:
    os.killpg(json.loads(server.pid_file.read_text())["pid"], signal.SIGKILL)


async def until(condition: object, timeout_s: float = 600) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.05)


async def swap_while_one_dies(
    world: World, first: Policy, second: Policy, servers: tuple[VllmProcess, VllmProcess]
) -> None:
    """Approve `second` while the other server is killed, and follow both until they agree again."""
    steady, doomed = servers
    recorder = Recorder()
    engine = VllmEngine([server.url for server in servers], base_name=world.base.id, transport=recorder)
    release = Release(world.store, engine)
    await release.approve(policy_id=first.id, person=world.admin, reason="better")
    crowd = Crowd(engine, release)
    people = [asyncio.create_task(crowd.ask(number)) for number in range(8)]
    await until(lambda: len(crowd.answers) > 16)
    assert {port for port, path in recorder.asked if path == CHAT} == {steady.port, doomed.port}

    recorder.asked.clear()
    swap = asyncio.create_task(release.approve(policy_id=second.id, person=world.admin, reason="better"))
    await until(lambda: (doomed.port, LOAD) in recorder.asked)
    kill_9(doomed)
    await swap
    assert release.served.stable.policy_id == second.id
    await until(lambda: doomed.state != "ready")  # what is killed ends when it is given a processor
    await asyncio.sleep(0.2)  # and those who listened to it have heard of that
    cut = list(crowd.failures)
    assert all(isinstance(error, StreamBroken) for error in cut), cut  # what it was saying when it died
    so_far = len(crowd.answers)
    await until(lambda: len(crowd.answers) > so_far + 32)
    assert crowd.failures == cut

    crowd.pause_s = 1.0  # a server that starts beside them needs its share of the machine
    await until(lambda: doomed.state == "ready")
    crowd.pause_s = 0.1
    assert (await engine.health()).detail == "2 of 2 replicas answer"
    recorder.asked.clear()
    so_far = len(crowd.answers)
    await until(lambda: len(crowd.answers) > so_far + 32)
    assert (doomed.port, CHAT) not in recorder.asked  # it has not caught up
    await release.sync()
    await until(lambda: (doomed.port, CHAT) in recorder.asked)
    so_far = len(crowd.answers)
    await until(lambda: len(crowd.answers) > so_far + 32)

    crowd.stopped = True
    await asyncio.gather(*people)
    assert crowd.failures == cut
    texts = {
        policy: {text for name, text in crowd.answers if name == policy} for policy in (first.id, second.id)
    }
    assert len(texts[first.id]) == len(texts[second.id]) == 1
    assert texts[first.id] != texts[second.id]
    await engine.close()


def test_a_replica_killed_in_a_swap_is_routed_around_and_catches_up_before_it_is_asked(
    tmp_path: Path,
) -> None:
    world = make_real_desk(tmp_path).world
    first, second = (add_random_candidate(world, tmp_path, seed=seed) for seed in (1, 2))
    options = [
        VllmOptions(
            model=world.base.base_path, base_name=world.base.id, data=tmp_path / name, cpu_kv_cache_gib=0.25
        )
        for name in ("one", "two")
    ]
    servers = [VllmProcess(one) for one in options]

    async def with_both() -> None:
        steady, doomed = servers
        try:
            await asyncio.gather(steady.start(), doomed.start())
            await swap_while_one_dies(world, first, second, (steady, doomed))
        finally:
            await asyncio.gather(steady.stop(), doomed.stop())

    asyncio.run(with_both())
