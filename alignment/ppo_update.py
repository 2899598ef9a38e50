"""The minibatch epochs of one PPO step: several optimiser steps of policy and critic on one batch of answers.

Letters: C answers, T tokens of the longest one, N answer tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from alignment.batching import Batch
from alignment.critic import CRITIC, Critic
from alignment.distributed import ALONE, Crew
from alignment.logprobs import Row, states_at
from alignment.models import Base, active
from alignment.ppo_config import PpoConfig
from alignment.ppo_forward import answer_batches, entropy_sum, logprobs_of
from alignment.ppo_losses import policy_clipped, policy_losses, value_clipped, value_losses
from alignment.training import clip_gradients

Parameters = dict[str, torch.nn.Parameter]
POLICY_SUMS = ("policy/loss", "policy/clip_fraction", "policy/approx_kl", "policy/ratio", "policy/entropy")
APPROX_KL = POLICY_SUMS.index("policy/approx_kl")
VALUE_SUMS = ("value/loss", "value/clip_fraction")
"""Sums over tokens, in this order, that stay on the device until the step ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch of answers, ready to learn from; (C, T) tensors."""

    rows: list[Row]
    mask: torch.Tensor
    old: torch.Tensor
    """log pi of the sampling policy, nats."""
    weights: torch.Tensor
    """Truncated importance weights."""
    values: torch.Tensor
    """Of the critic before the step."""
    advantages: torch.Tensor
    """Whitened."""
    returns: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What learns."""

    base: Base
    critic: Critic
    policy_parameters: Parameters
    critic_parameters: Parameters
    optimiser: torch.optim.Optimizer
    config: PpoConfig
    crew: Crew = ALONE
    """Every process knows all answers; the passes over them are shared."""


