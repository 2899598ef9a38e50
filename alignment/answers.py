"""Answers of the candidate and of the incumbent to the same prompts, with the same random numbers.

Letters: P prompts, K answers of a side to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.intervals import Floats
from alignment.logprobs import Row, completion_logprobs
from alignment.models import Base
from alignment.progress import Progress
from alignment.questions import ServedSampling
from alignment.rollouts import Rollout, sample

CANDIDATE, INCUMBENT = "policy", "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One side's answers, prompt by prompt."""

    prompts: Sequence[Sequence[int]]
    rollouts: Sequence[Sequence[Rollout]]
    """(P, K)"""
    texts: Sequence[Sequence[str]]
    """(P, K), without special tokens."""

    def rows(self) -> list[Row]:
        """Return all (prompt, answer) rows, the answers of a prompt next to each other."""
        pairs = zip(self.prompts, self.rollouts, strict=True)
        return [(prompt, rollout.token_ids) for prompt, group in pairs for rollout in group]

    def per_prompt(self, measure: Callable[[Rollout, str], float]) -> Floats:
        """Return the mean of a measure over each prompt's answers, (P,)."""
        groups = zip(self.rollouts, self.texts, strict=True)
        return np.array(
            [
                np.mean([measure(r, t) for r, t in zip(rollouts, texts, strict=True)])
                for rollouts, texts in groups
            ]
        )

    def lengths(self) -> Floats:
        """Return the answers' tokens, (P, K)."""
        return np.array([[len(r.token_ids) for r in group] for group in self.rollouts], dtype=np.float64)


def answer(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: str,
    sampling: ServedSampling,
    samples: int,
    batch_tokens: int,
    seed: int,
    progress: Progress,
) -> Answers:
    """Let one side answer each prompt `samples` times.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    asked = [prompt for prompt in prompts for _ in range(samples)]
    flat = sample(
        base,
        asked,
        adapter=adapter,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_tokens,
        seed=seed,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    groups = [flat[at : at + samples] for at in range(0, len(flat), samples)]
    return Answers(prompts=prompts, rollouts=groups, texts=[[text_of(base, r) for r in g] for g in groups])


def text_of(base: Base, rollout: Rollout) -> str:
    """Return the answer as a person reads it."""
    return str(base.tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)).strip()


def kl_per_prompt(
    base: Base,
    ours: Answers,
    *,
    adapter: str | None,
    temperature: float,
    batch_tokens: int,
    progress: Progress,
) -> Floats:
    """Return KL(candidate || `adapter`) of a response in nats, estimated from the candidate's own answers, (P,).

    The mean over answers of sum_t log pi(y_t) - log ref(y_t), both at the sampling temperature: the unbiased k1
    estimator (Schulman 2020), here of the tempered policies before top-p.
    """
    theirs = completion_logprobs(
        base,
        ours.rows(),
        adapter=adapter,
        temperature=temperature,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    own = [sum(rollout.logprobs) for group in ours.rollouts for rollout in group]
    differences = np.array([p - sum(q) for p, q in zip(own, theirs, strict=True)], dtype=np.float64)
    return np.asarray(differences.reshape(len(ours.prompts), -1).mean(axis=1), dtype=np.float64)
