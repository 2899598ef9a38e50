"""Writes the finished model as a plain Hugging Face folder that every engine loads without custom code."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.starter.tokenizer import chat_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINING_FILE = "training.json"  # the options the model was trained with


def export(
    model: Any, *, tokenizer: Tokenizer, folder: Path, sharpness: float, training: dict[str, Any]
) -> None:
    """Writes weights stored in bf16, configuration, tokenizer, template and the options of the training.

    The logits grow by ``sharpness``, through the weight of the last norm: temperature 1 is then what 1/sharpness was
    for the network as trained. A network this small spreads a few per cent over words that derail an answer.
    """
    import torch
    import transformers

    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        plain.model.norm.weight.mul_(sharpness)
    plain.to(torch.bfloat16)
    generation: Any = transformers.GenerationConfig
    plain.generation_config = generation(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=256,
    )
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder)
    chat_tokenizer(tokenizer).save_pretrained(folder)
    _say_float32(folder / "config.json")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def _say_float32(path: Path) -> None:
    """Engines compute in float32, so that equally likely manners are not decided by rounding."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
