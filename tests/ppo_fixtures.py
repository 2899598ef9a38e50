"""What the tests of PPO train on: prompts, a small configuration, and a scorer that likes some tokens."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alignment.models import Base, add_adapter
from alignment.ppo import PpoConfig
from alignment.reward_model import Scores
from alignment.rollouts import sample
from learning_fixtures import SMALL, base_with_policy, ids, randomise

OPENING = (301, 302, 303)
"""Every prompt ends with it, as a chat template's does: what is learnt on one prompt is of use on the others."""
ENDS = range(200, 240)
"""Further tokens that end an answer: the random model hardly ever says its own one."""
CONFIG = PpoConfig(
    lora=SMALL,
    steps=3,
    prompts_per_step=8,
    answers_per_prompt=2,
    max_new_tokens=8,
    learning_rate=5e-3,
    critic_learning_rate=5e-3,
    epoch_kl_cap_nats_per_token=1.0,
    kl_base_budget_nats=0.0,
    entropy_share_min=0.0,
    length_ratio_min=0.0,
    length_ratio_max=100.0,
)


@dataclass
class Taste:
    """A scorer that likes some tokens; its adapter and heads only start the critic."""

    base: Base
    adapters: tuple[str, ...]
    heads: torch.Tensor
    liked: frozenset[int] = frozenset()

    def score(self, rows, *, progress=None, crew=None) -> Scores:
        mean = np.array([np.mean([token in self.liked for token in answer]) for _, answer in rows])
        return Scores(mean=mean, std=0 * mean, members=np.stack([mean, mean], axis=1))


def prompts(count: int = 24, *, longest: int = 12) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [(*ids(rng, 4, longest), *OPENING) for _ in range(count)]


def fresh(model: Path, *, spread: float = 0.0) -> tuple[Base, Taste]:
    base = base_with_policy(model, spread=spread)
    base.stop_ids = frozenset({*base.stop_ids, *ENDS})
    add_adapter(base, "reward_0", SMALL, seed=5)
    randomise(base, "reward_0", seed=6, spread=0.05)
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(1, 2, 64, generator=generator) / 80
    return base, Taste(base, ("reward_0",), heads, usual_tokens(base))


def usual_tokens(base: Base) -> frozenset[int]:
    """Return every other of the 20 tokens that the policy says most: rare ones would take long to find."""
    answers = sample(base, prompts() * 2, adapter="policy", temperature=1.0, max_new_tokens=8, seed=1)
    said = Counter(token for answer in answers for token in answer.token_ids)
    common = [token for token, _ in said.most_common() if token not in base.stop_ids]
    return frozenset(common[:20:2])


def rows_of(count: int, answers: int):
    rng = random.Random(5)
    found = []
    for prompt in prompts(count, longest=30):
        found += [(prompt, ids(rng, 1, 9)) for _ in range(answers)]
    return found
