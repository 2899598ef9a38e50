"""Sampling's passes on a CPU, for models that `packed.packs` knows: prompts without padding, then a token a row.

A prompt that is answered several times is read once. Keys and values lie in memory that is taken once, so that no token
copies those before it. Other models, and all on a GPU, sample by transformers' own pass: see `rollouts`.
Letters: B rows, U different prompts, N their tokens, T columns, G key-value heads, E head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import nn

from alignment.models import Base, backbone
from alignment.packed import Span, attention_of, layer_states, normed_by, packs, rotation_at
from alignment.packed_attention import Heads, Rotation, rotated, turn


def samples_packed(base: Base) -> bool:
    """Return whether these passes know the model as it is now."""
    return base.device.type == "cpu" and packs(base)


@dataclass(slots=True)
class PackedCache:
    """The rotated keys and the values of all tokens so far; prompts end in the same column."""

    keys: list[torch.Tensor]
    """Of each layer (B, G, T, E)."""
    values: list[torch.Tensor]
    """Of each layer (B, G, T, E)."""
    unseen: torch.Tensor
    """(B, 1, 1, T): -inf before a prompt begins, else 0."""
    columns: int
    """That are in use."""

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Keep the `rows` (int64 into B), as transformers' caches do."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.unseen = self.unseen[rows]

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor, *, heads: Heads, layer: int, turns: Rotation
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
) -> tuple[PackedCache, torch.Tensor]:
    """Read each prompt; return their cache, with columns for `room` more tokens, and the last hidden states (B, D)."""
    model = backbone(base)
    different = list(dict.fromkeys(map(tuple, prompts)))
    numbers = {prompt: number for number, prompt in enumerate(different)}
    owners = [numbers[tuple(prompt)] for prompt in prompts]
    spans = list(pairwise(accumulate(map(len, different), initial=0)))
    segments = [((start, start), (start, end)) for start, end in spans]
    last = torch.tensor([end - 1 for _, end in spans])  # (U,) into N
    ids = torch.tensor([token for prompt in different for token in prompt])
    x = nn.functional.embedding(ids, model.embed_tokens.weight)  # (N, D)
    turns = rotation_at(model, x, torch.cat([torch.arange(end - start) for start, end in spans]))
    cache = _empty(base, [len(prompt) for prompt in prompts], room=room)
    attend = partial(attention_of(segments, spans, base.device), turns=(turns, turns))
    of_last = attention_of(segments, [(end - 1, end) for _, end in spans], base.device)
    attend_last = partial(of_last, turns=((turns[0][last], turns[1][last]), turns))

    def keeping(
        q: torch.Tensor, kv: torch.Tensor, *, heads: Heads, mix: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        _keep(cache, kv, turns, [spans[owner] for owner in owners], heads)
        return mix(q, kv, heads=heads)

    for layer in model.layers[:-1]:
        x = layer_states(layer, x, None, partial(keeping, mix=attend), base.model.config)
    x = layer_states(model.layers[-1], x, last, partial(keeping, mix=attend_last), base.model.config)
    return cache, normed_by(model.norm, x)[owners]


def _empty(base: Base, lengths: Sequence[int], *, room: int) -> PackedCache:
    """Return a cache without keys and values."""
    width = max(lengths)
    unseen = torch.zeros(len(lengths), 1, 1, width + room, dtype=base.dtype)
    for row, length in enumerate(lengths):
        unseen[row, ..., : width - length] = -torch.inf
    return PackedCache([], [], unseen, width)


def _keep(cache: PackedCache, kv: torch.Tensor, turns: Rotation, spans: Sequence[Span], heads: Heads) -> None:
    """Keep the next layer's keys and values (N, 2 * G * E) of the prompts; `spans` are those of the rows, into N."""
    shape = (len(spans), heads.keys, cache.unseen.shape[-1], heads.size)
    width = heads.keys * heads.size
    keys = rotated(kv[:, :width], turns, heads.keys)  # (G, N, E)
    values = kv[:, width:].view(len(kv), heads.keys, heads.size).transpose(0, 1)
    for kept, found in ((cache.keys, keys), (cache.values, values)):
        kept.append(kv.new_zeros(shape))  # what is never read must still be finite: its share is 0
        for row, (start, end) in enumerate(spans):
            kept[-1][row, :, cache.columns - (end - start) : cache.columns] = found[:, start:end]


def read_tokens(
    base: Base, cache: PackedCache, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Read one more token (B,) a row, at `positions` (B,); return the last hidden states (B, D)."""
    model = backbone(base)
    x = nn.functional.embedding(tokens, model.embed_tokens.weight)
    turns = rotation_at(model, x, positions)
    for number, layer in enumerate(model.layers):
        attend = partial(cache.attend, layer=number, turns=turns)
        x = layer_states(layer, x, None, attend, base.model.config)
    cache.columns += 1
    return normed_by(model.norm, x)
