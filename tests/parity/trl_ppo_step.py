"""TRL 1.12's own PPO step on tables. Usage: .venv-peers/trl-1.12/bin/python -m parity.trl_ppo_step TABLES OUT

`PPOTrainer.train` itself runs; what it asks a model for (answers, logits, values, scores) is looked up in tables whose
entries are the parameters. So everything between the models and the optimiser is TRL's: the KL penalty, the advantages,
their whitening, both clipped losses, the minibatches. Letters: C answers, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from trl.experimental.ppo import ppo_trainer

PAD = -1
"""No answer has it: TRL treats the position after a shorter answer in its own way (docs/benchmarks.md)."""


class Table(torch.nn.Module):
    """A "model" whose logits (C, T, V) and values (C, T) are its parameters; a query is the number of its row."""

    def __init__(self, logits: torch.Tensor, values: torch.Tensor | None = None) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())
        self.values = None if values is None else torch.nn.Parameter(values.clone())

    @property
    def policy(self) -> Table:
        return self

    @property
    def value_model(self) -> Table:
        return self

    def of(self, rows: torch.Tensor) -> Any:
        """Return logits (c, 1 + T, V), and values (c, 1 + T, 1) if there are any."""
        output = SimpleNamespace(logits=torch.nn.functional.pad(self.logits[rows], (0, 0, 0, 1)))
        if self.values is None:
            return output
        return output, torch.nn.functional.pad(self.values[rows], (0, 1)).unsqueeze(-1)


def train(tables: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[Table, dict[str, Any]]:
    """Return the table after one PPO step and what TRL logged; the order of each epoch goes into the log."""
    model, reference = Table(tables["logits"], tables["values"]), Table(tables["reference"])
    responses, scores = tables["responses"], tables["scores"]
    queries = torch.arange(len(responses)).unsqueeze(1)
    orders: list[list[int]] = []
    logged: dict[str, Any] = {"orders": orders}
    shuffle = np.random.default_rng(0)

    def permutation(count: int) -> Any:
        orders.append(shuffle.permutation(count).tolist())
        return np.array(orders[-1])

    def get_reward(asked: Table, rows: torch.Tensor, *_: Any) -> Any:
        return (asked.of(rows[:, 0])[1] if asked is model else None), scores[rows[:, 0]], None

    def generation(*_: Any) -> Any:
        return torch.cat([queries, responses], 1), model.logits.detach() / (config["temperature"] + 1e-7)

    stubs = {
        "forward": lambda asked, rows, pad: asked.of(rows[:, 0]),
        "get_reward": get_reward,
        "batch_generation": generation,
        "unwrap_model_for_generation": lambda asked, *_, **__: contextlib.nullcontext(asked),
    }
    with mock.patch.multiple(ppo_trainer, **stubs), mock.patch.object(np.random, "permutation", permutation):
        ppo_trainer.PPOTrainer.train(trainer(model, reference, queries, config, logged))
    return model, logged


def arguments(config: dict[str, Any], *, count: int, length: int) -> Any:
    """Return TRL's settings: one batch of `count` answers of `length` tokens, and no extras."""
    size = count // config["minibatches"]
    return SimpleNamespace(
        response_length=length,
        temperature=config["temperature"],
        num_ppo_epochs=config["epochs"],
        num_mini_batches=config["minibatches"],
        gradient_accumulation_steps=1,
        num_total_batches=1,
        total_episodes=count,
        logging_steps=None,
        eval_steps=None,
        save_steps=None,
        batch_size=count,
        local_batch_size=count,
        local_mini_batch_size=size,
        per_device_train_batch_size=size,
        local_rollout_forward_batch_size=count,
        ds3_gather_for_generation=False,
        missing_eos_penalty=None,
        kl_estimator="k1",
        kl_coef=config["beta"],
        whiten_rewards=False,
        gamma=config["gamma"],
        lam=config["gae_lambda"],
        cliprange=config["clip_range"],
        cliprange_value=config["value_clip_range"],
        vf_coef=config["value_weight"],
        num_sample_generations=0,
    )


def trainer(
    model: Table, reference: Table, queries: torch.Tensor, config: dict[str, Any], logged: dict[str, Any]
) -> Any:
    """Return what `PPOTrainer.train` reads of its `self`."""
    control = SimpleNamespace(should_save=False)
    count, length = model.logits.shape[:2]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        print=lambda *_: None,
        unwrap_model=lambda asked: asked,
        accumulate=lambda asked: contextlib.nullcontext(),
        backward=lambda loss: loss.backward(),
        gather_for_metrics=lambda value: value,
    )
    events = ("on_train_begin", "on_step_end", "on_train_end")
    callbacks = SimpleNamespace(**{event: lambda *_: control for event in events})
    return SimpleNamespace(
        args=arguments(config, count=count, length=length),
        accelerator=accelerator,
        optimizer=torch.optim.SGD(model.parameters(), lr=config["learning_rate"]),
        model=model,
        ref_model=reference,
        reward_model=None,
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD),
        dataloader=[{"input_ids": queries}],
        state=SimpleNamespace(),
        control=control,
        callback_handler=callbacks,
        is_deepspeed_enabled=False,
        train_dataset_len=count,
        stop_token_id=None,
        lr_scheduler=SimpleNamespace(get_last_lr=lambda: [0.0], step=lambda: None),
        log=logged.update,
    )


def main(tables: Path, out: Path) -> None:
    """Train on a safetensors file and its JSON settings; write the same two kinds."""
    model, logged = train(load_file(tables), json.loads(tables.with_suffix(".json").read_text()))
    save_file({"logits": model.logits.detach(), "values": model.values.detach()}, out)
    out.with_suffix(".json").write_text(json.dumps(logged))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
