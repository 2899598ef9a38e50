"""What an unexpected error of a run means for the person who reads it: what happened, and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from storage.errors import KotaeError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_SAYS = re.compile(
    r"no space left|disk is full|quota exceeded|file too large|PytorchStreamWriter failed|unexpected pos",
    re.IGNORECASE,
)
"""safetensors and torch report a full disk in words of their own, without a number."""
NO_MEMORY_SAYS = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.IGNORECASE
)
"""torch says so in a RuntimeError, on a CPU ("DefaultCPUAllocator: can't allocate memory") and on a GPU."""

LOST_SAYS = re.compile(r"(closed|reset) by peer|remote process exit", re.IGNORECASE)
"""gloo and NCCL, where a pass gathers a base in parts: other losses are `distributed.LostProcess`."""


def explain(error: BaseException, data: Path) -> str:
    """Return the error in words for a person: those of known errors as they are, others with their kind."""
    told = str(error) if isinstance(error, KotaeError) else f"{type(error).__name__}: {error}"
    chain = list(_chain(error))
    if any(_no_room(one) for one in chain):
        return (
            f"{told}. The disk of {data} is full: free some space there and run again; nothing half written was kept, and a "
            "training goes on from its checkpoint."
        )
    if any(LOST_SAYS.search(str(one)) for one in chain) and not isinstance(error, KotaeError):
        return f"another process of this run has ended; what it printed says why ({told})"
    if any(_no_memory(one) for one in chain):
        return (
            f"{told}. There is too little memory: lower dpo.batch_tokens, kto.batch_tokens and reward.batch_tokens (0 "
            "leaves them to the device) or data.max_tokens, set evaluation.batch_tokens and ppo.sample_batch_tokens to "
            "4096, end other programs, cut the model over several devices (launcher, shard_base), or serve a smaller model."
        )
    return told


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _no_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    return bool(NO_ROOM_SAYS.search(str(error)))


def _no_memory(error: BaseException) -> bool:
    numbered = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return numbered or isinstance(error, MemoryError) or bool(NO_MEMORY_SAYS.search(str(error)))
