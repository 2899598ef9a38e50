"""CPU seconds and memory of Kotae's training beside TRL's, on the same token ids, weights, order and optimiser steps.

Usage: python tests/benchmarks/against_trl.py --method dpo|reward|kto|ppo|all --rounds N [--size small] [--write-docs]

First a small search on a part of the data finds TRL's quickest settings; Kotae runs with its defaults. Then the two sides
alternate, each training in a process of its own. Every measurement is written at once: an interrupted run goes on
where it was when started again with the same arguments. What exactly is measured: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cost_report
from parity import jobs
from parity.jobs import Job, Method, Side

Json = dict[str, Any]
ROOT = jobs.ROOT
RATIOS = {"1:3": (64, 192), "3:1": (192, 64), "5:1": (320, 64)}
"""Prompt tokens to answer tokens, medians."""
METHODS: tuple[Method, ...] = ("dpo", "reward", "kto", "ppo")
BATCH = 16
MICRO_BATCHES = (1, 4, 8, 16)
PPO = {"prompts_per_step": 8, "answers_per_prompt": 2, "epochs": 2}
"""Of a PPO step; its answers are as long as the ratio's median."""


def main() -> int:
    """Measure what is missing, then draw and print."""
    asked = arguments()
    kept = Results(asked.out / "against-trl.json", asked)
    with tempfile.TemporaryDirectory() as folder:
        try:
            measure(asked, kept, Path(folder))
        except KeyboardInterrupt:
            print("interrupted: the measurements so far are kept; the same command goes on from here")
    if not kept.runs():
        return 1
    cost_report.draw(kept.content, asked.out / "against-trl.png")
    print(cost_report.table(kept.content))
    if asked.write_docs:
        cost_report.write_docs(kept.content, ROOT / "docs" / "benchmarks.md")
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Kotae's training cost beside TRL's")
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument(
        "--ratios", nargs="+", choices=RATIOS, default=list(RATIOS), help="prompt:answer tokens"
    )
    parser.add_argument(
        "--size", choices=["tiny", "small", "medium"], default="small", help="of the base model"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--steps", type=int, default=16, help=f"optimiser steps of {BATCH} items")
    parser.add_argument(
        "--epochs", type=int, default=1, help="passes over the items; the steps are divided by it"
    )
    parser.add_argument(
        "--search-steps", type=int, default=2, help="steps that each of TRL's settings is tried for"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "pictures", help="folder of the JSON and the plot"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier measurements")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    return parser.parse_args()


class Results:
    """The measurements so far, on disk after every one."""

    def __init__(self, path: Path, asked: argparse.Namespace) -> None:
        """Read earlier measurements of the same conditions; others are forgotten."""
        self._path = path
        conditions = {
            name: getattr(asked, name) for name in ("size", "threads", "steps", "epochs", "search_steps")
        }
        self.content: Json = {"conditions": conditions, "trl_settings": {}, "runs": [], "machine": machine()}
        if path.exists() and not asked.fresh:
            earlier = json.loads(path.read_text())
            if earlier["conditions"] == conditions:
                self.content = earlier

    def runs(self) -> list[Json]:
        """Return the measurements."""
        runs: list[Json] = self.content["runs"]
        return runs

    def has(self, **what: Any) -> bool:
        """Return whether this was measured."""
        return any(all(run[name] == value for name, value in what.items()) for run in self.runs())

    def add(self, run: Json) -> None:
        """Keep a measurement."""
        self.runs().append(run)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self.content, indent=1))
        aside.replace(self._path)


