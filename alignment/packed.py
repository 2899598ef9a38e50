"""The forward pass of Llama and Qwen2 models on a CPU over packed prefix trees: no padding, no mask, no row for nothing.

It reads the weights of the transformers model and of the adapter that is on, and equals that model's own forward pass to
rounding (tested). The last layer computes queries and the feed-forward part only where a hidden state is read.
What `packs` does not know goes through the model's own forward pass: see `logprobs.states_at`.
Letters: B rows, T tokens a row, N tokens in all, M tokens read, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from alignment.batching import Batch
from alignment.models import Base, backbone
from alignment.packed_attention import Heads, Rotation, tree_attention
from alignment.packed_layers import Block, Factors, Linear, adapted, gated_down, normed

MODELS = (llama.LlamaModel, qwen2.Qwen2Model)
PARTS = (
    *(llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    *(qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    SiLUActivation,
)
"""What their layers are made of, beside linear layers: another activation or a wrapped norm is none of it."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on how long the rows of a batch are."""
BLOCK_TOKENS = 128
"""Queries of a block: half of a block's last square is computed for nothing, and each block costs some calls."""
Span = tuple[int, int]


def packs(base: Base) -> bool:
    """Return whether `packed_states` computes what the model computes, and as it is to be computed.

    Sliding windows are ruled out by `base.share_prefixes`. With checkpointing the layers must forget what they
    computed, which is transformers' work.
    """
    model = backbone(base)
    return bool(
        base.device.type == "cpu"
        and base.dtype in (torch.float32, torch.float64)
        and base.share_prefixes
        and not base.checkpointing
        and type(model) in MODELS
        and type(model.embed_tokens) is nn.Embedding
        and model.rotary_emb.rope_type in ROPE_TYPES
        and all(_known(layer, base.dtype) for layer in model.layers)
    )


def _known(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether `_layer` does all that this layer does."""
    own, mlp = layer.self_attn, layer.mlp
    parts = (layer, own, mlp, mlp.act_fn, layer.input_layernorm, layer.post_attention_layernorm)
    linears = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(type(part) in PARTS for part in parts) and all(_read_whole(part, dtype) for part in linears)


def _read_whole(part: Any, dtype: torch.dtype) -> bool:
    """Return whether `_linear` reads all that this linear layer computes with: no DoRA, no bias in LoRA, no dropout."""
    if not isinstance(part, LoraLinear):
        return type(part) is nn.Linear and part.weight.dtype == dtype
    names = part.active_adapters
    if len(names) != 1 or part.merged or part.training or not _read_whole(part.base_layer, dtype):
        return False
    name = names[0]
    return name not in part.lora_A or (
        part.lora_A[name].weight.dtype == dtype
        and name not in part.lora_variant
        and not part.lora_bias.get(name)
    )


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
    both = adapted(calm, [_linear(mlp.gate_proj), _linear(mlp.up_proj)])
    return gated_down(both, _linear(mlp.down_proj), residual=x)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return normed(x, norm.weight, norm.variance_epsilon)


def _linear(part: Any) -> Linear:
    """Read a linear layer and the adapter that is on."""
    if type(part) is nn.Linear:
        return Linear(part.weight, part.bias, None)
    plain = part.base_layer
    name = part.active_adapters[0]
    if part.disable_adapters or name not in part.lora_A:
        return Linear(plain.weight, plain.bias, None)
    factors = Factors(part.lora_A[name].weight, part.lora_B[name].weight, part.scaling[name])
    return Linear(plain.weight, plain.bias, factors)
