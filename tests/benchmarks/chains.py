"""Chains of work at once, each in a process of its own: within a chain one piece after the other, results as they come."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

Chain = Sequence[Any]
Work = Callable[[Chain], Iterator[dict[str, Any]]]
"""Yields the result of each piece of a chain, in order; it and the chain can be pickled."""
LONGEST_WAIT_S = 3600.0


def results(chains: Sequence[Chain], work: Work, *, jobs: int, deadline_s: float) -> Iterator[dict[str, Any]]:
    """Yield results in the order they are finished, `jobs` chains at once, until all is done or time is up.

    Then, or when the caller leaves, what is under way is given up. A chain whose process fails prints why and ends
    there; the others go on.
    """
    ends, waiting = time.monotonic() + deadline_s, list(chains)
    running: dict[Connection, SpawnProcess] = {}
    try:
        while (running or waiting) and (left := ends - time.monotonic()) > 0:
            while waiting and len(running) < jobs:
                receiver, process = _started(work, waiting.pop(0))
                running[receiver] = process
            for ready in wait(list(running), timeout=min(left, LONGEST_WAIT_S)):
                assert isinstance(ready, Connection)
                try:
                    yield ready.recv()
                except EOFError:
                    running.pop(ready).join()
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _started(work: Work, chain: Chain) -> tuple[Connection, SpawnProcess]:
    """Start a chain; return where its results come from. The end of the process closes that."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, chain, sender))
    process.start()
    sender.close()
    return receiver, process


def _send(work: Work, chain: Chain, sender: Connection) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the process that started this one hears it and ends this one
    for result in work(chain):
        sender.send(result)
