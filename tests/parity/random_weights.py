"""Random weights that both sides draw alike, on their device: to write and read those of a large model takes minutes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification


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


def classifier(model: Any) -> Any:
    """Return the causal LM's layers under a scalar head in place of its own."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        made = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    made.model, weight = model.model, made.score.weight
    made.score = torch.nn.Linear(weight.shape[1], 1, bias=False, device=model.device, dtype=model.dtype)
    return made