def minibatches(rows: Sequence[Row], *, count: int, seed: int) -> list[list[int]]:
    """Return about equal parts of the rows in random order, the answers of a prompt kept together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, _) in enumerate(rows):
        groups.setdefault(tuple(prompt), []).append(number)
    generator = torch.Generator().manual_seed(seed % 2**63)
    prompts = list(groups.values())
    order = torch.randperm(len(prompts), generator=generator).tolist()
    count = min(count, len(prompts))
    cuts = [part * len(prompts) // count for part in range(count + 1)]
    return [[n for i in order[start:end] for n in prompts[i]] for start, end in pairwise(cuts)]


@dataclass(slots=True)
class _Tally:
    """Of the minibatches that were learnt from."""

    sums: torch.Tensor
    tokens: int = 0
    entropy_tokens: int = 0
    updates: int = 0
    norms: tuple[float, float] = (0.0, 0.0)
    """Of the latest gradients of policy and critic, before clipping."""

    def curves(self, *, stopped_early: bool) -> dict[str, float]:
        """Read the sums from the device, once, as means over tokens."""
        sums = dict(zip(POLICY_SUMS + VALUE_SUMS, self.sums.tolist(), strict=True))
        entropy = sums.pop("policy/entropy")
        curves = {name: value / max(1, self.tokens) for name, value in sums.items()}
        if self.entropy_tokens:
            curves["policy/entropy"] = entropy / self.entropy_tokens
        return curves | {
            "policy/gradient_norm": self.norms[0],
            "value/gradient_norm": self.norms[1],
            "policy/updates": float(self.updates),
            "policy/stopped_early": float(stopped_early),
        }


def minibatch_epochs(
    learner: Learner, experience: Experience, *, seed: int, with_entropy: bool
) -> tuple[dict[str, float], str | None]:
    """Take the optimiser steps of one batch of answers; return the curves and why training must stop.

    A minibatch reads three numbers from the device: its approximate KL, which may end the epochs, and two norms.
    """
    config = learner.config
    tally = _Tally(torch.zeros(len(POLICY_SUMS + VALUE_SUMS), device=learner.base.device))
    for epoch in range(config.epochs):
        parts = minibatches(experience.rows, count=config.minibatches, seed=seed * 1009 + epoch)
        for numbers in parts:
            tokens = int(experience.mask[numbers].sum())
            asked = with_entropy and epoch == 0
            learner.optimiser.zero_grad(set_to_none=True)
            found = add_gradients(learner, experience, numbers, with_entropy=asked)
            approx_kl = float(found[APPROX_KL]) / tokens
            if tally.updates and approx_kl > config.epoch_kl_cap_nats_per_token:
                return tally.curves(stopped_early=True), None
            tally.norms = _clip(learner)
            if not math.isfinite(approx_kl + sum(tally.norms)):
                return {}, "a loss or a gradient is not finite"
            learner.optimiser.step()
            tally.sums += found
            tally.tokens += tokens
            tally.entropy_tokens += tokens if asked else 0
            tally.updates += 1
    return tally.curves(stopped_early=False), None


def add_gradients(
    learner: Learner, experience: Experience, numbers: Sequence[int], *, with_entropy: bool
) -> torch.Tensor:
    """Add the gradients of one minibatch, of all processes; return its sums, (7,) by `POLICY_SUMS` and `VALUE_SUMS`.

    Every micro-batch divides by the whole minibatch's tokens, so the split changes nothing.
    """
    base, crew, budget = learner.base, learner.crew, learner.config.batch_tokens
    tokens = experience.mask[list(numbers)].sum()
    batches = list(answer_batches(base, experience.rows, numbers, batch_tokens=budget, crew=crew))
    policy = torch.zeros(len(POLICY_SUMS), device=base.device)
    value = torch.zeros(len(VALUE_SUMS), device=base.device)
    with active(base, "policy", trainable=True):
        for batch, owners in batches:
            policy += _policy_pass(learner, experience, batch, owners, tokens, with_entropy)
    with active(base, CRITIC, trainable=True):
        for batch, owners in batches:
            value += _critic_pass(learner, experience, batch, owners, tokens)
    sums = torch.cat([policy, value])
    crew.sum(sums)
    crew.sum_gradients([*learner.policy_parameters.values(), *learner.critic_parameters.values()])
    return sums


def _policy_pass(
    learner: Learner,
    experience: Experience,
    batch: Batch,
    owners: list[int],
    tokens: torch.Tensor,
    with_entropy: bool,
) -> torch.Tensor:
    """Add the policy's gradients of a micro-batch; return its sums by `POLICY_SUMS`."""
    base, config, mask = learner.base, learner.config, experience.mask[owners]
    hidden = states_at(base, batch, batch.predictors)
    new = logprobs_of(base, temperature=config.temperature)(hidden, batch.targets)  # (N,)
    cap = config.log_ratio_cap
    log_ratios = (new - experience.old[owners][mask]).clamp(-cap, cap)
    advantages = experience.advantages[owners][mask]
    losses = policy_losses(log_ratios, advantages, clip_range=config.clip_range)
    loss = (experience.weights[owners][mask] * losses).sum()
    (loss / tokens).backward()  # type: ignore[no-untyped-call]
    seen = log_ratios.detach()
    clipped = policy_clipped(seen, advantages, clip_range=config.clip_range).to(seen.dtype)
    entropy = entropy_sum(base, hidden.detach(), temperature=config.temperature) if with_entropy else 0 * loss
    sums = [loss, clipped.sum(), 0.5 * seen.square().sum(), seen.exp().sum(), entropy]
    return torch.stack([number.detach() for number in sums])


def _critic_pass(
    learner: Learner, experience: Experience, batch: Batch, owners: list[int], tokens: torch.Tensor
) -> torch.Tensor:
    """Add the critic's gradients of a micro-batch; return its sums by `VALUE_SUMS`."""
    config, mask = learner.config, experience.mask[owners]
    values = learner.critic.values(states_at(learner.base, batch, batch.predictors))  # (N,)
    old, returns = experience.values[owners][mask], experience.returns[owners][mask]
    loss = value_losses(values, old, returns, clip_range=config.value_clip_range).sum()
    (config.value_weight * loss / tokens).backward()  # type: ignore[no-untyped-call]
    clipped = value_clipped(values.detach(), old, returns, clip_range=config.value_clip_range)
    return torch.stack([loss.detach(), clipped.sum().to(loss.dtype)])


def _clip(learner: Learner) -> tuple[float, float]:
    """Clip policy and critic apart: a surprised critic must not slow the policy down."""
    cap = learner.config.gradient_clip
    policy = clip_gradients(list(learner.policy_parameters.values()), cap)
    return policy, clip_gradients(list(learner.critic_parameters.values()), cap)
