"""One server for each data folder, and the lock goes with its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import Busy, StorageUnavailable
from storage.lock import DataLock

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys
from pathlib import Path
from storage.lock import DataLock
with DataLock(Path(sys.argv[1])) as lock:
    lock.announce("http://127.0.0.1:7860")
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(data: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(data)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(data: Path, url: str = "") -> None:
    with DataLock(data, url=url):
        pass


def test_a_second_server_is_told_who_serves_and_what_to_do(tmp_path: Path) -> None:
    with (
        DataLock(tmp_path / "data", url="http://localhost:1"),
        pytest.raises(Busy, match=r"process \d+ \(http://localhost:1\) already serves .*--data"),
    ):
        take(tmp_path / "data")
    take(tmp_path / "data")


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    with pytest.raises(Busy, match=rf"process {holder.pid} \(http://127.0.0.1:7860\)"):
        take(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=10)
    take(tmp_path)


def test_two_folders_have_two_locks(tmp_path: Path) -> None:
    with DataLock(tmp_path / "one"):
        take(tmp_path / "two")


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"pid": 1}', "\0"])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / "server.lock").write_text(content)
    take(tmp_path)
    with DataLock(tmp_path):
        (tmp_path / "server.lock").write_text(content)
        with pytest.raises(Busy, match="another process"):
            take(tmp_path)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DataLock(tmp_path):
        raise ZeroDivisionError
    take(tmp_path)


def test_announcing_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with block"):
        DataLock(tmp_path).announce("http://x")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="--data"):
        take(tmp_path / "file" / "data")
