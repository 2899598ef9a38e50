"""How far bfloat16 on a GPU is from float32 there: log-probs, LoRA gradients and a DPO training on the starter model.

Usage: python tests/benchmarks/gpu_numerics.py --out FOLDER. In bfloat16 Kotae's packed pass and transformers' own are both
compared with transformers' own in float32, on pairs of random tokens under an adapter that is not zero.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from alignment.batching import Batch, Tree, collate, make_tree
from alignment.dpo import train_dpo
from alignment.logprobs import head_logprobs, hidden_states, states_at
from alignment.models import Base, LoraSpec, active, adapter_parameters, add_policy, head, load_base
from alignment.packed import packs
from alignment.training_config import DpoConfig
from learning_fixtures import make_pairs, randomise
from parity import material
from parity.jobs import ROOT
from parity.kotae_side import Losses, load

Json = dict[str, Any]
Pass = Callable[[Base, Batch], torch.Tensor]
STARTER = ROOT / "alignment" / "starter" / "checkpoint"


def main() -> int:
    """Print and write the table and the two trainings' losses."""
    parser = argparse.ArgumentParser(description="bfloat16 on a GPU beside float32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="qwen-0.5b", choices=material.SIZES, help="of the random model")
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt and of an answer, medians")
    parser.add_argument("--steps", type=int, default=20, help="of the training")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        other = material.make_model(Path(folder), material.SIZES[asked.size], weights=False)
        content: Json = {
            "starter": compared(STARTER, asked, vocabulary=2048),
            asked.size: compared(other, asked, vocabulary=material.SIZES[asked.size].vocabulary),
            "dpo_losses": {dtype: trained(asked, dtype) for dtype in ("float32", "bfloat16")},
        }
    (asked.out / "gpu-numerics.json").write_text(json.dumps(content, indent=1))
    show(content)
    return 0


def own_pass(base: Base, batch: Batch) -> torch.Tensor:
    return hidden_states(base, batch)[batch.predictors.to(base.device)]


def kotaes_pass(base: Base, batch: Batch) -> torch.Tensor:
    return states_at(base, batch, batch.predictors)


def compared(model: Path, asked: argparse.Namespace, *, vocabulary: int) -> Json:
    """Return how far log-probs (nats) and gradients (of their norm) of each pass are from float32's."""
    lengths = material.Lengths(prompt=asked.tokens, answer=asked.tokens)
    trees = [
        make_tree(item["prompt"], [item["chosen"], item["rejected"]])
        for item in material.make_pairs(4, lengths, vocabulary=vocabulary)
    ]
    exact = with_adapter(model, asked.device, "float32")
    truth = passed(exact, trees, own_pass, share=False)
    del exact
    base = with_adapter(model, asked.device, "bfloat16")
    result: Json = {"packed": packs(base)}
    for name, way, share in (
        ("Kotae, a prompt once", kotaes_pass, True),
        ("Kotae, an answer a row", kotaes_pass, False),
        ("transformers, an answer a row", own_pass, False),
    ):
        logprobs, slopes = passed(base, trees, way, share=share)
        away = logprobs - truth[0]
        result[name] = {
            "mean_nats": float(away.abs().mean()),
            "largest_nats": float(away.abs().max()),
            "bias_nats": float(away.mean()),
            "gradients_of_norm": float((slopes - truth[1]).norm() / truth[1].norm()),
        }
    return result


def with_adapter(model: Path, device: str, dtype: str) -> Base:
    """Load the model with an adapter "policy" that is not zero."""
    base = load(str(model), device=device, dtype=dtype)
    add_policy(base, LoraSpec(), seed=0)
    randomise(base, "policy", seed=0, spread=0.02)
    return base


def passed(base: Base, trees: Sequence[Tree], way: Pass, *, share: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs of the answers' tokens, and the adapter's gradients of their mean, end to end."""
    batch = collate(trees, share=share, pad_id=base.pad_id, device=base.device)
    layer = head(base)
    with active(base, "policy", trainable=True):
        logprobs = head_logprobs(way(base, batch), layer.weight, batch.targets)
        slopes = torch.autograd.grad(logprobs.mean(), list(adapter_parameters(base, "policy").values()))
    return logprobs.detach().cpu(), torch.cat([slope.flatten() for slope in slopes]).cpu()


def trained(asked: argparse.Namespace, dtype: str) -> list[float]:
    """Return the losses of a DPO training of the starter model on random pairs, seen several times."""
    base = load_base(str(STARTER), device=asked.device, dtype=dtype)
    add_policy(base, LoraSpec(), seed=0)
    config = DpoConfig(**{**material.EQUAL["dpo"], "learning_rate": 2e-4, "epochs": asked.steps // 4})
    losses = Losses("dpo/loss")
    train_dpo(base, make_pairs(4 * config.batch_pairs), config, seed=0, progress=losses)
    return losses.values


def show(content: Json) -> None:
    """Print the table and the losses."""
    print("| model | bfloat16 | log-probs off, mean nats | largest | bias | gradients off, of their norm |")
    print("|" + " --- |" * 6)
    for model, found in content.items():
        for name, off in found.items():
            if isinstance(off, dict):
                numbers = " | ".join(f"{value:.2g}" for value in off.values())
                print(f"| {model} | {name} | {numbers} |")
    print(
        "packed pass taken:",
        {model: found["packed"] for model, found in content.items() if "packed" in found},
    )
    for dtype, losses in content["dpo_losses"].items():
        print(f"DPO on the starter, {dtype}:", " ".join(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    sys.exit(main())
