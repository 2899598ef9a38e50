"""Random chat models of real models' shapes, bfloat16, and adapters on them, for measurements of serving.

Their vocabulary is that of the tiny tests' tokenizer, so that every token is text: embedding and head are smaller than
the real ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from parity.material import SIZES, make_model
from tiny_models import make_adapter

RANK = 16
SCALE = 0.05
"""Standard deviation of both factors: at rank 16 the update is as large as the weights of the shapes, 0.02."""


def make_shaped_model(folder: Path, shape: str) -> Path:
    """Write a random model of the shape, drawn where it is quickest; return its folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = replace(SIZES[shape], vocabulary=0)
    return make_model(folder, size, device=device, dtype=torch.bfloat16)


def make_shaped_adapter(folder: Path, model: Path) -> Path:
    """Write a random adapter of rank 16 on all its linear layers; return its folder."""
    return make_adapter(folder, model, seed=1, rank=RANK, scale=SCALE)
