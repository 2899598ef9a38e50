"""The forward pass of Llama, Mistral, Qwen2 and Qwen3 over packed prefix trees: no padding, no mask, no row for nothing.

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
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from alignment.batching import Batch, sent
from alignment.models import Base, backbone
from alignment.packed_attention import Heads, Rotation, tree_attention
from alignment.packed_flash import flash_attention, has_flash, sequences_of
from alignment.packed_layers import Block, Factors, Linear, adapted, gated_down, normed

MODELS = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen3.Qwen3Model)
PARTS = (
    *(llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    *(mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    *(qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    *(qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
    SiLUActivation,
)
"""What their layers are made of, beside linear layers: another activation or a wrapped norm is none of it."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on how long the rows of a batch are."""
BLOCK_TOKENS = 128
"""Queries of a block: half of a block's last square is computed for nothing, and each block costs some calls."""
Span = tuple[int, int]


class _Segment(NamedTuple):
    """A prompt or a completion, as spans of packed tokens."""

    prompt: Span
    """What it sees beside its own, empty for a prompt."""
    own: Span
    free: bool
    """Whether it gets no gradient."""


class _Part(NamedTuple):
    """The tokens that go through the layers together, from `start` of the packed ones on."""

    start: int
    tokens: int
    segments: list[tuple[Span, Span]]
    spans: list[Span]
    """Of each segment what is read."""
    read: torch.Tensor
    """The same, (M,) into the part's own tokens, on the CPU."""


class _Ways:
    """How a part's queries find their keys in a layer, and in the last one, where only what is read asks."""

    def __init__(self, part: _Part, turns: Rotation, read: torch.Tensor, device: torch.device) -> None:
        """Plan both; `turns` (N, E / 2) are of all packed tokens, `read` is the part's on the device."""
        end = part.start + part.tokens
        keys = (turns[0][:end], turns[1][:end])
        own = (turns[0][part.start : end], turns[1][part.start : end])
        last = (own[0][read], own[1][read])
        whole = [span for _, span in part.segments]
        self._ways = [
            partial(attention_of(part.segments, spans, device), turns=(asking, keys))
            for spans, asking in ((whole, own), (part.spans, last))
            if part.segments
        ]

    def attention(
        self,
        last: bool,
        *,
        noting: list[torch.Tensor] | None = None,
        seeing: torch.Tensor | None = None,
    ) -> Callable[..., torch.Tensor]:
        """Return the attention of a layer: it notes keys and values, or sees those that were noted before its own."""

        def attend(q: torch.Tensor, kv: torch.Tensor, *, heads: Heads) -> torch.Tensor:
            if noting is not None:
                noting.append(kv.detach())
            return self._ways[last](q, kv if seeing is None else torch.cat([seeing, kv]), heads=heads)

        return attend


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
    parts = [layer, own, mlp, mlp.act_fn, layer.input_layernorm, layer.post_attention_layernorm]
    parts += [own.q_norm, own.k_norm] if _norms_heads(own) else []
    linears = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(type(part) in PARTS for part in parts) and all(_read_whole(part, dtype) for part in linears)


def _norms_heads(attention: Any) -> bool:
    """Return whether each head's query and key are normed before they are rotated, as Qwen3's are."""
    return hasattr(attention, "q_norm")


def _read_whole(part: Any, dtype: torch.dtype) -> bool:
    """Return whether `linear_of` reads all that this linear layer computes with: no DoRA, no bias in LoRA, no dropout."""
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


def packed_states(
    base: Base, batch: Batch, places: torch.Tensor, *, learnt: Sequence[int] | None = None
) -> torch.Tensor:
    """Return (len(places), D) last hidden states at `places`, int64 into B*T, under the adapter that is on.

    Everything is planned on the CPU, from the batch's bounds and `places`, and sent before the first layer.

    Args:
        learnt: of each row, how many of its completions, the first ones, may get a gradient. The others see the
            same prompt, keep nothing for the backward pass and take no part in it. None: all may.
    """
    model, config = backbone(base), base.model.config
    segments, sources, positions = _segments(batch, learnt)
    number = torch.zeros(batch.segments.numel(), dtype=torch.int64)
    number[sources] = torch.arange(len(sources))
    first, beside = _parts(segments, number[places].tolist())
    read = torch.cat([first.read, beside.read + first.tokens])  # (M,) into N
    among = torch.zeros(len(sources), dtype=torch.int64).index_copy_(0, read, torch.arange(len(read)))
    tokens, own, others, positions, asked = sent(
        [sources, first.read, beside.read, positions, among[number[places]]], base.device
    )
    x = nn.functional.embedding(batch.input_ids.flatten()[tokens], model.embed_tokens.weight)  # (N, D)
    turns = rotation_at(model, x, positions)
    ways = _Ways(first, turns, own, base.device), _Ways(beside, turns, others, base.device)
    x, y = x[: first.tokens], x[first.tokens :]
    run = partial(checkpoint, layer_states, use_reentrant=False, preserve_rng_state=False)
    layer_of = run if base.checkpointing and torch.is_grad_enabled() else layer_states
    for layer in model.layers:
        last = layer is model.layers[-1]
        seen: list[torch.Tensor] | None = [] if len(y) else None
        x = layer_of(layer, x, own if last else None, ways[0].attention(last, noting=seen), config)
        if seen:
            with torch.no_grad():
                attention = ways[1].attention(last, seeing=seen.pop())
                y = layer_states(layer, y, others if last else None, attention, config)
    return normed_by(model.norm, torch.cat([x, y]) if len(y) else x)[asked]


