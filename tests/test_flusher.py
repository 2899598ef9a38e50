"""Answers wait for no disk: they are flushed soon after, several at once, and all of them before the end."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chat_fixtures import make_desk
from storage import conversations, settings
from storage.errors import StorageUnavailable
from storage.flusher import Flusher
from storage.people import SYSTEM
from storage.store import MERGE_AFTER, Store
from storage_fixtures import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


class Disk:
    """Flushes that last until they are let go."""

    def __init__(self) -> None:
        self.begun, self.go, self.count = threading.Semaphore(0), threading.Semaphore(0), 0

    def flush(self) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=10)
        self.count += 1


def test_changes_that_come_during_a_flush_share_the_next() -> None:
    disk = Disk()
    flusher = Flusher(disk.flush)
    flusher.soon()
    assert disk.begun.acquire(timeout=10)
    for _ in range(5):
        flusher.soon()
    for _ in range(2):
        disk.go.release()
    flusher.stop()
    assert disk.count == 2


def test_the_end_waits_for_what_is_left() -> None:
    disk = Disk()
    flusher = Flusher(disk.flush)
    flusher.soon()
    ending = threading.Thread(target=flusher.stop)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()
    disk.go.release()
    ending.join(10)
    assert not ending.is_alive()
    assert disk.count == 1
    Flusher(disk.flush).stop()  # nothing was changed
    assert disk.count == 1


def test_a_flush_that_fails_is_logged_and_the_next_one_made(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []
    tried = threading.Semaphore(0)

    def flush() -> None:
        tries.append(1)
        tried.release()
        if len(tries) == 1:
            raise StorageUnavailable("--data: cannot write to /data: No space left on device")

    flusher = Flusher(flush)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            flusher.soon()
            assert tried.acquire(timeout=10)
        flusher.stop()
    assert len(tries) == 2
    assert "No space left on device" in caplog.text


def test_a_flush_syncs_the_log_of_the_data(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    world.store.flush()
    assert [Path(path).name for path in synced] == ["kotae.db-wal"]


def test_a_flush_finds_the_log_beside_the_file_that_a_link_names(tmp_path: Path) -> None:
    store = make_world(tmp_path / "first").store
    store.close()
    linked = tmp_path / "second"
    linked.mkdir()
    (linked / "kotae.db").symlink_to(tmp_path / "first" / "kotae.db")
    with closing(Store(linked)) as again:
        again.flush()


def test_a_disk_that_refuses_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(StorageUnavailable, match=r"^--data: cannot write to .*: No space left on device"):
        world.store.flush()


def test_an_answer_that_ends_after_the_stop_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, waited = make_desk(tmp_path), []
    record = conversations.record_turn

    def seen(*arguments: Any, durable: bool, **named: Any) -> None:
        waited.append(durable)
        record(*arguments, durable=durable, **named)

    monkeypatch.setattr(conversations, "record_turn", seen)

    async def scenario() -> None:
        for _ in range(2):
            await desk.chat.complete(desk.chat.ask(desk.world.staff, desk.conversation, "Hello?"))
            await desk.chat.stop()

    for _ in range(2):
        desk.engine.enqueue(["A."])
    asyncio.run(scenario())
    assert waited == [False, True]


def test_an_answer_is_told_before_it_is_on_the_disk_and_there_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    monkeypatch.setattr(Store, "flush", lambda store: disk.flush())
    desk = make_desk(tmp_path)

    async def scenario() -> None:
        for number, question in enumerate(("One?", "Two?", "Three?")):
            ask = desk.chat.ask(desk.world.staff, desk.conversation, question)
            turn = await asyncio.wait_for(desk.chat.complete(ask), timeout=10)
            # Another connection sees it, as a process that starts after this one was killed would.
            with closing(Store(desk.world.store.data)) as other:
                assert conversations.get_turn(other, turn.id) == turn
            if number == 0:
                assert await asyncio.to_thread(disk.begun.acquire, timeout=10)
        assert disk.count == 0
        ending = asyncio.create_task(desk.chat.stop())
        await asyncio.sleep(0.1)
        assert not ending.done()
        for _ in range(2):
            disk.go.release()
        await asyncio.wait_for(ending, timeout=10)

    for _ in range(3):
        desk.engine.enqueue(["A."])
    asyncio.run(scenario())
    assert disk.count == 2  # the first answer's, and one for the other two


def merged_pages(world: World) -> int:
    """Return the size of the database without its log."""
    return (world.store.data / "kotae.db").stat().st_size // 4096


def test_the_log_is_brought_into_the_database_by_flushes_and_by_no_commit(world: World) -> None:
    before = merged_pages(world)
    for number in range(MERGE_AFTER):
        if number == MERGE_AFTER // 2:
            world.store.flush()  # too soon
        settings.put(world.store, f"large {number}", "x" * 100_000, actor=SYSTEM)
    assert (world.store.data / "kotae.db-wal").stat().st_size > 2000 * 4096
    assert merged_pages(world) == before
    world.store.flush()
    assert merged_pages(world) > before + 2000
