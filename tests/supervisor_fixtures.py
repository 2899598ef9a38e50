"""A small stand-in program for vLLM's server, for the tests of what keeps that running."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from assistant.engine import process_group
from assistant.engine.supervisor import VllmOptions
from engine_fixtures import BASE

STAND_IN = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
print("non-default args: stand-in", flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "VLLM::EngineCore"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


STUCK = """
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(b'vllm:generation_tokens_total{engine="0"} 5.0')
    def do_POST(self):
        time.sleep(float(sys.argv[2])); os._exit(1)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def options(tmp_path: Path, *, boot_timeout_s: float = 20) -> VllmOptions:
    return VllmOptions(model="some/model", base_name=BASE, data=tmp_path, boot_timeout_s=boot_timeout_s)


def stand_in(port: int) -> list[str]:
    """A server with a child, as vLLM is."""
    return [sys.executable, "-c", STAND_IN, str(port)]


def stuck(port: int, *, ends_after_s: float) -> list[str]:
    """A server that is healthy, as it says, gives no token, and ends so long after it was asked for one."""
    return [sys.executable, "-c", STUCK, str(port), str(ends_after_s)]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def group_of(pid: int) -> list[int]:
    leader = process_group.Leader(pid=pid, started_at=psutil.Process(pid).create_time())
    return [process.pid for process in process_group.members(leader, is_ours=lambda process: True)]


async def until(happened: Callable[[], object], *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)
