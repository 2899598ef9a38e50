"""Carry out jobs with TRL 1.16's trainers. Usage: .venv-peers/trl-1.16/bin/python -m parity.trl_side JOB.json ...

A job with settings to choose from (`peer["choices"]`) is tried with each of a group; what makes it quicker stays.

It sees nothing of Kotae but the job. Of TRL it replaces three things only: the tokenisation (token ids are given), the
learning-rate schedule (the job's), and it listens to the loss of each micro-batch.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from parity.jobs import Job, output, write_result
from parity.random_weights import classifier, drawn, has_weights
from parity.usage import Meter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def exact(trainer: Any, job: Job, losses: list[torch.Tensor]) -> Any:
    """Return the trainer class with the job's ids and schedule; `losses` gets each micro-batch's share of its step."""

    class Exact(trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            highest = self.args.learning_rate
            factors = [rate / highest for rate in [*job.rates, 0.0]]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factors[min(step, len(job.rates))]
            )
            return self.lr_scheduler

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())  # read at the end: on a GPU reading waits
            return loss

    return Exact


def common(job: Job, folder: str) -> dict[str, Any]:
    """Return the arguments that all three trainers share."""
    batch = len(job.order[0])
    micro = job.peer.get("micro_batch", batch)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "gradient_checkpointing": job.peer.get("checkpointing", False),
        "num_train_epochs": 1,  # the order spells all epochs out
        "train_sampling_strategy": "sequential",
        "learning_rate": max(job.rates),
        "weight_decay": job.settings.get("weight_decay", 0.0),
        "max_grad_norm": job.settings.get("gradient_clip", 1.0),
        "optim": "adamw_torch",
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "use_liger_kernel": job.peer.get("liger", False),
        "max_length": None,
        "dataloader_pin_memory": job.device != "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def ordered(job: Job) -> list[dict[str, Any]]:
    """Return the items of all steps; sorted by length inside a step where that helps the micro-batches."""
    steps = [[job.items[number] for number in step] for step in job.order]
    if job.peer.get("sort", False):
        steps = [sorted(step, key=_tokens) for step in steps]
    return [item for step in steps for item in step]


def _tokens(item: dict[str, Any]) -> int:
    answers = [len(item[name]) for name in ("chosen", "rejected", "answer") if name in item]
    return len(item["prompt"]) + max(answers)


def lora(job: Job, **more: Any) -> LoraConfig:
    """Return the shape of the adapter that the job starts from."""
    about = json.loads((Path(job.adapter) / "adapter_config.json").read_text())
    return LoraConfig(
        r=about["r"],
        lora_alpha=about["lora_alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEAR,
        **more,
    )


def load(job: Job) -> Any:
    """Return the base model, with a scalar head for a reward model."""
    dtype = getattr(torch, job.dtype)
    if not has_weights(job.model):
        model = drawn(job.model, dtype=dtype, device=job.device)
        return classifier(model) if job.method == "reward" else model
    if job.method == "reward":
        return AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)


def data_set(rows: list[dict[str, Any]]) -> Dataset:
    """Return the rows under a name of their own: TRL would take reference log-probs from an earlier job's cache."""
    made = Dataset.from_list(rows)
    made._fingerprint = uuid.uuid4().hex
    return made


def dpo(model: Any, job: Job, losses: list[torch.Tensor], folder: str) -> Any:
    """Return a DPOTrainer; cDPO is the combination of its sigmoid and robust losses that equals it."""
    e = job.settings.get("flip_rate", 0.0)
    kinds: dict[str, tuple[list[str], list[float]]] = {
        "dpo": (["sigmoid"], [1.0]),
        "cdpo": (["sigmoid", "robust"], [2 * (1 - e), -(1 - 2 * e)]),
        "robust": (["robust"], [1.0]),
        "ipo": (["ipo"], [1.0]),
    }
    loss_type, loss_weights = kinds[job.settings["loss"]]
    rows = [{f"{name}_ids": item[name] for name in ("prompt", "chosen", "rejected")} for item in ordered(job)]
    return exact(DPOTrainer, job, losses)(
        model=model,
        args=DPOConfig(
            **common(job, folder),
            beta=job.settings["beta"],
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=e,
            precompute_ref_log_probs=job.peer.get("precompute", True),
        ),
        train_dataset=data_set(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job, task_type="CAUSAL_LM"),
    )


