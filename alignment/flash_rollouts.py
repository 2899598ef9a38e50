"""Sampling's cache on a GPU: a row of fixed width an answer, flash attention up to its end, steps replayed as a graph.

A step of one token a row is some thousand small operations, whose launching takes several times as long as they do. So
the first step of a batch runs as it is, the second is recorded as a CUDA graph, and from then on one launch replays it.
Letters: B rows, T columns, H heads, G key-value heads, E head dimension, D hidden size, N tokens of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignment.packed_attention import Heads, Rotation, rotated, turn
from alignment.packed_layers import Linear

Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B,) tokens and (B,) positions -> (B, D) hidden states."""


def flash_row(
    q: torch.Tensor,  # (B, H, E)
    keys: torch.Tensor,  # (B * T, G, E)
    values: torch.Tensor,  # (B * T, G, E)
    lengths: torch.Tensor,  # (B,) int32: columns of each row that are read
    columns: int,  # T
    scale: float,
) -> torch.Tensor:
    """Return (B, H, E): one query a row over the first `lengths` of its T columns, by the operator of `flash_forward`."""
    query_ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    found: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(
        *(q, keys, values, query_ends, query_ends * columns, 1, columns, 0.0, False, False),
        scale=scale,
        seqused_k=lengths,
    )
    return found[0]


def records(tokens: torch.Tensor) -> bool:
    """Return whether steps can be recorded where the tokens lie."""
    return tokens.is_cuda


class _Recorded:
    """A step as a CUDA graph; what it reads and writes stays where it is."""

    def __init__(self, read: Read, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Record `read`; nothing is computed yet."""
        self._tokens, self._positions = tokens.clone(), positions.clone()
        self._graph = torch.cuda.CUDAGraph()
        place = tokens.device  # which need not be the current one, on which torch would record
        with (
            torch.cuda.device(place),
            torch.cuda.graph(
                self._graph,
                stream=torch.cuda.Stream(place),  # type: ignore[no-untyped-call]
                capture_error_mode="thread_local",  # with several processes NCCL watches the GPU from another thread
            ),
        ):
            self._hidden = read(self._tokens, self._positions)

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what the next call overwrites."""
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._hidden


@dataclass(slots=True)
class FlashCache:
    """Rotated keys and values of all tokens so far; a token's column is its position."""

    columns: int
    """T."""
    owners: Sequence[tuple[int, int]]
    """The span of each row's prompt, into N."""
    linear: Callable[[Any], Linear]
    """Reads a layer's weights and adapter: of a recorded step they must lie where they lay."""
    keys: list[torch.Tensor] = field(default_factory=list)
    """Of each layer (B, T, G, E)."""
    values: list[torch.Tensor] = field(default_factory=list)
    """Of each layer (B, T, G, E)."""
    _places: torch.Tensor | None = None
    """(B, longest prompt) int64 into N: where the columns of the prompts come from."""
    _steps: int = 0
    _recorded: _Recorded | None = None

    def keep(self, kv: torch.Tensor, turns: Rotation, heads: Heads) -> None:
        """Keep the next layer's keys and values (N, 2 * G * E) of the prompts."""
        if self._places is None:
            longest = max(end - start for start, end in self.owners)
            own = [torch.arange(start, start + longest).clamp(max=end - 1) for start, end in self.owners]
            self._places = torch.stack(own).to(kv.device)  # beyond a prompt's end nothing is read
        width = heads.keys * heads.size
        keys = rotated(kv[:, :width], turns, heads.keys).transpose(0, 1)  # (N, G, E)
        values = kv[:, width:].view(len(kv), heads.keys, heads.size)
        shape = (len(self.owners), self.columns, heads.keys, heads.size)
        for kept, found in ((self.keys, keys), (self.values, values)):
            kept.append(kv.new_zeros(shape))
            kept[-1][:, : self._places.shape[1]] = found[self._places]

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Keep the `rows` (int64 into B)."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self._steps, self._recorded = 0, None

    def read(self, read: Read, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what `read` makes of one more token a row; as a graph from the batch's third token on."""
        if self._recorded is None and self._steps and records(tokens):
            self._recorded = _Recorded(read, tokens, positions)
        self._steps += 1
        return (self._recorded or read)(tokens, positions)

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        *,
        heads: Heads,
        layer: int,
        turns: Rotation,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return (B, H * E) of a new token's queries (B, H * E), keys and values (B, 2 * G * E), not rotated yet."""
        rows = len(q)
        places = torch.arange(rows, device=q.device) * self.columns + positions
        queries, keys = (
            torch.empty(rows, count, heads.size, dtype=q.dtype, device=q.device)
            for count in (heads.queries, heads.keys)
        )
        own = kv.view(rows, 2 * heads.keys, heads.size)
        for given, result in ((q.view_as(queries), queries), (own[:, : heads.keys], keys)):
            turn(given.transpose(0, 1), result.transpose(0, 1), *turns)
        seen = [part[layer].flatten(0, 1) for part in (self.keys, self.values)]  # views: (B * T, G, E)
        for kept, new in zip(seen, (keys, own[:, heads.keys :]), strict=True):
            kept.index_copy_(0, places, new)
        lengths = (positions + 1).int()
        return flash_row(queries, seen[0], seen[1], lengths, self.columns, heads.scale).flatten(1)
