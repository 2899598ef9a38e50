"""The block mask of prefix trees says what the dense mask says. Only on a CPU: the GPU kernel never ran here."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from alignment.batching import _tree_mask
from alignment.tree_attention import tree_block_mask, tree_mask_mod


def random_segments(seed: int, *, rows: int = 3, width: int = 150) -> torch.Tensor:
    draw = random.Random(seed)
    table = torch.full((rows, width), -1)
    for row in range(rows):
        at = draw.randint(1, 60)
        table[row, :at] = 0
        for part in range(draw.randint(1, 4)):
            end = min(width, at + draw.randint(1, 30))
            table[row, at:end] = part + 1
            at = end
    return table


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_of_the_block_mask_is_the_dense_mask(seed: int) -> None:
    segments = random_segments(seed)
    rows, width = segments.shape
    told = create_mask(tree_mask_mod(segments), rows, 1, width, width, device="cpu")
    assert torch.equal(told, _tree_mask(segments))


@pytest.mark.parametrize("seed", range(5))
def test_no_block_with_something_to_see_is_skipped(seed: int) -> None:
    segments = random_segments(seed, width=300)
    blocks = tree_block_mask(segments).to_dense().bool()  # (B, 1, T / 128, T / 128)
    padded = torch.nn.functional.pad(_tree_mask(segments), (0, 84, 0, 84))  # to 3 blocks of 128
    seen = padded.unfold(2, 128, 128).unfold(3, 128, 128).flatten(-2).any(-1)
    assert torch.equal(blocks, seen)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_flex_attention_with_the_block_mask_is_dense_attention_with_the_mask() -> None:
    segments = random_segments(1)
    rows, width = segments.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 2, width, 16, generator=generator) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_tree_mask(segments))
    flex = flex_attention(q, k, v, block_mask=tree_block_mask(segments))
    # Two orders of the same float32 sums over at most 150 keys.
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
