"""What a training needs in memory, from the model's shape: it picks the micro-batches, or says what does not fit.

Bytes per token follow from the tensors that autograd keeps in a Llama, Qwen2 or Qwen3 layer under LoRA, in transformers' own
pass or in the packed one. Absent: the memory of sampling beyond its KV cache.
Letters: D hidden size, Q and K width of all query and of all key heads, F width of the feed-forward part, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from alignment.batching import Tree, group_by_prompt
from alignment.logprobs import CPU_LOGITS_A_CHUNK, GPU_LOGITS_A_CHUNK, masks
from alignment.models import Base
from alignment.packed import BLOCK_TOKENS, packs
from alignment.packed_attention import KEPT_KEYS
from alignment.preferences import Preferences, Thumb
from storage.errors import KotaeError

GIB = 2**30
WIDE = 4
"""Bytes of a float32: adapters, optimiser, log-probs, and what LoRA layers keep of their input."""
CPU_SLACK = 1.8
"""Resident memory over tensors with glibc's allocator: 563 over 318 MiB in one measurement (docs/gpu.md)."""
GPU_SLACK = 1.1
"""For blocks that fit no request; not measured."""
GATHERED_LAYERS = 3
"""Of a base in parts, whole at a time: the one in use, what it was received in and what the next one is received in."""


NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
"""Of a configuration, for an estimate."""


UNLIMITED = 2**63 - 1


class DoesNotFit(KotaeError):
    """A training needs more memory than there is; raised before it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model's configuration decides its memory."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool
    norms_heads: bool = False
    """Whether each head's query and key are normed, which keeps them once more for the backward pass."""

    @property
    def query_width(self) -> int:
        """Return Q."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Return K."""
        return self.kv_heads * self.head_dim


def shape_of(config: Any) -> Shape:
    """Read a transformers configuration of a Llama-like model."""
    heads = int(config.num_attention_heads)
    return Shape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        ffn=int(config.intermediate_size),
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
        norms_heads=config.model_type == "qwen3",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes by what holds them."""

    weights: int
    adapters: int
    """All that are resident, float32."""
    optimiser: int
    """Gradients, Adam's two moments and the last good weights of those that learn."""
    activations: int
    """Of one micro-batch, kept for the backward pass, and the largest temporaries of it."""
    logits: int
    kv_cache: int
    """Of sampling, which is not at the same time as the backward pass."""
    gathered: int
    """Layers that are whole for a moment, of a base in parts."""

    @property
    def total(self) -> int:
        """Return the peak."""
        fixed = self.weights + self.adapters + self.optimiser + self.logits + self.gathered
        return fixed + max(self.activations, self.kv_cache)


def lora_parameters(shape: Shape, rank: int) -> int:
    """Return how many numbers one adapter on every linear layer has."""
    d, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.ffn
    sides = (d + q) + 2 * (d + k) + (q + d) + 3 * (d + f)
    return shape.layers * rank * sides


def layer_parameters(shape: Shape) -> int:
    """Return how many numbers one layer of the frozen model has, biases and norms left out."""
    d, q, k = shape.hidden, shape.query_width, shape.key_width
    return 2 * d * q + 2 * d * k + 3 * d * shape.ffn


def base_parameters(shape: Shape, *, parts: int = 1) -> int:
    """Return how many numbers of the frozen model one of `parts` processes holds: the layers are cut, nothing else."""
    around = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * layer_parameters(shape) // parts + around


def activation_bytes_per_token(
    shape: Shape, *, rank: int, width: int, mask_width: int = 0, checkpointing: bool = False
) -> int:
    """Return what the layers keep of one token for the backward pass.

    Args:
        width: bytes of a number of the base: 4 (float32) or 2 (bfloat16).
        mask_width: tokens a row under a dense tree mask, which every layer keeps as numbers; 0: causal.
        checkpointing: the layers' inputs are kept, and everything of one layer at a time.
    """
    d, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.ffn
    short = width != WIDE  # then PEFT casts the input of each LoRA layer: a copy for each
    norms = (2 * d + (q + k if shape.norms_heads else 0)) * WIDE
    lora_inputs = ((5 * d if short else 2 * d) + q + f) * WIDE + 7 * rank * WIDE
    attention = (q + 2 * (q if mask_width else k) + (q if short else 0) + mask_width) * width
    layer = norms + lora_inputs + attention + 3 * f * width + WIDE * shape.heads + 2 * WIDE
    return shape.layers * d * width + layer if checkpointing else shape.layers * layer


