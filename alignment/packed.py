"""The forward pass of Llama and Qwen2 models on a CPU over packed prefix trees: no padding, no mask, no row for nothing.

It reads the weights of the transformers model and of the adapter that is on, and equals that model's own forward pass to
rounding (tested). The last layer computes queries and the feed-forward part only where a hidden state is read.
Other architectures and devices go through the model's own forward pass: see `logprobs.states_at`.
Letters: B rows, T tokens a row, N tokens in all, M tokens read, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from alignment.batching import Batch
from alignment.models import Base, backbone
from alignment.packed_attention import Heads, Rotation, tree_attention
from alignment.packed_layers import Block, Factors, Linear, adapted, gated, normed

ARCHITECTURES = ("llama", "qwen2")
BLOCK_TOKENS = 128
"""Queries of a block: half of a block's last square is computed for nothing, and each block costs some calls."""
Span = tuple[int, int]


def packs(base: Base) -> bool:
    """Return whether `packed_states` computes what the model computes."""
    config = base.model.config
    return bool(
        base.device.type == "cpu"
        and base.dtype in (torch.float32, torch.float64)
        and base.share_prefixes
        and config.model_type in ARCHITECTURES
        and config.hidden_act == "silu"
        and all(_known(part) for part in backbone(base).layers.modules() if hasattr(part, "in_features"))
    )


def _known(part: Any) -> bool:
    """Return whether `_linear` reads this linear layer whole."""
    if not isinstance(part, LoraLinear):
        return type(part) is nn.Linear
    names = part.active_adapters
    return len(names) == 1 and not part.merged and not any(name in part.lora_variant for name in names)


def packed_states(base: Base, batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """Return (len(places), D) last hidden states at `places`, int64 into B*T, under the adapter that is on."""
    model, config = backbone(base), base.model.config
    kept = (batch.segments.flatten() >= 0).nonzero().squeeze(1)  # (N,) into B*T
    number = torch.zeros(batch.segments.numel(), dtype=torch.int64).index_copy_(
        0, kept, torch.arange(len(kept))
    )
    ids = batch.input_ids.flatten()[kept]
    width = batch.input_ids.shape[1]
    positions = (kept % width) if batch.positions is None else batch.positions.flatten()[kept]
    segments = _segments(batch.bounds)
    spans = _read_spans(segments, number[places].tolist())
    read = torch.cat([torch.arange(*span) for span in spans if span[0] < span[1]])  # (M,) into N
    x = nn.functional.embedding(ids, model.embed_tokens.weight)  # (N, D)
    cosine, sine = (part[0].chunk(2, dim=-1)[0] for part in model.rotary_emb(x, positions.unsqueeze(0)))
    keys = (cosine.contiguous(), sine.contiguous())
    everything = _blocks(segments, [own for _, own in segments])
    for layer in model.layers[:-1]:
        x = _layer(layer, x, None, everything, (keys, keys), config)
    turns = ((keys[0][read], keys[1][read]), keys)
    x = _layer(model.layers[-1], x, read, _blocks(segments, spans), turns, config)
    x = _norm(model.norm, x)
    among = torch.zeros(len(kept), dtype=torch.int64).index_copy_(0, read, torch.arange(len(read)))
    return x[among[number[places]]]


def _segments(bounds: Sequence[Sequence[int]]) -> list[tuple[Span, Span]]:
    """Return, for each prompt and completion in turn, the packed tokens of the prompt it sees and its own."""
    found: list[tuple[Span, Span]] = []
    start = 0
    for ends in bounds:
        prompt = (start, start + ends[0])
        found.append(((start, start), prompt))
        found += [(prompt, (start + one, start + other)) for one, other in pairwise(ends)]
        start += ends[-1]
    return found


def _read_spans(segments: Sequence[tuple[Span, Span]], places: Sequence[int]) -> list[Span]:
    """Return for each segment the shortest span of packed tokens that holds its `places`, empty without any."""
    wanted = sorted(set(places))
    spans, at = [], 0
    for _, (start, end) in segments:
        first = at
        while at < len(wanted) and wanted[at] < end:
            at += 1
        spans.append((wanted[first], wanted[at - 1] + 1) if at > first else (start, start))
    return spans


def _blocks(segments: Sequence[tuple[Span, Span]], spans: Sequence[Span]) -> list[Block]:
    """Cut the queries `spans` of the segments into blocks; queries are numbered in their order."""
    blocks: list[Block] = []
    done = 0
    for (prompt, (start, _)), (first, end) in zip(segments, spans, strict=True):
        for at in range(first, end, BLOCK_TOKENS):
            stop = min(at + BLOCK_TOKENS, end)
            queries = slice(done, done + stop - at)
            done = queries.stop
            blocks.append(Block(queries=queries, prompt=slice(*prompt), own=slice(start, stop)))
    return blocks


def _layer(
    layer: Any,
    x: torch.Tensor,  # (N, D)
    read: torch.Tensor | None,  # (M,) into N; None: every token
    blocks: Sequence[Block],
    turns: tuple[Rotation, Rotation],
    config: Any,
) -> torch.Tensor:
    """Return (M, D) what the layer makes of the tokens `read`."""
    own, mlp = layer.self_attn, layer.mlp
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, own.head_dim, own.scaling)
    calm = _norm(layer.input_layernorm, x)
    kv = adapted(calm, [_linear(own.k_proj), _linear(own.v_proj)])
    if read is not None:
        x, calm = x[read], calm[read]
    q = adapted(calm, [_linear(own.q_proj)])
    mixed = tree_attention(q, kv, turns=turns, blocks=blocks, heads=heads)
    x = adapted(mixed, [_linear(own.o_proj)], residual=x)
    calm = _norm(layer.post_attention_layernorm, x)
    inner = gated(adapted(calm, [_linear(mlp.gate_proj), _linear(mlp.up_proj)]))
    return adapted(inner, [_linear(mlp.down_proj)], residual=x)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return normed(x, norm.weight, norm.variance_epsilon)


def _linear(part: Any) -> Linear:
    """Read a linear layer and the adapter that is on."""
    if not isinstance(part, LoraLinear):
        return Linear(part.weight, part.bias, None)
    plain = part.base_layer
    name = part.active_adapters[0]
    if part.disable_adapters or name not in part.lora_A:
        return Linear(plain.weight, plain.bias, None)
    factors = Factors(part.lora_A[name].weight, part.lora_B[name].weight, part.scaling[name])
    return Linear(plain.weight, plain.bias, factors)
