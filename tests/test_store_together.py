"""One store under threads and processes at once: nothing is lost, nobody sees half a change."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage import audit, settings
from storage.errors import Busy
from storage.records import Conversation, Person, Turn
from storage.store import Store
from storage_fixtures import World, make_world, outside, record, start_conversation

ROOT = Path(__file__).parent.parent
WRITER = """
import sys
from pathlib import Path
from storage_fixtures import World, make_turn
from storage import conversations, people, policies, deployments
from storage.store import Store
store = Store(Path(sys.argv[1]))
served = deployments.served(store)
world = World(store=store, admin=None, staff=people.person_named(store, "Staff"), other=None,
              base=policies.get_policy(store, served.stable.policy_id), deployment=served.stable)
conversation = conversations.get_conversation(store, sys.argv[2])
for _ in range(int(sys.argv[3])):
    turn = make_turn(world, conversation)
    conversations.record_turn(store, turn)
    print(turn.id, flush=True)
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "data")


def start_writer(world: World, conversation: Conversation, turns: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(world.store.data), conversation.id, str(turns)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_data_version_changes_with_a_commit_of_any_thread_and_only_then(world: World) -> None:
    first = world.store.data_version()
    assert world.store.data_version() == first
    settings.put(world.store, "a", 1, "system")
    second = world.store.data_version()
    assert second != first
    other = Store(world.store.data)
    settings.put(other, "a", 2, "system")
    assert world.store.data_version() != second


def open_files(world: World) -> int:
    """Return how many files of the data folder this process has open."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.is_relative_to(world.store.data) for link in links)


def test_connections_of_ended_threads_are_closed(world: World) -> None:
    gc.collect()
    gc.disable()
    try:
        before = open_files(world)
        for _ in range(20):
            thread = threading.Thread(target=world.store.all, args=(Person,))
            thread.start()
            thread.join()
        assert open_files(world) <= before + 3  # at most the last thread's database, log and index
    finally:
        gc.enable()


def test_a_writer_that_never_ends_is_reported_as_busy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = outside(world)
    connection.execute("BEGIN IMMEDIATE")
    world.store._connection().execute("PRAGMA busy_timeout = 50")
    with pytest.raises(Busy, match="try again"):
        settings.put(world.store, "a", 1, "system")
    connection.execute("ROLLBACK")
    connection.close()
    settings.put(world.store, "a", 1, "system")


def test_reads_in_a_block_see_one_moment(world: World) -> None:
    other = Store(world.store.data)
    with world.store.reading():
        before = settings.get(world.store, "a")
        settings.put(other, "a", "later", "system")
        assert settings.get(world.store, "a") == before
    assert settings.get(world.store, "a") == "later"


def test_opening_the_same_new_folder_at_once_works_for_everybody(tmp_path: Path) -> None:
    for round_number in range(5):
        ready, opened = threading.Barrier(6), list[Store]()

        def open_it(folder: Path = tmp_path / str(round_number), ready: threading.Barrier = ready) -> None:
            ready.wait(timeout=10)
            opened.append(Store(folder))  # noqa: B023 - joined before the next round

        threads = [threading.Thread(target=open_it) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 6
        for store in opened:
            store.close()


def test_threads_and_processes_writing_at_once_lose_nothing(world: World) -> None:
    conversation, written = start_conversation(world), list[str]()

    def write() -> None:
        for _ in range(40):
            written.append(record(world, conversation).id)

    processes = [start_writer(world, conversation, 150) for _ in range(2)]
    for process in processes:  # so that all are under way together
        assert process.stdout is not None
        written.append(process.stdout.readline().strip())
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        assert process.stdout is not None
        written += process.stdout.read().split()
        process.stdout.close()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(written) == 4 * 40 + 2 * 150
    assert {turn.id for turn in world.store.all(Turn)} == set(written)
    assert audit.verify(world.store).ok


def test_what_was_committed_survives_a_killed_writer(world: World) -> None:
    conversation, promised = start_conversation(world), list[str]()
    for round_number in range(5):
        process = start_writer(world, conversation, 100_000)
        assert process.stdout is not None
        promised += [process.stdout.readline().strip() for _ in range(3 + 7 * round_number)]
        time.sleep(0.003 * round_number)
        process.send_signal(signal.SIGKILL)
        promised += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait(timeout=10)
        process.stdout.close()
    kept = {turn.id for turn in world.store.all(Turn)}
    assert set(promised) <= kept
    assert len(promised) >= 85
    assert audit.verify(world.store).ok
    assert world.store.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}]


def test_a_forked_process_opens_its_own_connection(world: World) -> None:
    reader, writer = os.pipe()
    parents = world.store._connection()
    child = os.fork()
    if child == 0:
        try:
            settings.put(world.store, "from child", True, "system")
            os.write(writer, b"parent's" if world.store._connection() is parents else b"own")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"own"
    os.close(reader)
    os.close(writer)
    assert settings.get(world.store, "from child") is True


def test_opening_a_second_store_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """Closing any descriptor of the file would drop them, and another process could then take the log away."""
    first = Store(tmp_path)
    Store(tmp_path).close()
    code = (
        "import sys; from pathlib import Path; from storage.store import Store\n"
        "Store(Path(sys.argv[1])).close()"  # the last one to close removes the log
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "kotae.db-wal").exists()
    first.close()
    assert not (tmp_path / "kotae.db-wal").exists()