def rotation_at(model: Any, x: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """Return the rotation at `positions` (N,), in the precision of x (N, D)."""
    cosine, sine = (part[0].chunk(2, dim=-1)[0] for part in model.rotary_emb(x, positions.unsqueeze(0)))
    return cosine.contiguous(), sine.contiguous()


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


def _segments(
    batch: Batch, learnt: Sequence[int] | None
) -> tuple[list[_Segment], torch.Tensor, torch.Tensor]:
    """Return the prompts and completions in the order they are packed in, and of each packed token its place and position.

    Those without gradient come last. A token's place is into B*T; positions of a completion go on after its prompt.
    """
    width = batch.input_ids.shape[1]
    parts = [
        (learnt is not None and number > learnt[row], row, number, span)
        for row, ends in enumerate(batch.bounds)
        for number, span in enumerate(pairwise((0, *ends)))
    ]
    parts.sort(key=lambda part: part[0])  # stable
    found, places, positions = [], [], []
    prompts: dict[int, Span] = {}
    at = 0
    for free, row, number, (start, stop) in parts:
        own = (at, at + stop - start)
        prompt = prompts[row] if number else (at, at)
        prompts.setdefault(row, own)
        found.append(_Segment(prompt, own, free))
        begin = batch.bounds[row][0] if number else 0
        places.append(torch.arange(row * width + start, row * width + stop))
        positions.append(torch.arange(begin, begin + stop - start))
        at = own[1]
    return found, torch.cat(places), torch.cat(positions)


def _parts(segments: Sequence[_Segment], places: Sequence[int]) -> tuple[_Part, _Part]:
    """Return what goes through the layers with a gradient and what goes beside it, and what of each is read."""
    spans = _read_spans([(prompt, own) for prompt, own, _ in segments], places)
    found, start = [], 0
    for free in (False, True):
        chosen = [
            (segment, span) for segment, span in zip(segments, spans, strict=True) if segment.free == free
        ]
        count = sum(own[1] - own[0] for (_, own, _), _ in chosen)
        wanted = [torch.arange(*span) - start for _, span in chosen if span[0] < span[1]]
        found.append(
            _Part(
                start=start,
                tokens=count,
                segments=[(segment.prompt, segment.own) for segment, _ in chosen],
                spans=[span for _, span in chosen],
                read=torch.cat(wanted) if wanted else torch.zeros(0, dtype=torch.int64),
            )
        )
        start += count
    return found[0], found[1]


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


def linear_of(part: Any) -> Linear:
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


def layer_states(
    layer: Any,
    x: torch.Tensor,  # (N, D)
    read: torch.Tensor | None,  # (M,) into N; None: every token
    mix: Callable[..., torch.Tensor],
    config: Any,
    linear: Callable[[Any], Linear] = linear_of,
) -> torch.Tensor:
    """Return (M, D) what the layer makes of the tokens `read`; `linear` reads its linear layers."""
    own, mlp = layer.self_attn, layer.mlp
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, own.head_dim, own.scaling)
    calm = normed_by(layer.input_layernorm, x)
    kv = adapted(calm, [linear(own.k_proj), linear(own.v_proj)])
    if read is not None:
        x, calm = x[read], calm[read]
    q = adapted(calm, [linear(own.q_proj)])
    if _norms_heads(own):
        keys, values = kv.tensor_split([heads.keys * heads.size], dim=1)
        q, kv = heads_normed(own.q_norm, q), torch.cat([heads_normed(own.k_norm, keys), values], dim=1)
    x = adapted(mix(q, kv, heads=heads), [linear(own.o_proj)], residual=x)
    calm = normed_by(layer.post_attention_layernorm, x)
    both = adapted(calm, [linear(mlp.gate_proj), linear(mlp.up_proj)])
    return gated_down(both, linear(mlp.down_proj), residual=x)


def normed_by(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the norm of x (N, D)."""
    return normed(x, norm.weight, norm.variance_epsilon)


def heads_normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the norm of each head of x (N, H * E)."""
    return normed_by(norm, x.reshape(-1, norm.weight.shape[0])).view_as(x)
