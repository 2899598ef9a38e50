"""What a shadow costs a person inside the server: time to the first token and of the whole answer, over the fake engine.

`PYTHONPATH=.:tests python tests/benchmarks/shadow_cost.py` asks three desks in turn: one without a shadow, one whose shadow
hangs until it is broken off, one whose shadow answers and is recorded. What the engine's own steps cost is not in it.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

from assistant.engine.protocol import Piece
from chat_fixtures import Desk, make_desk, put_beside
from storage_fixtures import start_conversation

QUESTIONS = 150
PAUSE_S = 0.01
"""Between two questions: the shadow has begun by then."""


def shaded(folder: Path, *, hangs: bool) -> Desk:
    """Return a desk with a shadow that is asked everything."""
    desk = make_desk(folder)
    shadow = put_beside(desk, "shadow")
    stream = desk.engine.stream

    async def hang(**asked: Any) -> AsyncIterator[Piece]:
        if asked["policy_id"] == shadow.policy_id:
            await asyncio.Event().wait()
        async for piece in stream(**asked):
            yield piece

    if hangs:
        desk.engine.stream = hang  # type: ignore[assignment,method-assign]
    return desk


async def ask(desk: Desk) -> tuple[float, float]:
    """Return the seconds to the first token and to the end of one answer."""
    conversation = start_conversation(desk.world)
    question = desk.chat.ask(desk.world.staff, conversation, "Hello there, where is my parcel?")
    started, times_s = time.perf_counter(), []
    async for _ in desk.chat.reply(question):
        times_s.append(time.perf_counter() - started)
    return times_s[0], times_s[-1]


async def measure(desks: dict[str, Desk]) -> None:
    """Ask all desks in turn and print the medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in desks}
    for _ in range(QUESTIONS):
        for name, desk in desks.items():
            times[name].append(await ask(desk))
            await asyncio.sleep(PAUSE_S)
    for name, pairs in times.items():
        first, whole = (median(pair[place] for pair in pairs) for place in (0, 1))
        print(f"{name:10}first token {first * 1e3:.3f} ms, whole answer {whole * 1e3:.2f} ms")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        asyncio.run(
            measure(
                {
                    "none": make_desk(root / "none"),
                    "hangs": shaded(root / "hangs", hangs=True),
                    "answers": shaded(root / "answers", hangs=False),
                }
            )
        )
