"""How far the policy has moved from its reference, measured while it trains, on answers it gives itself.

A training that ends when a budget is spent holds the policy equally near to its origin whatever the number of labels: a
count of steps does not (the same recipe moved a small snapshot by 0.05 nats an answer and a large one by 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from alignment.distributed import ALONE, Crew
from alignment.models import Base
from alignment.reference_cache import reference_logprobs
from alignment.rollouts import sample

LONGEST_ANSWER_TOKENS = 256


def kl_per_response(base: Base, prompts: Sequence[Sequence[int]], *, seed: int, crew: Crew = ALONE) -> float:
    """Return KL(policy ‖ reference) of an answer in nats, estimated from one sampled answer to each prompt.

    Per token the estimator is r − 1 − log r with r = reference/policy: never negative, unbiased, and of low variance
    near r = 1 (Schulman 2020, "Approximating KL divergence", k3).
    """
    room = min(LONGEST_ANSWER_TOKENS, base.max_positions - max(len(prompt) for prompt in prompts))
    numbers = crew.share(range(len(prompts)))
    mine = [tuple(prompts[number]) for number in numbers]
    answers = sample(
        base, mine, adapter="policy", temperature=1.0, max_new_tokens=room, seed=seed, numbers=numbers
    )
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(mine, answers, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for answer, reference in zip(answers, reference_logprobs(base, rows, cache=None), strict=True):
        log_ratio = np.asarray(reference, np.float64) - np.asarray(answer.logprobs, np.float64)
        total += float(np.sum(np.expm1(log_ratio) - log_ratio))
    crew.sum(total)
    return float(total) / len(prompts)
