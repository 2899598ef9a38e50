"""The forward pass of Llama and Qwen2 models over packed prefix trees: no padding, no mask, no row for nothing.

On a CPU in float32, on a GPU in bfloat16 with float32 adapters; only the attention differs.

It reads the weights of the transformers model and of the adapter that is on, and equals that model's own forward pass to
rounding (tested). The last layer computes queries and the feed-forward part only where a hidden state is read.
What `packs` does not know goes through the model's own forward pass: see `logprobs.states_at`.
Letters: B rows, T tokens a row, N tokens in all, M tokens read, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from alignment.batching import Batch, sent
from alignment.models import Base, backbone
from alignment.packed_attention import Heads, Rotation, tree_attention
from alignment.packed_flash import flash_attention, has_flash, sequences_of
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
    """Return whether `packed_states` computes what the model computes: in float32 on a CPU, in bfloat16 on a GPU.

    Sliding windows are ruled out by `base.share_prefixes`.
    """
    model = backbone(base)
    return bool(
        base.share_prefixes
        and type(model) in MODELS
        and _computes(base, model.layers[0].self_attn.head_dim)
        and type(model.embed_tokens) is nn.Embedding
        and model.rotary_emb.rope_type in ROPE_TYPES
        and all(_known(layer, base.dtype) for layer in model.layers)
    )


def _computes(base: Base, head_size: int) -> bool:
    """Return whether there is an attention for this device and precision."""
    if base.device.type == "cpu":
        return base.dtype in (torch.float32, torch.float64)
    return base.dtype == torch.bfloat16 and has_flash(base.device, head_size)


def _known(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether `layer_states` does all that this layer does."""
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
        part.lora_A[name].weight.dtype == torch.promote_types(dtype, torch.float32)
        and name not in part.lora_variant
        and not part.lora_bias.get(name)
    )


def packed_states(base: Base, batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """Return (len(places), D) last hidden states at `places`, int64 into B*T, under the adapter that is on.

    Everything is planned on the CPU, from the batch's bounds and `places`, and sent before the first layer.
    """
    model, config = backbone(base), base.model.config
    segments = _segments(batch.bounds)
    kept, positions = _kept(batch)
    number = torch.zeros(batch.segments.numel(), dtype=torch.int64).index_copy_(
        0, kept, torch.arange(len(kept))
    )
    spans = _read_spans(segments, number[places].tolist())
    read = torch.cat([torch.arange(*span) for span in spans if span[0] < span[1]])  # (M,) into N
    among = torch.zeros(len(kept), dtype=torch.int64).index_copy_(0, read, torch.arange(len(read)))
    kept, positions, read, asked = sent([kept, positions, read, among[number[places]]], base.device)
    x = nn.functional.embedding(batch.input_ids.flatten()[kept], model.embed_tokens.weight)  # (N, D)
    keys = rotation_at(model, x, positions)
    mix = attention_of(segments, [own for _, own in segments], base.device)
    run = partial(checkpoint, layer_states, use_reentrant=False, preserve_rng_state=False)
    layer_of = run if base.checkpointing and torch.is_grad_enabled() else layer_states
    for layer in model.layers[:-1]:
        x = layer_of(layer, x, None, partial(mix, turns=(keys, keys)), config)
    mix = partial(attention_of(segments, spans, base.device), turns=((keys[0][read], keys[1][read]), keys))
    x = layer_of(model.layers[-1], x, read, mix, config)
    return normed_by(model.norm, x)[asked]


def rotation_at(model: Any, x: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """Return the rotation at `positions` (N,), in the precision of x (N, D)."""
    cosine, sine = (part[0].chunk(2, dim=-1)[0] for part in model.rotary_emb(x, positions.unsqueeze(0)))
    return cosine.contiguous(), sine.contiguous()


def _kept(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) which of B*T are tokens, and their positions: those of an answer go on after its prompt."""
    width = batch.input_ids.shape[1]
    kept = [torch.arange(row * width, row * width + ends[-1]) for row, ends in enumerate(batch.bounds)]
    positions = [
        part
        for ends in batch.bounds
        for part in (
            torch.arange(ends[0]),
            *(torch.arange(ends[0], ends[0] + stop - start) for start, stop in pairwise(ends)),
        )
    ]
    return torch.cat(kept), torch.cat(positions)


def attention_of(
    segments: Sequence[tuple[Span, Span]], spans: Sequence[Span], device: torch.device
) -> Callable[..., torch.Tensor]:
    """Return the attention of the queries `spans` of the segments."""
    if device.type != "cpu":
        return _flash(segments, spans, device)
    return partial(tree_attention, blocks=_blocks(segments, spans, BLOCK_TOKENS))


def _flash(
    segments: Sequence[tuple[Span, Span]], spans: Sequence[Span], device: torch.device
) -> Callable[..., torch.Tensor]:
    whole = max(end for _, (_, end) in segments)
    return partial(flash_attention, sequences=sequences_of(_blocks(segments, spans, whole), device))


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


def _blocks(segments: Sequence[tuple[Span, Span]], spans: Sequence[Span], size: int) -> list[Block]:
    """Cut the queries `spans` of the segments into blocks of at most `size`; queries are numbered in their order."""
    blocks: list[Block] = []
    done = 0
    for (prompt, (start, _)), (first, end) in zip(segments, spans, strict=True):
        for at in range(first, end, size):
            stop = min(at + size, end)
            queries = slice(done, done + stop - at)
            done = queries.stop
            blocks.append(Block(queries=queries, prompt=slice(*prompt), own=slice(start, stop)))
    return blocks


def layer_states(
    layer: Any,
    x: torch.Tensor,  # (N, D)
    read: torch.Tensor | None,  # (M,) into N; None: every token
    mix: Callable[..., torch.Tensor],
    config: Any,
) -> torch.Tensor:
    """Return (M, D) what the layer makes of the tokens `read`."""
    own, mlp = layer.self_attn, layer.mlp
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, own.head_dim, own.scaling)
    calm = normed_by(layer.input_layernorm, x)
    kv = adapted(calm, [_linear(own.k_proj), _linear(own.v_proj)])
    if read is not None:
        x, calm = x[read], calm[read]
    q = adapted(calm, [_linear(own.q_proj)])
    x = adapted(mix(q, kv, heads=heads), [_linear(own.o_proj)], residual=x)
    calm = normed_by(layer.post_attention_layernorm, x)
    both = adapted(calm, [_linear(mlp.gate_proj), _linear(mlp.up_proj)])
    return gated_down(both, _linear(mlp.down_proj), residual=x)


def normed_by(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the norm of x (N, D)."""
    return normed(x, norm.weight, norm.variance_epsilon)


def _linear(part: Any) -> Linear:
    """Read a linear layer and the adapter that is on."""
    if type(part) is nn.Linear:
        return Linear(part.weight, part.bias, None)
    plain = part.base_layer
    name = part.active_adapters[0]
    if part.disable_adapters or name not in part.lora_A:
        return Linear(plain.weight, plain.bias, None)
    down, up = part.lora_A[name].weight, part.lora_B[name].weight
    narrow = (down.detach().to(plain.weight.dtype), up.detach().to(plain.weight.dtype))
    return Linear(plain.weight, plain.bias, Factors(down, up, part.scaling[name], narrow))