def packed_bytes_per_token(shape: Shape, *, width: int, longest: int, checkpointing: bool = False) -> int:
    """Return what the packed pass keeps of one token for the backward pass, at most for rows of one or two answers.

    Of the last layer, which is computed only where it is read, it counts everything.

    Args:
        width, checkpointing: as for `activation_bytes_per_token`; with 2, the attention is the GPU's.
        longest: tokens of the longest row; what a token's softmax takes on a CPU grows with it, up to `KEPT_KEYS`.
    """
    d, q, k, f = shape.hidden, shape.query_width, shape.key_width, shape.ffn
    softmax = (
        min(longest, KEPT_KEYS) + BLOCK_TOKENS
    ) // 2  # on average, with the squares at the ends of blocks
    seen = softmax if width == WIDE else 1  # the GPU's attention keeps the logarithm of the sum
    layer = (4 * d + 2 * q + 2 * k + 2 * f) * width + (2 + shape.heads * seen) * WIDE
    if shape.norms_heads:
        layer += (q + k) * width + (shape.heads + shape.kv_heads) * WIDE
    # In the backward pass two more numbers as wide as the feed-forward part, for which a last layer makes room elsewhere.
    return shape.layers * d * width + layer + 2 * f * width if checkpointing else shape.layers * layer


def estimate(
    shape: Shape,
    *,
    rank: int,
    width: int,
    batch_tokens: int,
    mask_width: int = 0,
    checkpointing: bool = False,
    packed_row: int = 0,
    logits_a_chunk: int = CPU_LOGITS_A_CHUNK,
    adapters: int = 2,
    learning: int = 1,
    sample_tokens: int = 0,
    parts: int = 1,
) -> Estimate:
    """Return what a training needs at its peak.

    Args:
        packed_row: tokens of the longest row in the packed pass; 0: transformers' own pass.
        logits_a_chunk: in memory at once.
        adapters: resident at once: policy and reference; with PPO also critic and reward model.
        learning: of them, those with an optimiser: 1, with PPO 2.
        sample_tokens: prompt and answer tokens in the KV cache while sampling.
        parts: processes over which the base is cut.
    """
    one = lora_parameters(shape, rank) * WIDE
    kept = activation_bytes_per_token(
        shape, rank=rank, width=width, mask_width=mask_width, checkpointing=checkpointing
    )
    if packed_row:
        kept = packed_bytes_per_token(shape, width=width, longest=packed_row, checkpointing=checkpointing)
    temporaries = 2 * shape.ffn * width
    return Estimate(
        weights=base_parameters(shape, parts=parts) * width,
        adapters=adapters * one,
        optimiser=learning * 4 * one,
        activations=batch_tokens * (kept + temporaries),
        logits=logits_a_chunk * (WIDE + (WIDE if width != WIDE else 0)),
        kv_cache=sample_tokens * shape.layers * 2 * shape.key_width * width,
        gathered=GATHERED_LAYERS * layer_parameters(shape) * width if parts > 1 else 0,
    )


