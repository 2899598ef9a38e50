"""What is particular to the engine in this process; what every engine must do is in test_engine_contract.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from assistant.engine.errors import EngineBusy, EngineUnavailable, StreamBroken
from assistant.engine.local import LocalEngine
from assistant.engine.protocol import Sampling
from engine_fixtures import BASE, CONTEXT, collect, ids_of
from tiny_models import make_tiny_model

QUESTION = "Where is my order?"


def test_a_local_engine_that_is_full_says_so(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, max_positions=CONTEXT)

    async def fill() -> None:
        engine = LocalEngine(str(model), base_name=BASE, max_waiting=2)
        waiting = [asyncio.create_task(collect(engine, BASE, QUESTION)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="2 requests"):
            await collect(engine, BASE, QUESTION)
        await asyncio.gather(*waiting)
        cut = asyncio.create_task(
            collect(engine, BASE, QUESTION, sampling=Sampling(temperature=0.0, max_tokens=400))
        )
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(StreamBroken):
            await cut
        with pytest.raises(EngineUnavailable, match="closed"):
            await collect(engine, BASE, QUESTION)
        assert not (await engine.health()).ready

    asyncio.run(fill())


def test_a_temperature_too_small_to_divide_by_is_raised_as_vllm_does(tmp_path: Path) -> None:
    """1e-40 made infinities of the logits, which cannot be drawn from."""
    model = make_tiny_model(tmp_path, max_positions=CONTEXT)

    async def answers() -> list[list[int]]:
        engine = LocalEngine(str(model), base_name=BASE)
        try:
            samplings = [
                Sampling(temperature=value, top_p=0.9, max_tokens=8, seed=3) for value in (0.01, 0.009, 1e-40)
            ]
            return [ids_of(await collect(engine, BASE, QUESTION, sampling=one)) for one in samplings]
        finally:
            await engine.close()

    smallest, *smaller = asyncio.run(answers())
    assert smaller == [smallest, smallest]
