"""Wall seconds and GPU memory of Kotae's training beside TRL's, bfloat16: same ids, weights, order and optimiser steps.

Usage: python tests/benchmarks/against_trl_gpu.py --size qwen-0.5b --rounds 2 --out FOLDER
TRL is taken from the folder in KOTAE_TRL_FOLDER, else from .venv-peers.

Both sides draw the same random weights. First TRL tries its settings on a part of the data, one group after the other;
Kotae runs with its defaults. Then the sides alternate, a process a side and round: it trains a step of each case before
anything is measured, then every case. What is measured: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from parity import jobs
from parity.jobs import SIDES, Job, Method, Side

Json = dict[str, Any]
Case = tuple[Method, str]
RATIOS = {"1:3": (256, 768), "3:1": (768, 256), "5:1": (853, 171)}
"""Prompt tokens to answer tokens, medians: 1,024 together."""
BATCH = 16
RANK = 16
PPO = {"prompts_per_step": 16, "answers_per_prompt": 2, "epochs": 2}
"""Of a PPO step; its answers are as long as the ratio's median."""


def main() -> int:
    """Measure, print the table, and write everything as JSON."""
    asked = arguments().parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        content = measure(asked, Path(folder))
    print(table(content))
    return 0


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Kotae's training cost on a GPU beside TRL's")
    parser.add_argument("--methods", nargs="+", choices=["dpo", "kto", "reward", "ppo"], default=["dpo"])
    parser.add_argument("--ratios", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--size", choices=["tiny", "small", "qwen-0.5b", "qwen-7b"], default="qwen-0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help=f"optimiser steps of {BATCH} items")
    parser.add_argument("--search-steps", type=int, default=2, help="steps TRL's settings are tried for")
    parser.add_argument(
        "--search",
        nargs="+",
        default=["micro"],
        help="what TRL tries, in turn: micro, checkpointing, sort, precompute, liger",
    )
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[16, 8, 4], help="TRL's, to be tried")
    parser.add_argument("--shorter", type=int, default=1, help="divide all lengths by this, for a CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    return parser


def measure(asked: argparse.Namespace, folder: Path) -> Json:
    """Let TRL choose its settings, then alternate the sides; the side that goes first changes each round."""
    plan: list[Case] = [(method, ratio) for method in asked.methods for ratio in asked.ratios]
    made = {case: make_job(asked, case, folder) for case in plan}
    settings = search(asked, made, folder)
    made = {case: replace(job, peer=settings[case]) for case, job in made.items()}
    content: Json = {
        "conditions": {key: str(value) for key, value in vars(asked).items()},
        "trl_settings": {" ".join(case): found for case, found in settings.items()},
        "flops": {" ".join(case): training_flops(job, asked.size) for case, job in made.items()},
        "matmul_tflops": matmul_tflops(asked.device),
        "runs": [],
    }
    for number in range(asked.rounds):
        for side in SIDES if number % 2 else SIDES[::-1]:
            for case, result in zip(made, run(side, list(made.values()), folder), strict=True):
                about = {"method": case[0], "ratio": case[1], "side": side, "round": number}
                content["runs"].append({**about, **result, "mean_loss": statistics.fmean(result["losses"])})
                say(f"{' '.join(case)} {side}: {result['wall_s']:.2f} s, {result['gpu_peak_mb']:.0f} MiB")
            # After every side: a run that is stopped at a limit leaves what it has measured.
            (asked.out / f"against-trl-{asked.size}.json").write_text(json.dumps(content, indent=1))
    return content


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def make_job(asked: argparse.Namespace, case: Case, folder: Path) -> Job:
    """Return the training of one case."""
    from alignment.models import LoraSpec
    from parity import material

    method, ratio = case
    size = material.SIZES[asked.size]
    model = material.make_model(folder / "model", size, max_positions=32768, weights=False)
    adapter = material.make_adapter(folder / "adapter", model, LoraSpec(rank=RANK, alpha=32))
    prompt, answer = (max(1, tokens // asked.shorter) for tokens in RATIOS[ratio])
    lengths = material.Lengths(prompt=prompt, answer=answer)
    if method == "ppo":
        count = PPO["prompts_per_step"] * asked.steps
        prompts = material.make_pairs(count, lengths, vocabulary=size.vocabulary)
        plain = material.make_ppo_job(
            [{"prompt": item["prompt"]} for item in prompts],
            model=model,
            adapter=adapter,
            steps=asked.steps,
            max_new_tokens=answer,
            **PPO,
        )
        return replace(plain, device=asked.device, dtype=asked.dtype)
    make = material.make_thumbs if method == "kto" else material.make_pairs
    return material.make_job(
        method,
        make(BATCH * asked.steps, lengths, vocabulary=size.vocabulary),
        model=model,
        adapter=adapter,
        batch=BATCH,
        epochs=1,
        device=asked.device,
        dtype=asked.dtype,
        settings={"learning_rate": 5e-4},
    )


def search(asked: argparse.Namespace, made: dict[Case, Job], folder: Path) -> dict[Case, Json]:
    """Return TRL's quickest settings of each case, tried on the first steps, all in one process.

    PPO's are not looked for: 32 answers of 1,024 tokens in a micro-batch did not fit into 140 GiB.
    """
    micro = {"micro_batch": min(asked.micro_batches), "rollout_batch": max(asked.micro_batches)}
    ppo = {case: micro for case in made if case[0] == "ppo"}
    made = {case: job for case, job in made.items() if case[0] != "ppo"}
    if not made:
        return ppo
    groups: dict[str, list[Json]] = {
        "micro": [{"micro_batch": size} for size in asked.micro_batches],
        "checkpointing": [{"micro_batch": BATCH, "checkpointing": True}],
        "sort": [{"sort": False}],
        "precompute": [{"precompute": True}],
        "liger": [{"liger": asked.device != "cpu"}],
    }
    # On an H200 precomputed reference log-probs took 2.4 to 2.9 times as long.
    start = {"micro_batch": min(asked.micro_batches), "sort": True, "precompute": False}
    peer = {**start, "choices": [groups[name] for name in asked.search]}
    steps = asked.search_steps
    short = [
        replace(job, order=job.order[:steps], rates=job.rates[:steps], peer=peer) for job in made.values()
    ]
    found = run("trl", short, folder)
    for case, result in zip(made, found, strict=True):
        say(f"{' '.join(case)}: TRL is quickest with {result['peer']} of {result['tried']}")
    return ppo | {case: result["peer"] for case, result in zip(made, found, strict=True)}


def run(side: Side, work: Sequence[Job], folder: Path) -> list[Json]:
    """Carry out the jobs in one process, after a step of each that is not measured; return what the side measured."""
    warm = [first_step(job) for job in work]
    every = [*warm, *work]
    paths = [jobs.write_job(job, folder / f"{side}-{number}.json") for number, job in enumerate(every)]
    return jobs.run(side, paths, method=work[0].method, threads=os.cpu_count() or 1)[len(warm) :]


def first_step(job: Job) -> Job:
    """Return the job's first step alone, without settings to choose from."""
    if job.method == "ppo":
        return replace(job, settings={**job.settings, "steps": 1})
    peer = {name: value for name, value in job.peer.items() if name != "choices"}
    items = [job.items[number] for number in job.order[0]]
    return replace(job, items=items, order=[list(range(BATCH))], rates=job.rates[:1], peer=peer)


def training_flops(job: Job, size: str) -> float:
    """Return the floating-point operations that the training takes at least: with each prompt once, and no padding.

    Of n weights in the linear layers, l of the adapter on them, t tokens, p pairs of tokens that see each other, Q numbers
    of all query heads a layer, and a answer tokens with a head of V x D: 2 n t + 4 Q p + 2 V D a for a forward pass of the
    frozen model, which the reference needs; with the adapter 2 l t more; backward as much again, as the frozen weights
    have no gradient, and 2 l t for the adapter's. A reward model has neither reference nor such a head. The scores that
    attention computes again are not counted. Of PPO nothing is counted.
    """
    from transformers import AutoConfig

    from alignment.memory import layer_parameters, lora_parameters, shape_of

    shape = shape_of(AutoConfig.from_pretrained(job.model))
    forward = tokens = 0.0
    for number in (number for step in job.order for number in step):
        item = job.items[number]
        prompt = len(item["prompt"])
        answers = [len(item[name]) for name in ("chosen", "rejected", "answer") if name in item]
        pairs = prompt**2 / 2 + sum(prompt * each + each**2 / 2 for each in answers)
        tokens += prompt + sum(answers)
        forward += 2 * shape.layers * layer_parameters(shape) * (prompt + sum(answers))
        forward += 4 * shape.layers * shape.query_width * pairs
        if job.method != "reward":
            forward += 2 * shape.vocabulary * shape.hidden * sum(answers)
    return (2 if job.method == "reward" else 3) * forward + 6 * lora_parameters(shape, RANK) * tokens


def matmul_tflops(device: str, *, size: int = 8192, count: int = 20) -> float:
    """Return what a bfloat16 matrix product of this size reaches here; on a CPU a small one."""
    import torch

    if device == "cpu":
        size, count = 512, 2
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for number in range(2 * count):
        if number == count:
            synchronise(device)
            begin = time.monotonic()
        torch.mm(one, one)
    synchronise(device)
    return 2 * size**3 * count / (time.monotonic() - begin) / 1e12


def synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def table(content: Json) -> str:
    """Return the measurements as a Markdown table, medians with the range over the rounds."""
    rows = [
        "| method | prompt : answer | wall s, Kotae | wall s, TRL | TRL / Kotae | of a matmul's FLOP/s, Kotae "
        "| peak MiB, Kotae | peak MiB, TRL | mean loss, Kotae | mean loss, TRL | first loss, difference | TRL's settings |",
        "|" + " --- |" * 12,
    ]
    for case, settings in content["trl_settings"].items():
        found = {
            side: [
                run
                for run in content["runs"]
                if (f"{run['method']} {run['ratio']}", run["side"]) == (case, side)
            ]
            for side in SIDES
        }
        wall, peak, loss = (
            {side: [run[name] for run in runs] for side, runs in found.items()}
            for name in ("wall_s", "gpu_peak_mb", "mean_loss")
        )
        first = [
            abs(one["losses"][0] - other["losses"][0]) for one, other in zip(*found.values(), strict=True)
        ]
        middle = {side: statistics.median(values) for side, values in wall.items()}
        times = [theirs / ours for ours, theirs in zip(wall["kotae"], wall["trl"], strict=True)]
        share = content["flops"][case] / middle["kotae"] / content["matmul_tflops"] / 1e12
        cells = [
            *case.split(" "),
            *(f"{middle[side]:.2f} ({min(wall[side]):.2f}–{max(wall[side]):.2f})" for side in SIDES),
            f"**{middle['trl'] / middle['kotae']:.2f}×** ({min(times):.2f}–{max(times):.2f})",
            f"{share:.0%} of {content['matmul_tflops']:.0f}",
            *(f"{statistics.median(peak[side]):.0f}" for side in SIDES),
            *(f"{statistics.fmean(loss[side]):.4f}" for side in SIDES),
            f"{max(first):.1e}",
            ", ".join(f"{name} {value}" for name, value in settings.items()),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
