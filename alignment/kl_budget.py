"""How far the policy has moved from its reference and from the base, measured on answers it gives itself.

The reference is where one run begins, the base where the first of all runs began. `kl_hold` holds a training to limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignment.batching import collate, group_by_prompt, micro_batches
from alignment.distributed import ALONE, Crew
from alignment.logprobs import Row, rows_a_chunk, shares, states_at
from alignment.models import Base, active, has_adapter, head
from alignment.rollouts import sample

LONGEST_ANSWER_TOKENS = 256
"""An answer also ends where its own prompt leaves no more room in the context."""


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(policy ‖ other) of an answer, in nats, from two others."""

    from_reference: float
    from_base: float
    """The same number where the reference is the base itself."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a policy may go, in nats an answer; 0 for no limit."""

    from_reference: float
    from_base: float

    def __bool__(self) -> bool:
        """Return whether there is any limit."""
        return self.from_reference > 0 or self.from_base > 0

    def passed_by(self, kl: Kl) -> bool:
        """Return whether the policy is beyond a limit."""
        return kl.from_reference > self.from_reference > 0 or kl.from_base > self.from_base > 0

    def held_by_base(self, beyond: Kl, back: Kl) -> bool:
        """Return whether it was the limit from the base that sent a policy back: it was passed, and stayed the nearer."""
        own = back.from_reference / self.from_reference if self.from_reference > 0 else 0.0
        return beyond.from_base > self.from_base > 0 and back.from_base / self.from_base > own


def where_measured(
    unseen: Sequence[Sequence[int]], own: Sequence[Sequence[int]], *, count: int
) -> list[tuple[int, ...]]:
    """Return the prompts to measure on, each once: spread over those that the policy does not learn from, then its own.

    On prompts that a policy learns from it moves otherwise than on those that it will meet.
    """
    others = list(dict.fromkeys(map(tuple, unseen)))
    apart = max(1, len(others) // count)
    return list(dict.fromkeys([*others[::apart], *map(tuple, own)]))[:count]


def kl_per_response(base: Base, prompts: Sequence[Sequence[int]], *, seed: int, crew: Crew = ALONE) -> Kl:
    """Return the KL of an answer from reference and base, estimated from one sampled answer to each prompt.

    At each token of the answers the divergence is taken over all tokens that might have come (Amini et al. 2025, arXiv
    2504.10637, the Rao-Blackwellised estimator): unbiased, and of lower variance than any function of the log-probs of
    the tokens that came, where a single rare one decides the sum.
    """
    numbers = crew.share(range(len(prompts)))
    mine = [tuple(prompts[number]) for number in numbers]
    answers = sample(
        base,
        mine,
        adapter="policy",
        temperature=1.0,
        max_new_tokens=LONGEST_ANSWER_TOKENS,
        seed=seed,
        numbers=numbers,
    )
    rows = [(prompt, answer.token_ids) for prompt, answer in zip(mine, answers, strict=True)]
    others = ("reference", None) if has_adapter(base, "reference") else ("reference",)
    totals = divergences(base, rows, others)
    crew.sum(totals)
    means = (totals / len(prompts)).tolist()
    return Kl(from_reference=means[0], from_base=means[-1])


def divergences(base: Base, rows: Sequence[Row], others: Sequence[str | None]) -> torch.Tensor:
    """Return (O,) float64: for each of the others (as `active` names them), the sum over the answers' tokens of
    KL(policy ‖ other) of the next token, in nats."""
    trees, _ = group_by_prompt(rows)
    share, totals = shares(base, trees), torch.zeros(len(others), dtype=torch.float64)
    for plan in micro_batches(trees, budget_tokens=base.budget(0), share=share):
        batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
        states = []
        for adapter in ("policy", *others):
            with active(base, adapter), torch.no_grad():
                states.append(states_at(base, batch, batch.predictors))  # (N, D)
        totals += _divergences_at(base, states)
    return totals


@torch.no_grad()
def _divergences_at(base: Base, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (O,): the sums of the divergences of the next token after hidden states (N, D), the policy's first and then
    each other's, a chunk at a time."""
    layer, totals = head(base), torch.zeros(len(states) - 1, dtype=torch.float64)
    size = rows_a_chunk(layer.weight)
    for start in range(0, states[0].shape[0], size):
        ours, *theirs = (layer(part[start : start + size]).float().log_softmax(dim=-1) for part in states)
        for number, other in enumerate(theirs):
            totals[number] += float((ours.exp() * (ours - other)).sum(dtype=torch.float64))
    return totals
