"""The answers one PPO step learns from: which prompts, who samples, and the numbers of each token.

Letters: C answers, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from alignment.distributed import ALONE, Crew
from alignment.logprobs import Row
from alignment.models import Base
from alignment.ppo_config import PpoConfig
from alignment.ppo_forward import answer_mask, logprobs_of, of_each_token
from alignment.ppo_losses import importance_weights
from alignment.progress import Progress
from alignment.rollouts import Rollout, sample


class Sampler(Protocol):
    """Answers prompts with the policy somewhere else, e.g. `rollout_server.ServedRollouts`."""

    def sample(
        self,
        base: Base,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        step: int,
    ) -> list[Rollout]:
        """Return one answer to each prompt, by the adapter "policy" as it is now."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the policy answered. Tensors are on the base's device."""

    rows: list[Row]
    finished: torch.Tensor
    """(C,) bool: ended by itself."""
    mask: torch.Tensor
    """(C, T) bool: tokens of the answer, its end included."""
    old: torch.Tensor
    """(C, T) log pi of the sampled tokens in nats at the sampling temperature, 0 in the padding."""
    weights: torch.Tensor
    """(C, T) what each token counts: 1, or the truncated importance weight of another sampler's."""


def step_prompts(
    prompts: Sequence[Sequence[int]], config: PpoConfig, *, seed: int, step: int
) -> list[Sequence[int]]:
    """Return the prompts of a step, each `answers_per_prompt` times in a row.

    Steps go through one permutation of all prompts after another; each depends on the seed and its number only.
    """
    size = min(config.prompts_per_step, len(prompts))
    chosen: list[int] = []
    for place in range(step * size, (step + 1) * size):
        turn, at = divmod(place, len(prompts))
        chosen.append(_permutation(len(prompts), seed=seed, turn=turn)[at])
    return [prompts[number] for number in chosen for _ in range(config.answers_per_prompt)]


def _permutation(count: int, *, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def take_answers(
    base: Base,
    prompts: Sequence[Sequence[int]],
    config: PpoConfig,
    *,
    sampler: Sampler | None,
    seed: int,
    step: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> Answers:
    """Answer the prompts with the policy; answer n of a step depends on (seed, step, n) only.

    Answers of this process keep the sampler's own log-probs: the same weights, the same arithmetic, one pass less.
    Those of another sampler, or of a base in a short type, are scored again here and weighted by what differs.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    elsewhere = crew.told(sampler is not None)  # process 0 alone has it
    if elsewhere:
        rollouts = crew.told(_served(base, prompts, config, sampler=sampler, seed=seed, step=step))
    else:
        rollouts = _sampled(base, prompts, config, seed=seed, step=step, progress=progress, crew=crew)
    rows: list[Row] = [(p, rollout.token_ids) for p, rollout in zip(prompts, rollouts, strict=True)]
    mask = answer_mask(rows, base.device)
    old = torch.zeros(mask.shape, device=base.device)
    old[mask] = torch.tensor([x for rollout in rollouts for x in rollout.logprobs], device=base.device)
    weights = mask.float()
    if elsewhere or base.dtype != torch.float32:
        served, numbers_of = old, logprobs_of(base, temperature=config.temperature)
        old = of_each_token(
            base,
            rows,
            numbers_of,
            adapter="policy",
            batch_tokens=config.batch_tokens,
            progress=progress,
            crew=crew,
        )
        weights = weights * importance_weights(old, served, cap=config.importance_cap)
    finished = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts], device=base.device)
    return Answers(rows=rows, finished=finished, mask=mask, old=old, weights=weights)


def _served(
    base: Base,
    prompts: Sequence[Sequence[int]],
    config: PpoConfig,
    *,
    sampler: Sampler | None,
    seed: int,
    step: int,
) -> list[Rollout]:
    """Let the sampler answer, in the process that has it."""
    if sampler is None:
        return []
    return sampler.sample(
        base,
        prompts,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=_step_seed(seed, step),
        step=step,
    )


def _sampled(
    base: Base,
    prompts: Sequence[Sequence[int]],
    config: PpoConfig,
    *,
    seed: int,
    step: int,
    progress: Progress,
    crew: Crew,
) -> list[Rollout]:
    """Answer in this process, or each process its share."""
    numbers = crew.share(range(len(prompts)))
    answers = sample(
        base,
        [prompts[number] for number in numbers],
        adapter="policy",
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=_step_seed(seed, step),
        batch_tokens=config.sample_batch_tokens,
        progress=crew.begin(progress, "sampling"),
        numbers=numbers,
    )
    found = crew.united(dict(zip(numbers, answers, strict=True)))
    return [found[number] for number in range(len(prompts))]


def _step_seed(seed: int, step: int) -> int:
    return seed * 100_003 + step
