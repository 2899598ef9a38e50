"""A training job that Kotae and TRL both carry out, as a JSON file, and how to run it in either environment.

Without torch: the benchmark's own process stays small. Each side writes `<job>.<side>.json` (the losses of the optimiser
steps, CPU seconds, memory) and `<job>.<side>.safetensors` (the trained LoRA factors, and a head if there is one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
TRL = ROOT / ".venv-peers" / "trl-1.16" / "bin" / "python"
TRL_FOLDER = "KOTAE_TRL_FOLDER"
"""Environment variable: a folder with TRL's packages for this Python, where there is no .venv-peers. Its name must be
site-packages: of modules that lie elsewhere dill, with which datasets makes its fingerprints, copies the content."""
TRL_WITH_PPO = ROOT / ".venv-peers" / "trl-1.12" / "bin" / "python"
Side = Literal["kotae", "trl"]
Method = Literal["dpo", "kto", "reward", "ppo"]
SIDES: tuple[Side, ...] = ("kotae", "trl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training; everything that both sides must agree on."""

    method: Method
    model: str
    """Folder of the base model."""
    adapter: str
    """PEFT folder with the LoRA factors to start from."""
    items: list[dict[str, Any]]
    """Pairs {prompt, chosen, rejected, margin}, thumbs {prompt, answer, up} or, for PPO, {prompt}, as token ids."""
    order: list[list[int]]
    """The items of each optimiser step, all of one size. PPO, whose answers are drawn, has none."""
    rates: list[float]
    """Learning rate of each optimiser step."""
    settings: dict[str, Any]
    """Of Kotae's configuration dataclass (loss, beta, gradient_clip, ...)."""
    seed: int = 0
    head: list[float] | None = None
    """Start of a reward model's head."""
    fit_heads: bool = False
    """Whether Kotae fits the heads first, which TRL does not."""
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    """Of the frozen base."""
    peer: dict[str, Any] = field(default_factory=dict)
    """TRL's own settings that change speed only (micro-batch, precomputed reference log-probs, checkpointing)."""


def write_job(job: Job, path: Path) -> Path:
    """Write the job for the two sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(job)))
    return path


def output(job: Path, side: Side, suffix: str) -> Path:
    """Return where a side writes its `json` or `safetensors`."""
    return job.with_suffix(f".{side}.{suffix}")


def read_result(job: Path, side: Side) -> dict[str, Any]:
    """Return what a side measured."""
    result: dict[str, Any] = json.loads(output(job, side, "json").read_text())
    return result


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a child: no network, quiet, as many threads as asked."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get(TRL_FOLDER)])]
        ),
    }


def command(side: Side, method: Method, jobs: Sequence[Path]) -> list[str]:
    """Return the command line that carries out the jobs of a method one after the other."""
    own = side == "kotae" or os.environ.get(TRL_FOLDER)
    python = sys.executable if own else str(TRL_WITH_PPO if method == "ppo" else TRL)
    module = "trl_ppo_side" if (side, method) == ("trl", "ppo") else f"{side}_side"
    return [python, "-m", f"parity.{module}", *map(str, jobs)]


def run(
    side: Side, jobs: Sequence[Path], *, method: Method = "dpo", threads: int = 1
) -> list[dict[str, Any]]:
    """Carry out the jobs in one process of that side; return the results. PPO's take an environment of their own.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    done = subprocess.run(
        command(side, method, jobs), env=environment(threads), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{side}: {(done.stdout + done.stderr)[-3000:]}")
    return [read_result(job, side) for job in jobs]


def write_result(
    job: Path, side: Side, *, losses: Sequence[float], usage: Mapping[str, float], **more: Any
) -> None:
    """Write what a side measured."""
    output(job, side, "json").write_text(json.dumps({"losses": list(losses), **usage, **more}))
