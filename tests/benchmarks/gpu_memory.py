"""What `alignment.memory` expects of a micro-batch on a GPU beside what torch measures, and what checkpointing costs.

Usage: python tests/benchmarks/gpu_memory.py --out FOLDER. A step is the forward and backward pass of a micro-batch of
pairs, on random weights; its peak is counted from before the step, gradients among it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from alignment.batching import Batch, collate, make_tree
from alignment.logprobs import GPU_LOGITS_A_CHUNK, completion_sums, token_logprobs
from alignment.memory import WIDE, estimate, lora_parameters, shape_of
from alignment.models import Base, LoraSpec, active, adapter_parameters, add_policy
from alignment.packed import packs
from parity import material
from parity.kotae_side import load

Json = dict[str, Any]
CASES = (("qwen-0.5b", 4096, 512), ("qwen-0.5b", 16384, 2048), ("qwen-1.5b", 8192, 1024))
"""Model, tokens of a micro-batch, tokens of a prompt with its two answers."""
TINY = (("tiny", 512, 128),)
REPEATS = 3


def main() -> int:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description="the memory estimate on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="for a CPU: nothing is measured, but every line runs"
    )
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size, tokens, row in TINY if asked.tiny else CASES:
        rows += measured(size, tokens, row, asked.device)
    (asked.out / "gpu-memory.json").write_text(json.dumps(rows, indent=1))
    print(
        "| model | tokens | tokens a row | checkpointing | estimate MiB | measured MiB | estimate / measured | ms |"
    )
    print("|" + " --- |" * 8)
    for found in rows:
        ratio = found["estimate_mb"] / max(found["measured_mb"], 1e-9)
        about = [found["size"], found["tokens"], found["row"], "on" if found["checkpointing"] else "off"]
        numbers = [
            f"{found['estimate_mb']:.0f}",
            f"{found['measured_mb']:.0f}",
            f"{ratio:.2f}",
            f"{found['ms']:.0f}",
        ]
        print("| " + " | ".join(map(str, [*about, *numbers])) + " |")
    return 0


def measured(size: str, tokens: int, row: int, device: str) -> list[Json]:
    """Return a line without checkpointing and one with it."""
    gc.collect()
    torch.cuda.empty_cache()
    spec = LoraSpec()
    with tempfile.TemporaryDirectory() as folder:
        model = material.make_model(Path(folder), material.SIZES[size], max_positions=32768, weights=False)
        base = load(str(model), device=device, dtype="bfloat16")
    add_policy(base, spec, seed=0)
    shape = shape_of(base.model.config)
    part = row // 4
    tree = make_tree([5] * 2 * part, [[6] * part, [7] * part])
    batch = collate([tree] * (tokens // row), share=True, pad_id=base.pad_id, device=base.device)
    rows = []
    for base.checkpointing in (False, True):
        step(base, batch)
        peak, times = zip(*(step(base, batch) for _ in range(REPEATS)), strict=True)
        expected = estimate(
            shape,
            rank=spec.rank,
            width=2,
            batch_tokens=tokens,
            packed_row=row,
            checkpointing=base.checkpointing,
            logits_a_chunk=GPU_LOGITS_A_CHUNK,
        )
        needed = expected.activations + expected.logits + lora_parameters(shape, spec.rank) * WIDE
        rows.append(
            {
                "size": size,
                "tokens": tokens,
                "row": row,
                "packed": packs(base),
                "checkpointing": base.checkpointing,
                "estimate_mb": needed / 2**20,
                "measured_mb": max(peak) / 2**20,
                "ms": 1000 * statistics.median(times),
            }
        )
    return rows


def step(base: Base, batch: Batch) -> tuple[int, float]:
    """Return what a forward and backward pass took at most, in bytes, and the seconds of it."""
    for parameter in adapter_parameters(base, "policy").values():
        parameter.grad = None
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated() if on_gpu else 0, time.monotonic()
    with active(base, "policy", trainable=True):
        completion_sums(token_logprobs(base, batch), batch).sum().backward()  # type: ignore[no-untyped-call]
    if on_gpu:
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before if on_gpu else 0, time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