def machine() -> Json:
    """Return what the figures depend on, and how busy the machine was."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count(), "load_1m": os.getloadavg()[0]}


def measure(asked: argparse.Namespace, kept: Results, folder: Path) -> None:
    """Search TRL's settings, then alternate the sides; the side that goes first changes each round."""
    methods = METHODS if asked.method == "all" else (asked.method,)
    plan = [(method, ratio) for method in methods for ratio in asked.ratios]
    made = {case: make_job(asked, *case, folder) for case in plan}
    for method, ratio in plan:
        if f"{method} {ratio}" not in kept.content["trl_settings"]:
            best = search(made[method, ratio], asked.search_steps, folder)
            kept.content["trl_settings"][f"{method} {ratio}"] = best
            kept.save()
            say(f"{method} {ratio}: TRL is quickest with {best}")
    total, done = 2 * asked.rounds * len(plan), 0
    for number in range(asked.rounds):
        for method, ratio in plan:
            sides: tuple[Side, ...] = ("kotae", "trl") if number % 2 else ("trl", "kotae")
            for side in sides:
                done += 1
                if kept.has(method=method, ratio=ratio, side=side, round=number):
                    continue
                job = replace(made[method, ratio], peer=kept.content["trl_settings"][f"{method} {ratio}"])
                run = run_alone(side, job, folder)
                kept.add({"method": method, "ratio": ratio, "side": side, "round": number, **run})
                say(
                    f"{done}/{total} {method} {ratio} {side}: {run['cpu_s']:.1f} CPU s, peak {run['peak_mb']:.0f} MiB"
                )


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def make_job(asked: argparse.Namespace, method: Method, ratio: str, folder: Path) -> Job:
    """Return the training of one method at one ratio."""
    from alignment.models import LoraSpec
    from parity import material

    size = material.SIZES[asked.size]
    model = material.make_model(folder / "model", size, max_positions=4096)
    adapter = material.make_adapter(folder / "adapter", model, LoraSpec(rank=16, alpha=32))
    lengths = material.Lengths(prompt=RATIOS[ratio][0], answer=RATIOS[ratio][1])
    if method == "ppo":
        return make_ppo_job(asked, lengths, model, adapter)
    make = material.make_thumbs if method == "kto" else material.make_pairs
    items = make(BATCH * max(1, asked.steps // asked.epochs), lengths, vocabulary=size.vocabulary)
    return material.make_job(
        method, items, model=model, adapter=adapter, batch=BATCH, epochs=asked.epochs, threads=asked.threads
    )


def make_ppo_job(asked: argparse.Namespace, lengths: Any, model: Path, adapter: Path) -> Job:
    """Return a PPO training of about as many optimiser steps; every answer has the median length."""
    from parity import material

    steps = max(1, asked.steps // PPO["epochs"])
    prompts = material.make_pairs(
        steps * PPO["prompts_per_step"], lengths, vocabulary=material.SIZES[asked.size].vocabulary
    )
    return material.make_ppo_job(
        [{"prompt": item["prompt"]} for item in prompts],
        model=model,
        adapter=adapter,
        threads=asked.threads,
        steps=steps,
        max_new_tokens=lengths.answer,
        **PPO,
    )


def search(job: Job, steps: int, folder: Path) -> Json:
    """Return TRL's quickest settings on the first steps: the micro-batch first, then what else changes its speed."""
    if job.method == "ppo":
        short = replace(job, settings={**job.settings, "steps": 1})
        return _quickest(
            short, [{"micro_batch": size, "rollout_batch": size} for size in MICRO_BATCHES[1:]], folder
        )
    short = replace(job, order=job.order[:steps], rates=job.rates[:steps])
    least = 2 if job.method == "kto" else 1  # KTO's z0 needs two answers
    sizes = [{"micro_batch": size, "sort": True} for size in MICRO_BATCHES if size >= least]
    best = _quickest(short, sizes, folder)
    others: list[Json] = [{"sort": False}]
    others += [] if job.method == "reward" else [{"precompute": False}]
    return _quickest(short, [best, *({**best, **other} for other in others)], folder)


def _quickest(job: Job, candidates: Sequence[Json], folder: Path) -> Json:
    """Try the settings in one process; return the ones that took the least CPU."""
    paths = [
        jobs.write_job(replace(job, peer=peer), folder / f"search-{number}.json")
        for number, peer in enumerate(candidates)
    ]
    results = jobs.run("trl", paths, method=job.method, threads=job.threads)
    return min(zip(candidates, results, strict=True), key=lambda pair: pair[1]["cpu_s"])[0]


def run_alone(side: Side, job: Job, folder: Path) -> Json:
    """Carry out one job in its own process; return what it and the system measured.

    Raises:
        RuntimeError: the process failed.
    """
    path = jobs.write_job(job, folder / "job.json")
    command, own = jobs.command(side, job.method, [path]), jobs.environment(job.threads)
    with (folder / "job.log").open("w+") as log:
        child = subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True)
        try:
            _, status, used = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGKILL)
            os.wait4(child.pid, 0)
            raise
        if status:
            log.seek(0)
            raise RuntimeError(f"{side}: {log.read()[-3000:]}")
    result = jobs.read_result(path, side)
    losses = result.pop("losses")
    return {
        **result,
        "process_cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
        "mean_loss": statistics.fmean(losses),
        "load_1m": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
