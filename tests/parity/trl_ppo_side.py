"""Carry out PPO jobs with TRL 1.12's trainer. Usage: .venv-peers/trl-1.12/bin/python -m parity.trl_ppo_side JOB.json ...

For the cost only: both sides draw their answers, so their numbers differ. Policy and critic are LoRA adapters on models of
their own, as TRL needs them; the reference is the policy with its adapter off; the reward model is a fourth set of weights.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from parity.jobs import Job, write_result
from parity.random_weights import classifier, drawn, has_weights
from parity.usage import Meter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(job: Job, **more: Any) -> LoraConfig:
    """Return the shape of the job's adapter."""
    about = json.loads((Path(job.adapter) / "adapter_config.json").read_text())
    return LoraConfig(
        r=about["r"],
        lora_alpha=about["lora_alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEAR,
        **more,
    )


def load(job: Job) -> dict[str, Any]:
    """Return policy, critic and reward model."""

    dtype = getattr(torch, job.dtype)

    def scorer() -> Any:
        if not has_weights(job.model):
            return classifier(drawn(job.model, dtype=dtype, device=job.device))
        return AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)

    def policy() -> Any:
        if not has_weights(job.model):
            return drawn(job.model, dtype=dtype, device=job.device)
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)

    critic = get_peft_model(scorer(), lora(job, task_type="SEQ_CLS", modules_to_save=["score"]))
    return {
        "model": policy(),
        "value_model": critic,
        "reward_model": scorer().requires_grad_(False),
    }


def arguments(job: Job, folder: str) -> PPOConfig:
    """Return TRL's settings for the job: as many answers, epochs and optimiser steps."""
    own = job.settings
    answers = own["prompts_per_step"] * own["answers_per_prompt"]
    micro = job.peer.get("micro_batch", answers)
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=answers // micro,
        num_mini_batches=own["minibatches"],
        num_ppo_epochs=own["epochs"],
        total_episodes=answers * own["steps"],
        local_rollout_forward_batch_size=job.peer.get("rollout_batch", answers),
        response_length=own["max_new_tokens"],
        temperature=own["temperature"],
        learning_rate=own["learning_rate"],
        kl_coef=own["beta"],
        missing_eos_penalty=None,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=job.dtype == "bfloat16",
        use_cpu=job.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def carry_out(path: Path) -> None:
    """Read a job, train, and write what it cost."""
    job = Job(**json.loads(path.read_text()))
    torch.set_num_threads(job.threads)
    gc.collect()
    torch.cuda.empty_cache()  # of the job before
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    rows = [
        {"input_ids": item["prompt"]} for item in job.items for _ in range(job.settings["answers_per_prompt"])
    ]
    models = load(job)
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter()
        trainer = PPOTrainer(
            args=arguments(job, folder),
            processing_class=tokenizer,
            ref_model=None,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:1]),
            peft_config=lora(job, task_type="CAUSAL_LM"),
            **models,
        )
        trainer.train()
        usage = meter.read()
    write_result(
        path, "trl", losses=[entry["loss/policy_avg"] for entry in trainer.state.log_history], usage=usage
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        carry_out(Path(argument))
