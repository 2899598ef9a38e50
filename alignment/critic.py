"""The critic of PPO: a LoRA adapter of its own on the policy's base, and a linear head that values each position.

It starts as the reward model: the first member adapter's weights and the mean of its heads.
Letters: N positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignment.models import Base, adapter_parameters, add_adapter
from alignment.reward_model import TrainedReward
from alignment.training_config import LoraSpec

CRITIC = "critic"
"""Name of the adapter."""


@dataclass(frozen=True, slots=True)
class Critic:
    """v = h w + b, in standard deviations of the score."""

    weight: torch.nn.Parameter
    """(D,) float32."""
    bias: torch.nn.Parameter
    """() float32."""

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (N,) values of (N, D) hidden states of the adapter "critic"."""
        return hidden.float() @ self.weight + self.bias

    def rescale(self, factor: float, shift: float = 0.0) -> None:
        """Make all values factor * v + shift: unit or zero of the returns changed (PopArt, arXiv 1602.07714)."""
        with torch.no_grad():
            self.weight.mul_(factor)
            self.bias.mul_(factor).add_(shift)


def add_critic(base: Base, scorer: TrainedReward) -> Critic:
    """Add the adapter "critic" as a copy of the scorer's first adapter; return its head in the scorer's unit."""
    source = scorer.adapters[0]
    config = base.model.peft_config[source]
    spec = LoraSpec(rank=config.r, alpha=config.lora_alpha, targets=tuple(sorted(config.target_modules)))
    add_adapter(base, CRITIC, spec, seed=0)
    weights = adapter_parameters(base, source)
    with torch.no_grad():
        for name, parameter in adapter_parameters(base, CRITIC).items():
            parameter.copy_(weights[name.replace(f".{CRITIC}.", f".{source}.")])
    head = scorer.heads[0].mean(dim=0).float().to(base.device)
    return Critic(torch.nn.Parameter(head.clone()), torch.nn.Parameter(torch.zeros((), device=base.device)))


def critic_parameters(base: Base, critic: Critic) -> dict[str, torch.nn.Parameter]:
    """Return everything of the critic that learns, by name."""
    return {**adapter_parameters(base, CRITIC), "value.weight": critic.weight, "value.bias": critic.bias}
