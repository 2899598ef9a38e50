"""Real engines on a tiny random model, for tests: one event loop in a thread, so that an engine outlives a test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from assistant.engine.local import LocalEngine
from assistant.engine.protocol import Engine, Piece, Sampling
from assistant.engine.reconcile import load_missing, unload_unused
from assistant.engine.supervisor import VllmOptions, VllmProcess
from assistant.engine.vllm import VllmEngine
from tiny_models import make_adapter, make_tiny_model

T = TypeVar("T")
BASE = "policy-base-00000000"
CONTEXT = 512


@dataclass(frozen=True)
class TinyWorld:
    """A base model and two adapters of it."""

    model: Path
    first: Path
    second: Path


def make_world(folder: Path) -> TinyWorld:
    model = make_tiny_model(folder / "model", seed=0, max_positions=CONTEXT)
    return TinyWorld(
        model=model,
        first=make_adapter(folder / "first", model, seed=1, rank=4),
        second=make_adapter(folder / "second", model, seed=2, rank=8),
    )


class LoopThread:
    """An event loop in a thread of its own; `run` waits for a coroutine there."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def vllm_server(world: TinyWorld, data: Path, loop: LoopThread) -> Iterator[VllmProcess]:
    server = VllmProcess(
        VllmOptions(model=str(world.model), base_name=BASE, data=data, cpu_kv_cache_gib=0.25)
    )
    try:
        loop.run(server.start(), 900)
        yield server
    finally:
        loop.run(server.stop())


@contextmanager
def running_engine(kind: str, world: TinyWorld, data: Path) -> Iterator[tuple[Engine, LoopThread]]:
    """Yield a real engine of this kind, ready to answer, and the loop that it lives on."""
    loop = LoopThread()
    try:
        if kind == "local":
            local = LocalEngine(str(world.model), base_name=BASE)
            yield local, loop
            loop.run(local.close())
        else:
            with vllm_server(world, data, loop) as server:
                client = VllmEngine([server.url], base_name=BASE)
                yield client, loop
                loop.run(client.close())
    finally:
        loop.close()


async def have_only(engine: Engine, adapters: dict[str, Path]) -> None:
    """Bring an engine to these adapters beside its base."""
    result = await load_missing(engine, adapters)
    assert not result.failed
    assert not await unload_unused(engine, adapters.keys)


async def collect(
    engine: Engine, policy_id: str, text: str, *, sampling: Sampling | None = None, request_id: str = "r"
) -> list[Piece]:
    """Return all pieces of an answer; greedy, 24 tokens, unless told otherwise."""
    messages = [{"role": "user", "content": text}]
    sampling = sampling or Sampling(temperature=0.0, max_tokens=24)
    stream = engine.stream(policy_id=policy_id, messages=messages, sampling=sampling, request_id=request_id)
    return [piece async for piece in stream]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]
