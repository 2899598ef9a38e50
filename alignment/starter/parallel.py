"""Trains on several processor cores: one process a core, each with its share of every batch, gradients summed.

One process a core beats several threads in one: the threads of a small model wait for each other after every
operation, the processes twice a step. Results do not depend on how busy the cores are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Crew:
    """Which of how many equal workers this process is; worker 0 reports and saves."""

    rank: int = 0
    size: int = 1

    def summed(self, tensors: list[torch.Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over all workers."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as distributed

        joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(joined)
        parts = torch.split(joined, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def together(work: Callable[..., None], *, size: int, arguments: tuple[Any, ...]) -> None:
    """Runs ``work(crew, *arguments)`` in ``size`` processes, or right here when one is enough."""
    from torch.multiprocessing.spawn import spawn

    if size == 1:
        work(Crew(), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        spawn(_member, args=(size, meeting, work, arguments), nprocs=size)  # type: ignore[no-untyped-call]


def _member(
    rank: int, size: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    work(Crew(rank=rank, size=size), *arguments)
    distributed.destroy_process_group()
