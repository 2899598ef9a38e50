"""How far the policy has moved from its reference, measured while it trains, on answers it gives itself.

A training that ends when a budget is spent holds the policy equally near to its origin whatever the number of labels: a
count of steps does not (the same recipe moved a small snapshot by 0.05 nats an answer and a large one by 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignment.batching import collate, group_by_prompt, micro_batches
from alignment.distributed import ALONE, Crew
from alignment.logprobs import LOGITS_A_CHUNK, Row, shares, states_at
from alignment.models import Base, active, head
from alignment.rollouts import sample

LONGEST_ANSWER_TOKENS = 256


def kl_per_response(base: Base, prompts: Sequence[Sequence[int]], *, seed: int, crew: Crew = ALONE) -> float:
    """Return KL(policy ‖ reference) of an answer in nats, estimated from one sampled answer to each prompt.

    At each token of the answers the divergence is taken over all tokens that might have come (Amini et al. 2025, arXiv
    2504.10637, the Rao-Blackwellised estimator): unbiased, and of lower variance than any function of the log-probs of
    the tokens that came, where a single rare one decides the sum.
    """
    room = min(LONGEST_ANSWER_TOKENS, base.max_positions - max(len(prompt) for prompt in prompts))
    numbers = crew.share(range(len(prompts)))
    mine = [tuple(prompts[number]) for number in numbers]
    answers = sample(
        base, mine, adapter="policy", temperature=1.0, max_new_tokens=room, seed=seed, numbers=numbers
    )
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(mine, answers, strict=True)]
    total = torch.tensor(divergence(base, rows), dtype=torch.float64)
    crew.sum(total)
    return float(total) / len(prompts)


def divergence(base: Base, rows: Sequence[Row]) -> float:
    """Return the sum over the answers' tokens of KL(policy ‖ reference) of the next token, in nats."""
    trees, _ = group_by_prompt(rows)
    share, total = shares(base, trees), 0.0
    for plan in micro_batches(trees, budget_tokens=base.budget(0), share=share):
        batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
        states = []
        for adapter in ("policy", "reference"):
            with active(base, adapter), torch.no_grad():
                states.append(states_at(base, batch, batch.predictors))  # (N, D)
        total += _divergence_at(base, *states)
    return total


@torch.no_grad()
def _divergence_at(base: Base, policy: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the sum of the divergences of the next token after hidden states (N, D), a chunk at a time."""
    layer, total = head(base), 0.0
    size = max(1, LOGITS_A_CHUNK // layer.weight.shape[0])
    for start in range(0, policy.shape[0], size):
        ours, theirs = (
            layer(states[start : start + size]).float().log_softmax(dim=-1) for states in (policy, reference)
        )
        total += float((ours.exp() * (ours - theirs)).sum(dtype=torch.float64))
    return total
