"""Several processes train one adapter: each takes its share of every optimiser batch, and the gradients are summed.

Any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR starts them (accelerate launch, torchrun, a Ray or cluster job).
Every optimiser batch is cut into micro-batches in the same way however many processes there are, and every micro-batch
divides by the whole batch's weight; so N processes take the steps of one. The base is whole in every process, or cut
into parts that are gathered layer by layer (`shard`, FSDP2). Optimisers are not cut: LoRA's state is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from alignment.models import Base, backbone
from storage.errors import InvalidField

Item = TypeVar("Item")
WAIT = timedelta(hours=24)
"""How long a process waits for the others: one of them may be writing a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Which of how many equal processes this one is; process 0 reports and writes."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether a forward pass gathers the base from all processes, so that all must do equally many."""

    def share(self, plans: Sequence[Item]) -> list[tuple[Item, float]]:
        """Return this process's micro-batches with a factor on each one's loss.

        On a sharded base a process without work repeats another's micro-batch with the factor 0.
        """
        mine = [(plan, 1.0) for plan in plans[self.rank :: self.size]]
        if self.sharded and self.rank >= (len(plans) % self.size or self.size):
            mine.append((plans[0], 0.0))
        return mine

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.size == 1:
            return
        joined = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(joined)
        at = 0
        for tensor in tensors:
            with torch.no_grad():
                tensor.copy_(joined[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum what each process's micro-batches added. A sharded base's backward passes have averaged it already."""
        if self.size == 1:
            return
        if self.sharded:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.size)
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process had no micro-batch
                parameter.grad = torch.zeros_like(parameter)
        self.sum(*(parameter.grad for parameter in parameters if parameter.grad is not None))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: what one decides all must do."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag))
        self.sum(raised)
        return bool(raised > 0)

    def gathered(self, mine: Sequence[Item], count: int) -> list[Item]:
        """Return all `count` items where process r holds the items r, r + size, ... in order."""
        if self.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(mine))
        return [parts[number % self.size][number // self.size] for number in range(count)]

    def told(self, value: Item | None) -> Item:
        """Return process 0's value in every process."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        assert value is not None
        return value


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


def shard(base: Base, crew: Crew) -> Crew:
    """Cut the base with its adapters into parts, one a process (FSDP2, arXiv 2304.11277 for the idea).

    Call it after all adapters were added. Head and embeddings outside the layers stay whole in every process: the
    log-prob kernel reads the head's weight itself.

    Raises:
        InvalidField: this process is alone, or the base names no list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if crew.size == 1:
        raise InvalidField("processes", 1, "start at least two processes to cut the base into parts")
    layers = getattr(backbone(base), "layers", None)
    if layers is None:
        raise InvalidField("model", base.path, "its decoder has no `layers`; train it without sharding")
    mesh = init_device_mesh(base.device.type, (crew.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return Crew(rank=crew.rank, size=crew.size, sharded=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor gathered from all processes, if it is cut into parts."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
