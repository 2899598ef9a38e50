"""Random weights that both sides draw alike, on their device: to write and read those of a large model takes minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def has_weights(folder: str) -> bool:
    """Return whether the model's folder holds weights."""
    return any(Path(folder).glob("*.safetensors"))


def drawn(folder: str, *, dtype: torch.dtype, device: str) -> Any:
    """Return the causal LM of the folder's configuration: on one kind of device always the same."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )
