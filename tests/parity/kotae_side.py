"""Carry out jobs with Kotae's own training functions. Usage: python -m parity.kotae_side JOB.json ..."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from alignment import reward_training
from alignment.dpo import train_dpo
from alignment.kto import train_kto
from alignment.memory import plan_batches
from alignment.models import Base, adapter_parameters, load_adapter, load_base
from alignment.ppo import PpoConfig, train_ppo
from alignment.preferences import Pair, Thumb
from alignment.progress import Silent
from alignment.reward_items import make_items
from alignment.reward_model import TrainedReward
from alignment.training_config import DpoConfig, KtoConfig, RewardConfig
from parity.jobs import Job, output, write_result
from parity.random_weights import drawn, has_weights
from parity.usage import Meter

Json = dict[str, Any]
NAMES = {"dpo": "policy", "kto": "policy", "reward": "reward_0", "ppo": "policy"}


class Losses(Silent):
    """Keeps the loss of every optimiser step."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.values: list[float] = []

    def step(self, done: int, message: str = "", **metrics: float) -> None:
        if self._name in metrics:
            self.values.append(metrics[self._name])


def pairs_of(job: Job) -> list[Pair]:
    """Return the job's pairs as Kotae's training takes them."""
    return [
        Pair(
            id=f"pair-{number}",
            prompt_ids=tuple(item["prompt"]),
            chosen_ids=tuple(item["chosen"]),
            rejected_ids=tuple(item["rejected"]),
            weight=1.0,
            margin=item["margin"],
            source="comparison",
            prompt_key=f"prompt-{number}",
            rater="rater",
        )
        for number, item in enumerate(job.items)
    ]


def thumbs_of(job: Job) -> list[Thumb]:
    """Return the job's thumbs as Kotae's training takes them."""
    return [
        Thumb(
            id=f"thumb-{number}",
            prompt_ids=tuple(item["prompt"]),
            answer_ids=tuple(item["answer"]),
            up=item["up"],
            weight=1.0,
            prompt_key=f"prompt-{number}",
            rater="rater",
        )
        for number, item in enumerate(job.items)
    ]


def train(base: Base, job: Job, losses: Losses) -> dict[str, torch.Tensor]:
    """Carry out the job; return the head, if there is one."""
    if job.method == "dpo":
        train_dpo(base, pairs_of(job), DpoConfig(**job.settings), seed=job.seed, progress=losses)
        return {}
    if job.method == "kto":
        train_kto(base, thumbs_of(job), KtoConfig(**job.settings), seed=job.seed, progress=losses)
        return {}
    if job.method == "ppo":
        prompts = [item["prompt"] for item in job.items]
        train_ppo(base, prompts, scorer(base, job), PpoConfig(**job.settings), seed=job.seed, progress=losses)
        return {}
    config = RewardConfig(**job.settings)
    items = make_items(base, pairs_of(job), [], config, seed=job.seed)
    real = {"fit_heads": reward_training.fit_heads, "last_states": reward_training.last_states}
    fit = (
        real if job.fit_heads else {name: mock.Mock() for name in real}
    )  # the states are read for the fit only
    with mock.patch.multiple(reward_training, **fit):
        heads, _ = reward_training.train_member_heads(
            base,
            NAMES["reward"],
            items,
            config,
            seed=job.seed,
            progress=losses,
            former=torch.tensor([job.head]),
        )
    return {"head": heads}


def scorer(base: Base, job: Job) -> TrainedReward:
    """Return a reward model of one member: the job's adapter and head."""
    load_adapter(base, "reward_0", Path(job.adapter), trainable=False)
    heads = torch.tensor([[job.head]], device=base.device)  # (1, 1, D)
    return TrainedReward(
        base=base, adapters=("reward_0",), heads=heads, metrics={}, config=RewardConfig(members=1)
    )


def load(model: str, *, device: str, dtype: str) -> Base:
    """Load the base; of a model without weights, with those that TRL's side draws too."""
    if has_weights(model):
        return load_base(model, device=device, dtype=dtype)

    def draw(folder: str, *, dtype: torch.dtype, attn_implementation: str) -> torch.nn.Module:
        return drawn(folder, dtype=dtype, device=device)

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", draw):
        return load_base(model, device=device, dtype=dtype)


def longest(job: Job) -> int:
    """Return the tokens of the largest prompt with its answers."""
    names = ("prompt", "chosen", "rejected", "answer")
    return max(sum(len(item.get(name, ())) for name in names) for item in job.items)


def carry_out(path: Path) -> None:
    """Read a job, train, and write what came out."""
    job = Job(**json.loads(path.read_text()))
    torch.set_num_threads(job.threads)
    gc.collect()
    torch.cuda.empty_cache()  # of the job before
    name = NAMES[job.method]
    base = load(job.model, device=job.device, dtype=job.dtype)
    load_adapter(base, name, Path(job.adapter), trainable=True)
    losses = Losses("policy/loss" if job.method == "ppo" else f"{job.method}/loss")
    meter = Meter()
    if job.device != "cpu":
        plan_batches(base, longest=longest(job), rank=base.model.peft_config[name].r)
    head = train(base, job, losses)
    write_result(path, "kotae", losses=losses.values, usage=meter.read())
    factors = {
        key.split("layers.", 1)[1].replace(f".{name}.", "."): value.detach()
        for key, value in adapter_parameters(base, name).items()
    }
    save_file(
        {key: value.contiguous() for key, value in {**factors, **head}.items()},
        output(path, "kotae", "safetensors"),
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        carry_out(Path(argument))
