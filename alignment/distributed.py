"""Several processes train one adapter: each takes its share of every pass, and the gradients are summed.

Any launcher that sets RANK, WORLD_SIZE and MASTER_ADDR starts them (accelerate launch, torchrun, a Ray or cluster job).
A batch is cut into micro-batches in the same way however many processes there are, every micro-batch divides by the
whole batch's weight, and what is measured before the gradients is put together; so N processes take the steps of one.
Every process holds the whole base, or a part of it (`sharding`): then `Passes` keeps them in step.

    KotaeError
    └── LostProcess   another process of the run has ended
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from alignment.progress import Interrupted, Progress, Silent
from storage.errors import InvalidField, KotaeError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Item = TypeVar("Item")
Key = TypeVar("Key")
WAIT = timedelta(hours=24)
"""How long a process waits for the others: process 0 evaluates and reports while they wait."""
WORD, FORWARD, BACKWARD = range(3)
"""What a process may come to: a word with all others, or a pass through the base."""


class LostProcess(KotaeError):
    """Another process of the run has ended; what it printed says why."""


@dataclass(slots=True, kw_only=True)
class Passes:
    """Keeps passes through a base in parts in step: each of its blocks is gathered by all processes at once, or by none.

    Each says what it comes to next. While one comes to a pass, the others gather the blocks with it and compute nothing;
    so each makes as many passes as it has work for: micro-batches, tokens of an answer, an evaluation by process 0 alone.
    """

    words: dist.ProcessGroup | None = None
    """As in `Crew`."""
    blocks: Sequence[FSDPModule] = ()
    """In the order of a forward pass; empty: every process holds the whole base."""
    midway: bool = False
    """In a forward pass, where nothing else may begin: an error broke it off if something does."""

    def come_to(self, step: int) -> None:
        """Wait until all have come to `step`, taking part in the passes that others make before.

        Raises:
            LostProcess: another process has ended, or a pass of this one was broken off.
        """
        if not self.blocks:
            return
        if self.midway:
            raise LostProcess(
                "a pass through the base was broken off, and the other processes are still in it"
            )
        while (first := self._first(step)) != step:
            with _noticing_losses():
                for block in self.blocks if first == FORWARD else reversed(self.blocks):
                    block.unshard()
                    block.reshard()
        self.midway = step == FORWARD

    def _first(self, step: int) -> int:
        """Return what goes first of that which the processes have come to: backward passes, then forward ones."""
        steps = torch.tensor(step)
        with _noticing_losses():
            dist.all_reduce(steps, op=dist.ReduceOp.MAX, group=self.words)
        return int(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Which of how many equal processes this one is; process 0 reports and writes."""

    rank: int = 0
    size: int = 1
    words: dist.ProcessGroup | None = None
    """Carries what is in the processors' memory; None: the same group that carries the gradients."""
    passes: Passes = field(default_factory=Passes)

    def share(self, plans: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part."""
        return plans[self.rank :: self.size]

    def sum(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes, added in the widest of their types."""
        if self.size == 1:
            return
        self.passes.come_to(WORD)
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        joined = torch.cat([tensor.detach().reshape(-1).to(wide) for tensor in tensors])
        with _noticing_losses():
            dist.all_reduce(joined, group=self.words if joined.device.type == "cpu" else None)
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

    def told(self, value: Item) -> Item:
        """Return what process 0 gave, in every process; it must be picklable and without device tensors."""
        if self.size == 1:
            return value
        self.passes.come_to(WORD)
        box = [value]
        with _noticing_losses():
            dist.broadcast_object_list(box, src=0, group=self.words)
        return box[0]

    def united(self, found: Mapping[Key, Item]) -> dict[Key, Item]:
        """Return what all processes found for their shares, in every process."""
        if self.size == 1:
            return dict(found)
        self.passes.come_to(WORD)
        boxes: list[Mapping[Key, Item]] = [{}] * self.size
        with _noticing_losses():
            dist.all_gather_object(boxes, found, group=self.words)
        return {key: value for box in boxes for key, value in box.items()}

    def begin(self, progress: Progress | None, what: str) -> Progress:
        """Agree to go on with `what`; return whom to ask within it.

        Alone that is `progress`. Several processes stop between two passes only: within one they cannot agree.

        Raises:
            Interrupted: one of them was asked to stop.
        """
        watch = progress or Silent()
        if self.any(watch.should_stop()):
            raise Interrupted(f"{what} was stopped on request")
        return watch if self.size == 1 else Silent()


ALONE = Crew()


@contextmanager
def _noticing_losses() -> Iterator[None]:
    """Tell of a process that is gone: gloo and NCCL raise RuntimeErrors of many texts."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).split(". This is")[0]
        raise LostProcess(
            f"another process of this run has ended; what it printed says why ({why})"
        ) from error


def join(*, cpu: bool = False) -> Crew:
    """Join the processes that the launcher started; without a launcher this one is alone.

    Raises:
        InvalidField: the launcher's processes did not find each other.
    """
    from accelerate import PartialState

    # accelerate must be told that there is no GPU: it would connect the processes and then count one
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=WAIT)
    size, wanted = int(state.num_processes), os.environ.get("WORLD_SIZE", "1")
    if size != int(wanted):
        raise InvalidField("WORLD_SIZE", wanted, f"set LOCAL_RANK and MASTER_ADDR too: {size} joined")
    # under accelerate's --use_fsdp transformers would else load zeros in all processes but one
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    apart = size > 1 and state.device.type != "cpu"
    words = dist.new_group(backend="gloo", timeout=WAIT) if apart else None
    return Crew(rank=int(state.process_index), size=size, words=words, passes=Passes(words=words))


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
