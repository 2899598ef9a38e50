"""Several processes train one adapter: each takes its share of every optimiser batch, and the gradients are summed.

Any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR starts them (accelerate launch, torchrun, a Ray or cluster job).
Every optimiser batch is cut into micro-batches in the same way however many processes there are, and every micro-batch
divides by the whole batch's weight; so N processes take the steps of one. Every process holds the whole base and scores
the reference itself. Absent: a base cut into parts (FSDP2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
WAIT = timedelta(hours=24)
"""How long a process waits for the others: one of them may be writing a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Which of how many equal processes this one is; process 0 reports and writes."""

    rank: int = 0
    size: int = 1

    def share(self, plans: Sequence[Item]) -> Sequence[Item]:
        """Return this process's micro-batches."""
        return plans[self.rank :: self.size]

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.size == 1:
            return
        joined = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(joined)
        parts = torch.split(joined, [tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum what each process's micro-batches added; a process without any counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum(*(parameter.grad for parameter in parameters if parameter.grad is not None))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: what one decides all must do."""
        raised = torch.tensor(float(flag))
        self.sum(raised)
        return bool(raised > 0)


ALONE = Crew()


def join(*, cpu: bool = False) -> Crew:
    """Join the processes that the launcher started; without a launcher this one is alone."""
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=WAIT)
    return Crew(rank=int(state.process_index), size=int(state.num_processes))


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
