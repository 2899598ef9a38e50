"""Sampling's passes for models that `packed.packs` knows: prompts without padding, then a token a row.

A prompt that is answered several times is read once. Keys and values lie in memory that is taken once, so that no token
copies those before it; on a GPU in a cache of its own (`flash_rollouts`). Other models sample by transformers' own pass:
see `rollouts`.
Letters: B rows, U different prompts, N their tokens, T columns, G key-value heads, E head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from alignment.batching import sent
from alignment.flash_rollouts import FlashCache, Read
from alignment.models import Base, backbone
from alignment.packed import Span, attention_of, layer_states, linear_of, normed_by, rotation_at
from alignment.packed_attention import Heads, Rotation, rotated, turn
from alignment.packed_layers import Linear


@dataclass(slots=True)
class PackedCache:
    """The rotated keys and the values of all tokens so far, on a CPU; prompts end in the same column."""

    keys: list[torch.Tensor]
    """Of each layer (B, G, T, E)."""
    values: list[torch.Tensor]
    """Of each layer (B, G, T, E)."""
    owners: Sequence[Span]
    """The span of each row's prompt, into N."""
    unseen: torch.Tensor
    """(B, 1, 1, T): -inf before a prompt begins, else 0."""
    columns: int
    """That are in use."""
    linear: Callable[[Any], Linear] = field(default_factory=lambda: cache(linear_of))
    """Reads a layer's weights and adapter, which stay as they are while a batch is answered."""

    def keep(self, kv: torch.Tensor, turns: Rotation, heads: Heads) -> None:
        """Keep the next layer's keys and values (N, 2 * G * E) of the prompts."""
        shape = (len(self.owners), heads.keys, self.unseen.shape[-1], heads.size)
        width = heads.keys * heads.size
        keys = rotated(kv[:, :width], turns, heads.keys)  # (G, N, E)
        values = kv[:, width:].view(len(kv), heads.keys, heads.size).transpose(0, 1)
        for kept, found in ((self.keys, keys), (self.values, values)):
            kept.append(kv.new_zeros(shape))  # what is never read must still be finite: its share is 0
            for row, (start, end) in enumerate(self.owners):
                kept[-1][row, :, self.columns - (end - start) : self.columns] = found[:, start:end]

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Keep the `rows` (int64 into B), as transformers' caches do."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.unseen = self.unseen[rows]

    def read(self, read: Read, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what `read` makes of one more token a row."""
        states = read(tokens, positions)
        self.columns += 1
        return states

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
        rows, at = len(q), self.columns
        angles = (turns[0].unsqueeze(1), turns[1].unsqueeze(1))
        own = kv.view(rows, 2, heads.keys, heads.size)
        turn(own[:, 0], self.keys[layer][:, :, at], *angles)
        self.values[layer][:, :, at] = own[:, 1]
        queries = q.view(rows, heads.queries, heads.size)
        queries = turn(queries, torch.empty_like(queries), *angles).view(rows * heads.keys, -1, heads.size)
        seen = [part[layer].flatten(0, 1)[:, : at + 1] for part in (self.keys, self.values)]
        scores = torch.bmm(queries, seen[0].mT).view(rows, heads.keys, -1, at + 1).mul_(heads.scale)
        share = scores.add_(self.unseen[..., : at + 1]).softmax(dim=-1)
        return torch.bmm(share.flatten(0, 1), seen[1]).view(rows, -1)


def read_prompts(
    base: Base, prompts: Sequence[Sequence[int]], *, room: int
) -> tuple[PackedCache | FlashCache, torch.Tensor]:
    """Read each prompt; return their cache, with columns for `room` more tokens, and the last hidden states (B, D)."""
    model = backbone(base)
    different = list(dict.fromkeys(map(tuple, prompts)))
    numbers = {prompt: number for number, prompt in enumerate(different)}
    owners = [numbers[tuple(prompt)] for prompt in prompts]
    spans = list(pairwise(accumulate(map(len, different), initial=0)))
    segments = [((start, start), (start, end)) for start, end in spans]
    ids, positions, last, rows = sent(
        [
            torch.tensor([token for prompt in different for token in prompt]),
            torch.cat([torch.arange(end - start) for start, end in spans]),
            torch.tensor([end - 1 for _, end in spans]),  # (U,) into N
            torch.tensor(owners),
        ],
        base.device,
    )
    x = nn.functional.embedding(ids, model.embed_tokens.weight)  # (N, D)
    turns = rotation_at(model, x, positions)
    kept = empty_cache(base, [spans[owner] for owner in owners], room=room)
    attend = partial(attention_of(segments, spans, base.device), turns=(turns, turns))
    of_last = attention_of(segments, [(end - 1, end) for _, end in spans], base.device)
    attend_last = partial(of_last, turns=((turns[0][last], turns[1][last]), turns))

    def keeping(
        q: torch.Tensor, kv: torch.Tensor, *, heads: Heads, mix: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        kept.keep(kv, turns, heads)
        return mix(q, kv, heads=heads)

    config = base.model.config
    for layer in model.layers[:-1]:
        x = layer_states(layer, x, None, partial(keeping, mix=attend), config, kept.linear)
    x = layer_states(model.layers[-1], x, last, partial(keeping, mix=attend_last), config, kept.linear)
    return kept, normed_by(model.norm, x)[rows]


def empty_cache(base: Base, owners: Sequence[Span], *, room: int) -> PackedCache | FlashCache:
    """Return the device's cache without keys and values, for rows whose prompts have the spans `owners`."""
    if base.device.type != "cpu":
        return flash_cache(owners, room=room)
    lengths = [end - start for start, end in owners]
    width = max(lengths)
    unseen = torch.zeros(len(lengths), 1, 1, width + room, dtype=base.dtype)
    for row, length in enumerate(lengths):
        unseen[row, ..., : width - length] = -torch.inf
    return PackedCache([], [], owners, unseen, width)


def flash_cache(owners: Sequence[Span], *, room: int) -> FlashCache:
    """Return a GPU's."""
    columns = max(end - start for start, end in owners) + room
    return FlashCache(columns=columns, owners=owners, linear=cache(linear_of))


def read_tokens(
    base: Base, kept: PackedCache | FlashCache, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Read one more token (B,) a row, at `positions` (B,); return the last hidden states (B, D).

    They may be overwritten by the next call.
    """
    return kept.read(partial(_states, base, kept), tokens, positions)


def _states(
    base: Base, kept: PackedCache | FlashCache, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    model = backbone(base)
    x = nn.functional.embedding(tokens, model.embed_tokens.weight)
    turns = rotation_at(model, x, positions)
    for number, layer in enumerate(model.layers):
        attend = partial(kept.attend, layer=number, turns=turns, positions=positions)
        x = layer_states(layer, x, None, attend, base.model.config, kept.linear)
    return normed_by(model.norm, x)
