"""What sampling in this process costs on a GPU: transformers' pass, our packed passes, and those with recorded steps.

Usage: python tests/benchmarks/gpu_sampling.py --out FOLDER. Prompts of random tokens, an adapter on all linear layers; no
answer ends early, so that every way draws as many tokens. Each way draws a short answer first, which is not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from alignment import flash_rollouts, rollouts
from alignment.models import Base, LoraSpec, add_policy
from alignment.rollouts import sample
from benchmarks.against_trl_gpu import synchronise
from benchmarks.gpu_numerics import STARTER
from learning_fixtures import randomise
from parity import material
from parity.kotae_side import load

Json = dict[str, Any]
WAYS = ("transformers", "packed", "packed, recorded")


def main() -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description="sampling on a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="qwen-0.5b", choices=material.SIZES, help="of the random model")
    parser.add_argument("--rows", nargs="+", type=int, default=[32, 256], help="answers at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        other = material.make_model(
            Path(folder), material.SIZES[asked.size], max_positions=4096, weights=False
        )
        found = [
            timed(base, name, rows, way, asked)
            for name, path in (("starter", STARTER), (asked.size, other))
            for base in [made(path, asked.device)]
            for rows in asked.rows
            for way in WAYS
        ]
    (asked.out / "gpu-sampling.json").write_text(json.dumps(found, indent=1))
    return 0


def made(path: Path, device: str) -> Base:
    """Return the model with an adapter that is not zero, and without an end of an answer."""
    base = load(str(path), device=device, dtype="float32" if device == "cpu" else "bfloat16")
    add_policy(base, LoraSpec(rank=16, alpha=32), seed=0)
    randomise(base, "policy", seed=0, spread=0.02)
    base.stop_ids = frozenset()
    return base


@contextmanager
def only(way: str) -> Iterator[None]:
    """Let sampling take this way alone."""
    with mock.patch.object(
        rollouts, "packs", (lambda base: False) if way == "transformers" else rollouts.packs
    ):
        if way == "packed, recorded":
            yield
            return
        with mock.patch.object(flash_rollouts, "_Recorded", lambda read, *_: read):
            yield


def timed(base: Base, name: str, rows: int, way: str, asked: argparse.Namespace) -> Json:
    """Return the seconds that the answers took."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        5, min(1500, base.model.config.vocab_size), (rows, asked.prompt), generator=draw
    ).tolist()
    with only(way):
        sample(base, prompts, adapter="policy", max_new_tokens=4)
        synchronise(asked.device)
        begin = time.monotonic()
        sample(base, prompts, adapter="policy", max_new_tokens=asked.answer)
        synchronise(asked.device)
        took = time.monotonic() - begin
    speed = rows * asked.answer / took
    print(
        f"{name:10} {rows:4} rows {way:17} {took:7.2f} s {1000 * took / asked.answer:6.1f} ms a step {speed:8.0f} tokens/s",
        flush=True,
    )
    return {"model": name, "rows": rows, "way": way, "wall_s": took, "tokens_per_s": speed}


if __name__ == "__main__":
    sys.exit(main())
