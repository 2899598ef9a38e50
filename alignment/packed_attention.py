"""Attention over packed prefix trees: a prompt sees itself, an answer sees its prompt and itself, block by block.

No mask over all pairs of tokens exists, and nothing is computed for pairs that do not see each other, but for the
triangle at the end of a block. Letters: N tokens, M query tokens, H heads, G key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from alignment.packed_layers import Block

KEPT_KEYS = 256
"""A block that sees more keys computes its softmax again in the backward pass: kept, it would grow with the row."""
Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines (N, E / 2) of the tokens' positions."""


class Heads(NamedTuple):
    """Shape of the attention, and its scale."""

    queries: int
    """H."""
    keys: int
    """G."""
    size: int
    """E."""
    scale: float


def rotated(x: torch.Tensor, rotation: Rotation, heads: int) -> torch.Tensor:
    """Return (heads, N, E) x (N, heads * E) rotated by its positions (arXiv 2104.09864)."""
    split = x.view(len(x), heads, -1).transpose(0, 1)
    result = torch.empty(split.shape, dtype=x.dtype, device=x.device)
    return turn(split, result, *rotation)


def turn(x: torch.Tensor, result: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Write x (heads, N, E) rotated into `result`."""
    (first, second), (one, other) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    torch.mul(first, cosine, out=one).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=other).addcmul_(first, sine)
    return result


def _seen(x: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the block's keys or values (G, L, E)."""
    own = x[:, block.own]
    return own if block.prompt.start == block.prompt.stop else torch.cat([x[:, block.prompt], own], dim=1)


@cache
def _future(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (count, count): -inf where a key comes after the query; of one size in every layer of every batch."""
    return torch.full((count, count), -torch.inf, dtype=dtype).triu_(1)


def _shares(queries: torch.Tensor, keys: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the block's softmax(q k^T) (G, H / G * M, L) of scaled queries (G, H / G, M, E), M those of the block."""
    groups, repeats, count, size = queries.shape
    scores = torch.bmm(queries.reshape(groups, -1, size), _seen(keys, block).mT)
    scores.view(groups, repeats, count, -1)[..., -count:].add_(_future(count, scores.dtype))
    return scores.softmax(dim=-1)


class _TreeAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v within each block; of short blocks the softmax is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # (M, H * E)
        kv: torch.Tensor,  # (N, 2 * G * E), keys then values
        turns: tuple[Rotation, Rotation],  # of queries, of keys
        blocks: Sequence[Block],
        heads: Heads,
    ) -> torch.Tensor:
        """Return (M, H * E)."""
        groups, size = heads.keys, heads.size
        repeats, many = heads.queries // groups, q.shape[0]
        # Queries are scaled as they are rotated: there are fewer of them than of scores.
        asking = (turns[0][0] * heads.scale, turns[0][1] * heads.scale)
        queries = rotated(q, asking, heads.queries).view(groups, repeats, many, size)
        keys = rotated(kv[:, : groups * size], turns[1], groups)
        values = kv[:, groups * size :].view(len(kv), groups, size).transpose(0, 1).contiguous()
        result = torch.empty_like(q)
        shaped = result.view(many, groups, repeats, size).permute(1, 2, 0, 3)
        kept: list[torch.Tensor | None] = []
        for block in blocks:
            own = queries[:, :, block.queries]
            share = _shares(own, keys, block)
            shaped[:, :, block.queries] = torch.bmm(share, _seen(values, block)).view_as(own)
            kept.append(share if share.shape[-1] <= KEPT_KEYS else None)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.about = turns, blocks, heads.scale
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Return the gradients of q and kv."""
        queries, keys, values, *kept = ctx.saved_tensors
        (asked_at, seen_at), blocks, scale = ctx.about
        turns = (
            (asked_at[0] * scale, asked_at[1] * scale),
            seen_at,
        )  # kept, they would be kept by every layer
        groups, repeats, many, size = queries.shape
        grad = grads[0].view(many, groups, repeats, size).permute(1, 2, 0, 3)
        to_queries = torch.empty_like(queries)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block, share in zip(blocks, kept, strict=True):
            asked = queries[:, :, block.queries]
            share = _shares(asked, keys, block) if share is None else share
            own = grad[:, :, block.queries].reshape(groups, -1, size)
            seen = block.prompt.stop - block.prompt.start
            through = torch.bmm(own, _seen(values, block).mT)
            scores = torch._softmax_backward_data(through, share, -1, share.dtype)
            to_queries[:, :, block.queries] = torch.bmm(scores, _seen(keys, block)).view_as(asked)
            for target, found in (
                (to_keys, torch.bmm(scores.mT, asked.reshape(groups, -1, size))),
                (to_values, torch.bmm(share.mT, own)),
            ):
                target[:, block.prompt] += found[:, :seen]
                target[:, block.own] += found[:, seen:]
        return *_unrotated(to_queries, to_keys, to_values, turns), None, None, None


def _unrotated(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, turns: tuple[Rotation, Rotation]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn gradients back and lay them out by token: (M, H * E) and (N, 2 * G * E)."""
    many, size = queries.shape[2:]
    groups, count = keys.shape[:2]
    q = keys.new_empty(many, queries.shape[0] * queries.shape[1], size)
    kv = keys.new_empty(count, 2 * groups, size)
    turn(queries.flatten(0, 1), q.transpose(0, 1), turns[0][0], -turns[0][1])
    turn(keys, kv[:, :groups].transpose(0, 1), turns[1][0], -turns[1][1])
    kv[:, groups:] = values.transpose(0, 1)
    return q.flatten(1), kv.flatten(1)


def tree_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    turns: tuple[Rotation, Rotation],
    blocks: Sequence[Block],
    heads: Heads,
) -> torch.Tensor:
    """Return (M, H * E) of queries (M, H * E) and keys and values (N, 2 * G * E), not rotated yet."""
    result: torch.Tensor = _TreeAttention.apply(q, kv, turns, blocks, heads)  # type: ignore[no-untyped-call]
    return result
