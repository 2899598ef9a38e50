"""Batches made ahead by other processes: one core makes 25 a second, a GPU trains on more than that.

A chunk's batches follow its number and the seed alone, so nothing depends on who makes them or when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

from alignment.starter.corpus import Corpus
from alignment.starter.dialogues import Sources, sources
from alignment.starter.examples import Batch, ExampleOptions, batches
from alignment.starter.noise import NoiseRates
from alignment.starter.tokenizer import DialogueEncoder


@dataclass
class ChunkMaker:
    """What the batches of every chunk are made from; `tokenizer` as JSON, which travels to other processes."""

    corpus: Corpus
    options: ExampleOptions
    seed: int
    tokenizer: str

    @cached_property
    def _found(self) -> Sources:
        return sources(self.corpus, part="training", rates=NoiseRates())

    @cached_property
    def _encoder(self) -> DialogueEncoder:
        from tokenizers import Tokenizer

        return DialogueEncoder(Tokenizer.from_str(self.tokenizer))

    def __call__(self, chunk: int) -> list[Batch]:
        """The batches of a chunk, in training order."""
        return batches(
            self._found,
            encoder=self._encoder,
            group_numbers={key: number for number, key in enumerate(self.corpus.groups)},
            options=self.options,
            seed=self.seed,
            chunk=chunk,
        )


def made_ahead(
    make: ChunkMaker, *, first: int, workers: int
) -> Generator[tuple[int, list[Batch]], None, None]:
    """Endless (chunk number, its batches) from chunk `first` on; with 0 workers each is made when it is asked for."""
    if workers == 0:
        chunk = first
        while True:
            yield chunk, make(chunk)
            chunk += 1
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_keep, initargs=(make,))
    waiting: deque[tuple[int, Future[Any]]] = deque()
    try:
        chunk = first
        while True:
            while len(waiting) < 2 * workers:
                waiting.append((chunk, pool.submit(_arrays, chunk)))
                chunk += 1
            number, ready = waiting.popleft()
            yield number, [_batch(arrays) for arrays in ready.result()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_MAKER: list[ChunkMaker] = []
"""The maker of a worker process: it is sent once, not with every chunk."""


def _keep(make: ChunkMaker) -> None:
    _MAKER[:] = [make]


def _arrays(chunk: int) -> list[tuple[Any, ...]]:
    """A chunk's batches as arrays: tensors would each travel through a shared memory file of its own."""
    return [
        tuple(part.numpy() for part in (batch.ids, batch.weights, batch.groups, batch.visible_from))
        for batch in _MAKER[0](chunk)
    ]


def _batch(arrays: tuple[Any, ...]) -> Batch:
    import torch

    return Batch(*(torch.from_numpy(array) for array in arrays))