def available_bytes(device: torch.device) -> int:
    """Return what this process may still take: of its share of the GPU, or of RAM and the control group's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)  # `gpu_memory_share` of the run
        room = min(free + torch.cuda.memory_reserved(device), share * total)
        return max(0, int(room - torch.cuda.memory_allocated(device)))
    return min(int(psutil.virtual_memory().available), _group_room())


def _group_room(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """Return what this process's control group and those around it still allow (version 2; of version 1 the memory one).

    File pages can be dropped and count as free.
    """
    try:
        rows = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        rows = []
    room = _room_of(root)  # inside a container the root is its own group
    for _, controllers, path in rows:
        if controllers in ("", "memory"):
            folder = root / controllers / path.lstrip("/")
            while folder != root and root in folder.parents:
                room = min(room, _room_of(folder))
                folder = folder.parent
    return room


def _room_of(folder: Path) -> int:
    """Return what one control group still allows."""
    for limit, usage, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return UNLIMITED if most == "max" else int(most) - used + int(rows.get(dropped, 0))
    return UNLIMITED


def _check_sampling(needed: float, sample_tokens: int, room: int) -> None:
    if needed > room:
        raise DoesNotFit(
            f"memory: sampling answers with {sample_tokens} tokens at once needs {needed / GIB:.2f} GiB beside the "
            f"model, {room / GIB:.2f} GiB are available; set a lower ppo.sample_batch_tokens, or free memory"
        )


def fitting_tokens(
    shape: Shape,
    *,
    rank: int,
    width: int,
    longest: int,
    dense_mask: bool,
    packed: bool = False,
    logits_a_chunk: int = CPU_LOGITS_A_CHUNK,
    learning: int = 1,
    sample_tokens: int = 0,
    parts: int = 1,
    room: int,
    slack: float,
) -> tuple[int, bool]:
    """Return the largest token budget of a micro-batch that fits, and whether that takes checkpointing.

    Args:
        longest: tokens of the largest prompt with its answers, which is never split: the budget is at least that.
        packed: whether the packed pass is taken, which needs no mask.
        logits_a_chunk, learning, sample_tokens, parts: as for `estimate`.
        room: bytes left once weights and adapters are there.

    Raises:
        DoesNotFit: the largest prompt alone, or the cache of sampling, is too large; names the needed and the
            available memory and the fix.
    """
    of = partial(estimate, shape, rank=rank, width=width, logits_a_chunk=logits_a_chunk)
    cost = of(batch_tokens=0, adapters=0, learning=learning, sample_tokens=sample_tokens, parts=parts)
    fixed = slack * (cost.optimiser + cost.logits + cost.gathered)
    _check_sampling(fixed + slack * cost.kv_cache, sample_tokens, room)
    rows = {"packed_row": longest if packed else 0, "mask_width": longest if dense_mask else 0}
    for checkpointing in (False, True):
        cost = of(batch_tokens=1, checkpointing=checkpointing, **rows)
        a_token = slack * cost.activations
        fits = max(0, int((room - fixed) / a_token))
        if fits >= longest:
            return fits, checkpointing
    fixes = [f"lower data.max_tokens so that none exceeds {fits} tokens"] if fits else []
    fixes += ['set precision = "bfloat16"'] if width == WIDE else []
    fixes += ["cut the model over several devices (launcher, shard_base)"] if parts == 1 else []
    raise _does_not_fit(longest, fixes, needed=fixed + longest * a_token, room=room)


def _does_not_fit(longest: int, fixes: list[str], *, needed: float, room: int) -> DoesNotFit:
    return DoesNotFit(
        f"memory: training on the largest prompt with its answers ({longest} tokens), with checkpointing, needs "
        f"{needed / GIB:.2f} GiB beside the model, {room / GIB:.2f} GiB are available; "
        f"{', '.join([*fixes, 'lower lora.rank'])}, or free memory"
    )


def plan_batches(base: Base, *, longest: int, rank: int, learning: int = 1, sample_tokens: int = 0) -> None:
    """Hold `base`'s budgets to what the free memory allows, with checkpointing if it must be; no result changes.

    Of a model without the sizes of a Llama nothing is estimated: its budget stays.

    Args:
        learning, sample_tokens: as for `estimate`.

    Raises:
        DoesNotFit: the largest prompt with its answers (`longest` tokens) is too large for this device.
    """
    config = base.model.config
    base.checkpointing = False  # an earlier plan's
    if not all(hasattr(config, name) for name in NEEDED):
        return
    base.most_tokens, base.checkpointing = fitting_tokens(
        shape_of(config),
        rank=rank,
        width=base.dtype.itemsize,
        longest=longest,
        dense_mask=masks(base),
        packed=packs(base),
        logits_a_chunk=CPU_LOGITS_A_CHUNK if base.device.type == "cpu" else GPU_LOGITS_A_CHUNK,
        learning=learning,
        sample_tokens=sample_tokens,
        parts=base.parts,
        room=available_bytes(base.device),
        slack=CPU_SLACK if base.device.type == "cpu" else GPU_SLACK,
    )


def read_shape(folder: Path) -> Shape:
    """Read the shape from a model folder's config.json, without its weights."""
    from types import SimpleNamespace

    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table.setdefault("tie_word_embeddings", False)
    return shape_of(SimpleNamespace(**table))


def longest(base: Base, labels: Preferences) -> int:
    """Return the tokens of the largest prompt with its answers, which no micro-batch can split."""
    alone = [Tree(thumb.prompt_ids, (thumb.answer_ids,)) for thumb in labels.thumbs]
    compared = [Tree(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in labels.pairs]
    return longest_tree(base, [*alone, *compared])


def longest_learnt(base: Base, thumbs: Sequence[Thumb]) -> int:
    """Return the tokens of the largest tree that KTO lays out: a prompt with its answers, or each answer alone where no row
    is shared."""
    if not (packs(base) or masks(base)):
        return longest(base, Preferences(pairs=(), thumbs=tuple(thumbs)))
    trees, _ = group_by_prompt([(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs])
    return longest_tree(base, trees)


def longest_tree(base: Base, trees: Sequence[Tree]) -> int:
    """Return the tokens of the largest tree as it is laid out: where no row is shared, its answers repeat the prompt."""
    shared = packs(base) or masks(base)
    sizes = [
        len(tree.prompt) + sum(map(len, tree.completions))
        if shared
        else len(tree.completions) * (len(tree.prompt) + max(map(len, tree.completions)))
        for tree in trees
    ]
    return max(sizes, default=1)
