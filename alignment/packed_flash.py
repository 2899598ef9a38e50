"""Attention over packed prefix trees on a GPU, in bfloat16: one call of a flash-attention kernel for all sequences.

A prompt is a sequence of its own tokens. An answer is a sequence whose queries are its tokens, and whose keys are
those of its prompt and its own, so that no query sees another answer and nothing is masked but the future. For the call
the keys of a prompt are copied once for each of its answers; between forward and backward pass no copy is kept.
Letters: N tokens, M query tokens, S sequences, L keys of all sequences, H heads, G key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from alignment.batching import sent
from alignment.packed_attention import Heads, Rotation, turn
from alignment.packed_layers import Block


class Sequences(NamedTuple):
    """What the kernel computes: each sequence's queries follow those of the one before, and so do its keys."""

    keys: torch.Tensor
    """(L,) int64 into N."""
    query_ends: torch.Tensor
    """(S + 1,) int32, from 0."""
    key_ends: torch.Tensor
    """(S + 1,) int32, from 0."""
    most_queries: int
    most_keys: int


def has_flash(device: torch.device, head_size: int) -> bool:
    """Return whether the kernel runs there: CUDA with compute capability 8.0 or more, heads of a multiple of 8 up to 256."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None  # ROCm's kernel aligns the causal mask otherwise
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and head_size % 8 == 0
        and head_size <= 256
    )


def sequences_of(blocks: Sequence[Block], device: torch.device) -> Sequences:
    """Return the sequences of `blocks`, one each, on the device."""
    spans = [part for block in blocks for part in (block.prompt, block.own)]
    queries = [block.queries.stop - block.queries.start for block in blocks]
    keys = [own.stop - own.start + prompt.stop - prompt.start for _, prompt, own in blocks]
    places, query_ends, key_ends = sent(
        [
            torch.cat([torch.arange(span.start, span.stop) for span in spans]),
            torch.tensor([0, *accumulate(queries)]),
            torch.tensor([0, *accumulate(keys)]),
        ],
        device,
    )
    # Of one query the kernel would lay the log-sums out in another way, which its backward pass does not know.
    return Sequences(places, query_ends.int(), key_ends.int(), max(2, *queries), max(2, *keys))


def flash_forward(
    q: torch.Tensor,  # (M, H, E)
    k: torch.Tensor,  # (L, G, E)
    v: torch.Tensor,  # (L, G, E)
    sequences: Sequences,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Return (M, H, E) the attention, and what the backward pass needs: log-sums (H, M) and two unused seeds.

    The causal mask is aligned at the last query and the last key of each sequence. `torch.nn.attention.varlen` calls
    the same operator; its arguments changed between torch 2.11 and 2.13, the operator's did not.
    """
    _, query_ends, key_ends, *most = sequences
    found: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(
        q, k, v, query_ends, key_ends, *most, 0.0, True, False, scale=scale
    )
    return found[:4]


def flash_backward(
    grad: torch.Tensor,  # (M, H, E)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    made: Sequence[torch.Tensor],
    sequences: Sequences,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v; `made` is what `flash_forward` returned."""
    _, query_ends, key_ends, *most = sequences
    out, sums, *seeds = made
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, sums, query_ends, key_ends, *most, 0.0, True, *seeds, scale=scale
    )
    return found


class _FlashAttention(torch.autograd.Function):
    """Rotates queries and keys, gathers the keys of each sequence and calls the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # (M, H * E)
        kv: torch.Tensor,  # (N, 2 * G * E), keys then values
        turns: tuple[Rotation, Rotation],  # of queries, of keys
        sequences: Sequences,
        heads: Heads,
    ) -> torch.Tensor:
        """Return (M, H * E)."""
        queries = torch.empty_like(q).view(-1, heads.queries, heads.size)
        turn(q.view_as(queries).transpose(0, 1), queries.transpose(0, 1), *turns[0])
        both = kv.view(-1, 2 * heads.keys, heads.size)
        rotated = torch.empty_like(both)  # (N, 2 G, E)
        turn(both[:, : heads.keys].transpose(0, 1), rotated[:, : heads.keys].transpose(0, 1), *turns[1])
        rotated[:, heads.keys :] = both[:, heads.keys :]
        keys, values = rotated[sequences.keys].chunk(2, dim=1)
        made = flash_forward(queries, keys, values, sequences, heads.scale)
        ctx.save_for_backward(queries, rotated, *made)
        ctx.about = turns, sequences, heads
        return made[0].view_as(q)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Return the gradients of q and kv."""
        queries, rotated, *made = ctx.saved_tensors
        turns, sequences, heads = ctx.about
        keys, values = rotated[sequences.keys].chunk(2, dim=1)
        grad = grads[0].view_as(queries)
        to_queries, *of_copies = flash_backward(grad, queries, keys, values, made, sequences, heads.scale)
        # A prompt's gradient is the sum over its copies: in float32, whose order of summing does not matter.
        wide = torch.promote_types(rotated.dtype, torch.float32)
        summed = torch.zeros(rotated.shape, dtype=wide, device=rotated.device)
        summed.index_add_(0, sequences.keys, torch.cat(of_copies, dim=1).to(wide))
        to_both = summed.to(rotated.dtype)
        (cosine, sine), (key_cosine, key_sine) = turns
        q, kv = torch.empty_like(to_queries), torch.empty_like(to_both)
        turn(to_queries.transpose(0, 1), q.transpose(0, 1), cosine, -sine)
        of_keys, to_keys = (each[:, : heads.keys].transpose(0, 1) for each in (to_both, kv))
        turn(of_keys, to_keys, key_cosine, -key_sine)
        kv[:, heads.keys :] = to_both[:, heads.keys :]
        return q.flatten(1), kv.flatten(1), None, None, None


def flash_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    turns: tuple[Rotation, Rotation],
    sequences: Sequences,
    heads: Heads,
) -> torch.Tensor:
    """Return (M, H * E) of queries (M, H * E) and keys and values (N, 2 * G * E), not rotated yet."""
    result: torch.Tensor = _FlashAttention.apply(q, kv, turns, sequences, heads)  # type: ignore[no-untyped-call]
    return result
