"""Watching what was decided: a way back is followed while the engine is at work on something else."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from assistant import release
from chat_fixtures import Desk, make_real_desk
from release_fixtures import approve, candidate
from storage.people import SYSTEM


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


@pytest.mark.parametrize("by_page", [False, True])
def test_a_failed_canary_stops_answering_while_a_shadow_is_being_loaded(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_page: bool
) -> None:
    canary, shadow = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, canary, canary_percent=50)
    monkeypatch.setattr("assistant.release.RECHECK_S", 1.0)
    store, asked = desk.world.store, {"policy_id": shadow.id, "person": desk.world.admin, "reason": "a look"}

    async def seconds_to_follow() -> float:
        loading = asyncio.Event()

        async def hangs(**_: object) -> None:
            loading.set()
            await asyncio.sleep(3600)

        watching = asyncio.create_task(desk.release.watch())
        await asyncio.sleep(0.1)
        monkeypatch.setattr(desk.engine, "load", hangs)
        if by_page:
            page = asyncio.create_task(desk.release.approve(**asked, shadow_percent=50))  # type: ignore[arg-type]
        else:
            release.approve(store, **asked, shadow_percent=50)  # type: ignore[arg-type]
        await loading.wait()
        await asyncio.sleep(1.2)  # the watcher has looked again, and waits for the page
        release.retire(
            store, policy_id=canary.id, actor=SYSTEM, reason="canary failed: another policy answered"
        )
        began = time.monotonic()
        while desk.release.served.canary is not None and time.monotonic() - began < 5:
            await asyncio.sleep(0.02)
        took_s = time.monotonic() - began
        for task in [watching, *([page] if by_page else [])]:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return took_s

    assert asyncio.run(seconds_to_follow()) < 1.5  # the watcher looks once a second


def test_a_watcher_that_is_stopped_leaves_no_load_behind(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")

    async def tasks_left() -> int:
        async def hangs(**_: object) -> None:
            await asyncio.sleep(3600)

        monkeypatch.setattr(desk.engine, "load", hangs)
        watching = asyncio.create_task(desk.release.watch())
        await asyncio.sleep(0.2)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return len(asyncio.all_tasks())

    assert asyncio.run(tasks_left()) == 1  # this one
