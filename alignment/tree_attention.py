"""FlexAttention's block mask of prefix trees: on a GPU it skips the blocks that a dense mask only hides.

The same rule as `batching`'s dense mask, which stays what is used: no model is switched to block masks yet, because the
kernel that reads them never ran on a GPU here. transformers hands a 4-D BlockMask to every layer as it is
(`masking_utils._preprocess_mask_arguments`); its "flex_attention" implementation reads it.
Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def tree_mask_mod(segments: torch.Tensor) -> MaskMod:
    """Return the rule: causal, and only into the prompt or the same completion.

    Args:
        segments: (B, T) int64, 0 for the prompt, 1.. for each completion, -1 for padding, which sees the prompt.
    """

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own, theirs = segments[row, query], segments[row, key]
        return (query >= key) & ((theirs == 0) | (theirs == own))

    return sees


def tree_block_mask(segments: torch.Tensor) -> BlockMask:
    """Return the block mask of (B, T) segments, for all heads."""
    rows, width = segments.shape
    return create_block_mask(
        tree_mask_mod(segments), B=rows, H=None, Q_LEN=width, KV_LEN=width, device=str(segments.device)
    )
