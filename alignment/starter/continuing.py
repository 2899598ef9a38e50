"""Continues a finished starter model on a corpus that has grown: its weights and tokenizer, a schedule of its own.

The tokenizer stays as it is: one learnt from the grown corpus would number the pieces anew. Optimizer and the head
that recognises answer groups begin afresh, as the exported model has neither.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.starter.checkpoint import TRAINING_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from alignment.starter.training import TrainingOptions

STEPS = 4000
RESTARTS = (2000,)


def continued_options(options: TrainingOptions) -> TrainingOptions:
    """The options of a continuation: two short cycles, and no stage of cut answers, as it already understands."""
    return replace(
        options, steps=STEPS, restarts=RESTARTS, examples=replace(options.examples, early_chunks=0)
    )


def start_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model to start from."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(_file(folder, "tokenizer.json")))


def take_weights(model: Any, folder: Path) -> None:
    """Puts the weights of an exported model into ``model``, its ``sharpness`` taken back.

    Raises:
        FileNotFoundError: the folder lacks a file of an exported starter model.
        ValueError: the weights are of another shape.
    """
    import torch
    from safetensors.torch import load_file

    weights = load_file(_file(folder, "model.safetensors"))
    mine = model.state_dict()
    for name, value in weights.items():
        if name not in mine or mine[name].shape != value.shape:
            found, wanted = list(value.shape), list(mine[name].shape) if name in mine else "nothing"
            raise ValueError(
                f"start-from: {folder}: {name} has shape {found} where {wanted} is trained; choose a starter model"
            )
    with torch.no_grad():
        for name, value in weights.items():
            mine[name].copy_(value)
        mine["model.norm.weight"].div_(_training(folder)["sharpness"])


def start_record(folder: Path) -> dict[str, Any]:
    """What ``training.json`` says of the start: the digest of its weights and how it was trained itself."""
    digest = hashlib.sha256(_file(folder, "model.safetensors").read_bytes()).hexdigest()
    return {"weights_sha256": digest, "training": _training(folder)}


def _training(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_file(folder, TRAINING_FILE).read_text(encoding="utf-8"))
    return found


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"start-from: {folder} has no {name}; name the folder of a trained starter model"
        )
    return folder / name
