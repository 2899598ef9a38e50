"""The one log-prob kernel: only completion positions reach the head, in chunks; no (B, T, V) tensor exists.

Letters: B rows, T tokens, V vocabulary, D hidden size, N completion tokens, C completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from alignment.batching import (
    Batch,
    Tree,
    collate,
    group_by_prompt,
    micro_batches,
    pays_to_share,
    sent,
)
from alignment.distributed import ALONE, Crew
from alignment.models import Base, active, backbone, checkpointed, head
from alignment.packed import packed_states, packs
from alignment.progress import Progress, stop_if_asked

CPU_LOGITS_A_CHUNK = 4 * 2**20
"""Logits in memory at once (16 MiB in float32): small beside the weights, large enough for full speed."""
GPU_LOGITS_A_CHUNK = 64 * 2**20
"""Some hundred rows of a vocabulary of 150,000: with fewer, reading the head takes longer than the product."""
Row = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, answer ids)"""


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target] for each row; the head is frozen, so only h gets a gradient.

    d log p / d h = (W[target] - softmax W) / temperature is formed chunk by chunk in the forward pass,
    while the logits are there, which costs one product instead of keeping N x V numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, D)
        weight: torch.Tensor,  # (V, D)
        bias: torch.Tensor | None,  # (V,)
        targets: torch.Tensor,  # (N,)
        temperature: float,
    ) -> torch.Tensor:
        """Return (N,) log-probs in nats, float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        size = rows_a_chunk(weight)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).to(wide)
            if temperature != 1:
                logits.div_(temperature)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
            chosen = targets[part].unsqueeze(1)
            result[part] = (logits.gather(1, chosen) - normaliser).squeeze(1)
            if slope is not None:
                softmax = logits.sub_(normaliser).exp_().to(weight.dtype)  # (n, V)
                slope[part] = (weight[targets[part]] - softmax @ weight) / temperature
        ctx.slope = slope
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Scale the stored slopes by the incoming gradients."""
        return (grads[0].unsqueeze(1).to(ctx.slope.dtype) * ctx.slope, None, None, None, None)


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return (N,) log-probs in nats of `targets` (N,) under the head `weight` (V, D) on `hidden` (N, D)."""
    result: torch.Tensor = _HeadLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-untyped-call]
    return result


def hidden_states(base: Base, batch: Batch) -> torch.Tensor:
    """Return (B*T, D) last hidden states under the adapter that is active."""
    with checkpointed(base):
        output = backbone(base)(
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        )
    states: torch.Tensor = output.last_hidden_state
    return states.flatten(0, 1)


def states_at(base: Base, batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """Return (len(places), D) last hidden states at `places`, int64 into B*T, under the adapter that is active."""
    if packs(base):
        return packed_states(base, batch, places)
    states = hidden_states(base, batch)
    return states[places.to(states.device)]


def shares(base: Base, trees: Sequence[Tree]) -> bool:
    """Return whether the trees are laid out a row a tree: where no mask is needed, it never costs anything.

    Under a mask, no GPU kernel is quick.
    """
    return packs(base) or (masks(base) and pays_to_share(trees))


def masks(base: Base) -> bool:
    """Return whether the model's own pass may see tree rows, under a mask."""
    return base.share_prefixes and base.device.type == "cpu"


def rows_a_chunk(weight: torch.Tensor) -> int:
    """Return for how many rows the logits of the head `weight` (V, D) are in memory at once."""
    most = GPU_LOGITS_A_CHUNK if weight.is_cuda else CPU_LOGITS_A_CHUNK
    return max(1, most // weight.shape[0])


def token_logprobs(base: Base, batch: Batch, *, temperature: float = 1.0) -> torch.Tensor:
    """Return (N,) log-probs in nats of the batch's completion tokens, with gradient where it is on."""
    hidden = states_at(base, batch, batch.predictors)
    layer = head(base)
    return head_logprobs(hidden, layer.weight, batch.targets, bias=layer.bias, temperature=temperature)


def logprobs_beside(base: Base, batch: Batch, learnt: Sequence[int]) -> torch.Tensor:
    """Return (N,) log-probs in nats as `token_logprobs` does, for models that `packed.packs` knows.

    Args:
        learnt: of each row, how many of its completions, the first ones, get a gradient; the others cost none.
    """
    free = torch.tensor(
        [
            number > count
            for ends, count in zip(batch.bounds, learnt, strict=True)
            for number, (start, stop) in enumerate(pairwise(ends), start=1)
            for _ in range(start, stop)
        ]
    )  # (N,)
    order, count = free.int().argsort(stable=True), int((~free).sum())
    order, back = sent([order, order.argsort()], base.device)
    hidden = packed_states(base, batch, batch.predictors, learnt=learnt)[order]
    targets, layer = batch.targets[order], head(base)
    own = head_logprobs(hidden[:count], layer.weight, targets[:count], bias=layer.bias)
    with torch.no_grad():
        others = head_logprobs(hidden[count:].detach(), layer.weight, targets[count:], bias=layer.bias)
    return torch.cat([own, others])[back]


def completion_sums(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum (N,) values over each completion, end-of-sequence included: (C,)."""
    return values.new_zeros(batch.lengths.shape[0]).index_add(0, batch.owners, values)


def completion_logprobs(
    base: Base,
    rows: Sequence[Row],
    *,
    adapter: str | None,
    batch_tokens: int = 0,
    temperature: float = 1.0,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> list[list[float]]:
    """Score answers without gradient: for each row the log-prob in nats of each answer token.

    Args:
        adapter: "policy", "reference", another adapter's name, or None for the bare base.
        batch_tokens: token budget of a batch, 0: by device.

    Raises:
        InvalidField: an empty prompt or answer, or an unknown adapter.
        Interrupted: `progress` asked to stop.
    """
    trees, numbers = group_by_prompt(rows)
    share = shares(base, trees)
    plans = micro_batches(trees, budget_tokens=base.budget(batch_tokens), share=share)
    passes: list[tuple[list[int], torch.Tensor]] = []
    watch = crew.begin(progress, "scoring answers")
    with active(base, adapter), torch.no_grad():
        for plan in crew.share(plans):
            stop_if_asked(watch, "scoring answers")
            batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
            values = token_logprobs(base, batch, temperature=temperature)
            passes.append(([number for i in plan for number in numbers[i]], values))
    scored: dict[int, list[float]] = {}
    for owners, values in passes:  # only now: to read a number, the CPU waits for the GPU
        parts = torch.split(values.cpu(), [len(rows[number][1]) for number in owners])
        scored.update({number: part.tolist() for number, part in zip(owners, parts, strict=True)})
    scored = crew.united(scored)
    return [scored[number] for number in range(len(rows))]
