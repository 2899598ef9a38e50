"""A managed server that does not start, or falls silent: it is tried again, and whoever asks hears the cause."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from assistant.engine import supervisor
from assistant.engine.errors import EngineAbsent, EngineStarting, EngineUnavailable
from assistant.engine.supervisor import VllmProcess
from assistant.server import Boot
from supervisor_fixtures import STAND_IN, options, until

FAILS_TWICE = """
from pathlib import Path
tries = Path(sys.argv[2]) / "tries"
count = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (count + 1))
if count < 2:
    print("what it printed before")
    raise RuntimeError("CUDA out of memory")
"""
FALLS_SILENT = """
import time
from pathlib import Path
hang = Path(sys.argv[2]) / "hang"
def do_GET(self):
    while hang.exists():
        time.sleep(0.1)
    self.send_response(200); self.end_headers()
Handler.do_GET = do_GET
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "backoff_s", lambda deaths: 0.0)


def failing_twice(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-c", f"import sys{FAILS_TWICE}{STAND_IN}", str(port), str(folder)]


def test_a_first_boot_that_fails_is_tried_again_and_told_with_its_cause_and_last_words(
    tmp_path: Path,
) -> None:
    deaths: list[float] = []

    async def death() -> None:
        deaths.append(time.monotonic())

    async def scenario() -> None:
        server = VllmProcess(
            options(tmp_path), serve=lambda port: failing_twice(port, tmp_path), on_restart=death
        )
        try:
            with pytest.raises(EngineUnavailable, match="RuntimeError: CUDA out of memory"):
                await server.start(keep_trying=True)
            assert server.state == "restarting"
            assert "exit code 1 while starting: RuntimeError: CUDA out of memory" in server.detail
            assert "what it printed before" in server.detail
            said = Boot().explain(server)
            assert isinstance(said, EngineStarting)
            assert "CUDA out of memory" in str(said)
            await until(lambda: server.state == "ready")
            assert Boot().explain(server) is None
            assert (tmp_path / "tries").read_text() == "xxx"
            assert deaths == []  # nobody's policy was in it yet
        finally:
            await server.stop()

    asyncio.run(scenario())


def test_a_server_that_never_starts_is_given_up_with_its_cause(tmp_path: Path) -> None:
    async def scenario() -> None:
        broken = [sys.executable, "-c", "raise SystemExit('no such model')"]
        server = VllmProcess(options(tmp_path), serve=lambda port: broken)
        with pytest.raises(EngineUnavailable, match="no such model"):
            await server.start(keep_trying=True)
        await until(lambda: server.state == "down")
        said = Boot().explain(server)
        assert type(said) is EngineAbsent
        assert "5 times" in str(said)
        assert "no such model" in str(said)
        await server.stop()

    asyncio.run(scenario())


def test_a_disk_that_takes_no_log_is_told_as_the_cause(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = VllmProcess(options(tmp_path), serve=lambda port: failing_twice(port, tmp_path))
        (tmp_path / "logs").write_text("in the way")
        with pytest.raises(EngineUnavailable, match=r"File exists.*logs"):
            await server.start(keep_trying=True)
        (tmp_path / "logs").unlink()
        await until(lambda: server.state == "ready")
        await server.stop()

    asyncio.run(scenario())


def test_a_server_that_lives_and_answers_nothing_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SILENT_S", 1.0)
    monkeypatch.setattr(supervisor, "LOOK_S", 0.2)
    monkeypatch.setattr(supervisor, "TERMINATE_TIMEOUT_S", 2.0)
    program = STAND_IN.replace("print(", f"{FALLS_SILENT}\nprint(", 1)
    restarts: list[str] = []

    async def scenario() -> None:
        async def again() -> None:
            restarts.append(server.detail)

        server = VllmProcess(
            options(tmp_path),
            serve=lambda port: [sys.executable, "-c", program, str(port), str(tmp_path)],
            on_restart=again,
        )
        async with server:
            first = server.pid
            await asyncio.sleep(2)
            assert (server.pid, server.state) == (first, "ready")  # one that answers is left alone
            (tmp_path / "hang").touch()
            await until(lambda: server.state == "restarting")
            assert "did not answer for 1 s" in server.detail
            (tmp_path / "hang").unlink()
            await until(lambda: restarts)
            assert server.state == "ready"
            assert server.pid != first

    asyncio.run(scenario())