def kto(model: Any, job: Job, losses: list[torch.Tensor], folder: str) -> Any:
    """Return a KTOTrainer; the mismatched answers are those of the thumb before in the micro-batch, as TRL makes them."""
    arguments = common(job, folder)
    size = arguments["per_device_train_batch_size"]
    items = ordered(job)
    rows = [
        {
            "prompt_ids": item["prompt"],
            "completion_ids": item["answer"],
            "KL_completion_ids": items[place - 1 if place % size else place + size - 1]["answer"],
            "label": item["up"],
        }
        for place, item in enumerate(items)
    ]
    return exact(KTOTrainer, job, losses)(
        model=model,
        args=KTOConfig(
            **arguments,
            beta=job.settings["beta"],
            loss_type=job.settings["loss"],
            desirable_weight=job.settings["desirable_weight"],
            undesirable_weight=job.settings["undesirable_weight"],
            precompute_ref_log_probs=job.peer.get("precompute", True),
        ),
        train_dataset=data_set(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job, task_type="CAUSAL_LM"),
    )


def reward(model: Any, job: Job, losses: list[torch.Tensor], folder: str) -> Any:
    """Return a RewardTrainer."""
    rows = [
        {
            "chosen_ids": item["prompt"] + item["chosen"],
            "rejected_ids": item["prompt"] + item["rejected"],
            "margin": item["margin"],
        }
        for item in ordered(job)
    ]
    return exact(RewardTrainer, job, losses)(
        model=model,
        args=RewardConfig(**common(job, folder), center_rewards_coefficient=job.settings["centring"]),
        train_dataset=data_set(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job, task_type="SEQ_CLS", modules_to_save=["score"]),
    )


TRAINERS = {"dpo": dpo, "kto": kto, "reward": reward}


def factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by the names that both sides use."""
    found = {}
    for name, value in model.named_parameters():
        if "lora_" in name:
            found[name.split("layers.", 1)[1].replace(".default.", ".")] = value
        elif name.endswith("score.modules_to_save.default.weight"):
            found["head"] = value
    return found


def put_start(model: torch.nn.Module, job: Job) -> None:
    """Give the trainer's adapter and head the job's weights."""
    start = load_file(Path(job.adapter) / "adapter_model.safetensors")
    weights = {name.split("layers.", 1)[1]: value for name, value in start.items()}
    if job.head is not None:
        weights["head"] = torch.tensor([job.head])
    own = factors(model)
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def carry_out(path: Path) -> None:
    """Read a job, train, and write what came out."""
    job = Job(**json.loads(path.read_text()))
    torch.set_num_threads(job.threads)
    least, seen = math.inf, {}
    for choices in job.peer.pop("choices", []):
        took = [tried(job, choice, seen) for choice in choices]
        if min(took) < least:
            least = min(took)
            job.peer.update(choices[took.index(least)])
    usage, losses, model = trained(job)
    write_result(path, "trl", losses=losses, usage=usage, peer=job.peer, tried=seen)
    weights = {name: value.detach().contiguous() for name, value in factors(model).items()}
    save_file(weights, output(path, "trl", "safetensors"))


def tried(job: Job, choice: dict[str, Any], seen: dict[str, str]) -> float:
    """Return the seconds that the job takes with these settings, infinitely many if it fails, and note it in `seen`."""
    peer = {**job.peer, **choice}
    try:
        took = trained(replace(job, peer=peer))[0]["wall_s"]
        seen[json.dumps(peer)] = f"{took:.2f} s"
    except Exception as error:  # too little memory, or kernels that do not run here
        took, seen[json.dumps(peer)] = math.inf, repr(error)[:200]
    return took


def trained(job: Job) -> tuple[dict[str, float], list[float], torch.nn.Module]:
    """Carry out the job; return what it took, the loss of each step, and the model."""
    gc.collect()
    torch.cuda.empty_cache()  # of the job before
    micro_losses: list[torch.Tensor] = []
    model = load(job)
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter()
        trainer = TRAINERS[job.method](model, job, micro_losses, folder)
        put_start(trainer.model, job)  # B = 0 in both: the reference log-probs were the base's
        trainer.train()
        usage = meter.read()
    values = [float(loss) for loss in micro_losses]
    each = len(values) // len(job.order)
    return usage, [sum(values[at : at + each]) for at in range(0, len(values), each)], trainer.model


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        carry_out(Path(argument))
