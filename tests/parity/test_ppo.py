"""PPO's mathematics against a whole step of TRL 1.12's `PPOTrainer.train` on the same tables."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.ppo_losses import (
    advantages_and_returns,
    kl_k1,
    policy_clipped,
    policy_losses,
    token_rewards,
    value_clipped,
    value_losses,
    whitened,
)
from parity.jobs import TRL_WITH_PPO, environment

pytestmark = pytest.mark.timeout(3600)  # on a busy machine imports alone take minutes
ANSWERS, TOKENS, VOCABULARY = 8, 6, 11
CONFIG: dict[str, Any] = {
    "temperature": 0.7,
    "epochs": 3,
    "minibatches": 2,
    "beta": 0.05,
    "gamma": 0.98,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_weight": 0.1,
    "learning_rate": 20.0,  # of SGD, which unlike Adam sees the scale of a loss; large: both clips must bite
}
Tables = dict[str, torch.Tensor]


def make_tables() -> Tables:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(ANSWERS, TOKENS, VOCABULARY, generator=generator)
    return {
        "logits": logits,
        "reference": logits + 0.3 * torch.randn(logits.shape, generator=generator),
        "values": torch.randn(ANSWERS, TOKENS, generator=generator),
        "scores": torch.randn(ANSWERS, generator=generator),
        "responses": torch.randint(VOCABULARY, (ANSWERS, TOKENS), generator=generator),
    }


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tables, Tables, dict[str, Any]]:
    """Return the tables, TRL's tables after the step, and its log."""
    tables, folder = make_tables(), tmp_path_factory.mktemp("ppo")
    save_file(tables, folder / "tables.safetensors")
    (folder / "tables.json").write_text(json.dumps(CONFIG))
    command = [
        TRL_WITH_PPO,
        "-m",
        "parity.trl_ppo_step",
        folder / "tables.safetensors",
        folder / "out.safetensors",
    ]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return tables, load_file(folder / "out.safetensors"), json.loads((folder / "out.json").read_text())


def logprobs(logits: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Return (c, T) of the responses."""
    scaled = torch.log_softmax(logits / CONFIG["temperature"], dim=-1)
    return scaled.gather(2, responses.unsqueeze(2)).squeeze(2)


def our_step(tables: Tables, orders: list[list[int]]) -> tuple[Tables, dict[str, float]]:
    """Take the same step with the functions of `ppo_losses`; return the tables and the means of what TRL logs."""
    mask = torch.ones(ANSWERS, TOKENS, dtype=torch.bool)
    responses, values = tables["responses"], tables["values"]
    old, reference = logprobs(tables["logits"], responses), logprobs(tables["reference"], responses)
    rewards = token_rewards(tables["scores"], kl_k1(old, reference), mask, beta=CONFIG["beta"])
    advantages, returns = advantages_and_returns(
        rewards, values, mask, gamma=CONFIG["gamma"], gae_lambda=CONFIG["gae_lambda"]
    )
    advantages = whitened(advantages, mask)
    logits, critic = (torch.nn.Parameter(tables[name].clone()) for name in ("logits", "values"))
    optimiser = torch.optim.SGD([logits, critic], lr=CONFIG["learning_rate"])
    seen: dict[str, list[torch.Tensor]] = {}
    clip, value_clip = CONFIG["clip_range"], CONFIG["value_clip_range"]
    for own in [order[at : at + 4] for order in orders for at in (0, 4)]:
        log_ratios = logprobs(logits[own], responses[own]) - old[own]
        policy = policy_losses(log_ratios, advantages[own], clip_range=clip).mean()
        value = value_losses(critic[own], values[own], returns[own], clip_range=value_clip).mean()
        found = {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/clipfrac_avg": policy_clipped(log_ratios, advantages[own], clip_range=clip)
            .float()
            .mean(),
            "val/clipfrac_avg": value_clipped(critic[own], values[own], returns[own], clip_range=value_clip)
            .float()
            .mean(),
        }
        optimiser.zero_grad()
        (policy + CONFIG["value_weight"] * value).backward()
        optimiser.step()
        for name, number in found.items():
            seen.setdefault(name, []).append(number.detach())
    means = {name: float(torch.stack(numbers).mean()) for name, numbers in seen.items()}
    means["objective/kl"] = float(kl_k1(old, reference).sum(1).mean())
    return {"logits": logits.detach(), "values": critic.detach()}, means


def test_a_whole_step_moves_policy_and_critic_as_trl_does(
    step: tuple[Tables, Tables, dict[str, Any]],
) -> None:
    tables, theirs, logged = step
    ours, means = our_step(tables, logged["orders"])
    for name in ("logits", "values"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
        assert (theirs[name] - tables[name]).abs().max() > 0.1
    for name, mean in means.items():
        assert mean == pytest.approx(logged[name], abs=1e-5), name
    assert logged["policy/clipfrac_avg"] > 0.05
    assert logged["val/clipfrac_avg"] > 0.05
