"""Forward passes over many answers: micro-batches of prefix trees, and numbers of each token put into one table.

Letters: C answers, T tokens of the longest one, N tokens of a micro-batch's answers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from alignment.batching import Batch, collate, group_by_prompt, micro_batches
from alignment.distributed import ALONE, Crew
from alignment.logprobs import Row, head_logprobs, rows_a_chunk, shares, states_at
from alignment.models import Base, active, head
from alignment.progress import Progress, stop_if_asked

TokenNumbers = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(N, D) hidden states and (N,) tokens they predict -> (N,) numbers."""


def answer_batches(
    base: Base, rows: Sequence[Row], numbers: Sequence[int], *, batch_tokens: int, crew: Crew = ALONE
) -> Iterator[tuple[Batch, list[int]]]:
    """Yield this process's micro-batches of the rows `numbers`, each with the row number of each of its answers."""
    trees, groups = group_by_prompt([rows[number] for number in numbers])
    share = shares(base, trees)
    plans = micro_batches(trees, budget_tokens=base.budget(batch_tokens), share=share)
    for plan in crew.share(plans):
        batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
        yield batch, [numbers[own] for i in plan for own in groups[i]]


def answer_mask(rows: Sequence[Row], device: torch.device) -> torch.Tensor:
    """Return (C, T) bool: the answers' tokens."""
    lengths = torch.tensor([len(answer) for _, answer in rows])
    return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(device)


def of_each_token(
    base: Base,
    rows: Sequence[Row],
    numbers_of: TokenNumbers,
    *,
    adapter: str | None,
    batch_tokens: int,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> torch.Tensor:
    """Return (C, T) float32 what `numbers_of` says of each answer token, 0 in the padding; without gradient.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    mask = answer_mask(rows, base.device)
    result = torch.zeros(mask.shape, device=base.device)
    watch = crew.begin(progress, "scoring answers")
    batches = answer_batches(base, rows, range(len(rows)), batch_tokens=batch_tokens, crew=crew)
    with active(base, adapter), torch.no_grad():
        for batch, owners in batches:
            stop_if_asked(watch, "scoring answers")
            found = numbers_of(states_at(base, batch, batch.predictors), batch.targets)
            part = torch.zeros(len(owners), mask.shape[1], device=base.device)
            part[mask[owners]] = found.float()
            result[owners] = part
    crew.sum(result)  # exact: every answer is one process's, and zero in the others
    return result


def logprobs_of(base: Base, *, temperature: float) -> TokenNumbers:
    """Return the function that gives the log-probs of tokens in nats."""
    layer = head(base)

    def numbers_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head_logprobs(hidden, layer.weight, targets, bias=layer.bias, temperature=temperature)

    return numbers_of


@torch.no_grad()
def entropy_sum(base: Base, hidden: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return () the sum over (N, D) positions of H = log Z - sum p z in nats; chunked, never (N, V)."""
    layer = head(base)
    total = torch.zeros((), device=hidden.device)
    size = rows_a_chunk(layer.weight)
    for start in range(0, hidden.shape[0], size):
        logits = torch.nn.functional.linear(hidden[start : start + size], layer.weight, layer.bias).float()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        total -= (logprobs.exp() * logprobs).sum()
    return total
