"""Pairs and thumbs as the items of a reward model's training: tensors of what the losses need.

Letters: I items (pairs, then thumbs), C answers (two of each pair, then one of each thumb), M members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from alignment.batching import Tree, make_tree
from alignment.models import Base
from alignment.preferences import Pair, Thumb
from alignment.reward_losses import pair_losses, thumb_losses
from alignment.training_config import RewardConfig

Heads = Mapping[str, torch.Tensor]
"""heads (M, D), slopes (M,) and biases (raters, M)"""


@dataclass(frozen=True, slots=True)
class Items:
    """Pairs, then thumbs, as training items: I items, M members."""

    pairs: list[Pair]
    thumbs: list[Thumb]
    trees: list[Tree]
    weights: torch.Tensor  # (I, M): the item's weight times its count in the member's bootstrap
    plain_weights: torch.Tensor  # (I,)
    margins: torch.Tensor  # (pairs,)
    ties: torch.Tensor  # (pairs,) bool
    ups: torch.Tensor  # (thumbs,) bool
    raters: torch.Tensor  # (thumbs,) row of the rater's bias
    flip_rate: float
    """Share of the pairs that the losses take to be turned round."""


def make_items(
    base: Base,
    pairs: list[Pair],
    thumbs: list[Thumb],
    config: RewardConfig,
    *,
    seed: int,
    flip_rate: float = 0.0,
) -> Items:
    """Return the items on the base's device; the seed draws each member's bootstrap of prompts."""
    keys = [pair.prompt_key for pair in pairs] + [thumb.prompt_key for thumb in thumbs]
    counts = bootstrap_counts(keys, members=config.members, seed=seed)  # (I, M)
    plain = torch.tensor([p.weight for p in pairs] + [config.thumb_weight * t.weight for t in thumbs])
    raters = {rater: row for row, rater in enumerate(sorted({thumb.rater for thumb in thumbs}))}
    place = base.device
    return Items(
        pairs=pairs,
        thumbs=thumbs,
        trees=[make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in pairs]
        + [make_tree(t.prompt_ids, (t.answer_ids,)) for t in thumbs],
        weights=(counts * plain.unsqueeze(1)).to(place),
        plain_weights=plain.to(place),
        margins=torch.tensor([p.margin for p in pairs], device=place),
        ties=torch.tensor([p.tie for p in pairs], dtype=torch.bool, device=place),
        ups=torch.tensor([t.up for t in thumbs], dtype=torch.bool, device=place),
        raters=torch.tensor([raters[t.rater] for t in thumbs], dtype=torch.int64, device=place),
        flip_rate=flip_rate,
    )


def bootstrap_counts(keys: Sequence[str], *, members: int, seed: int) -> torch.Tensor:
    """Return (I, M): how often each member's bootstrap of prompts draws each item's prompt; one member gets all."""
    if members == 1:
        return torch.ones(len(keys), 1)
    prompts = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(prompts), (members, len(prompts)), generator=generator)
    counts = torch.stack([torch.bincount(draw, minlength=len(prompts)) for draw in draws])  # (M, prompts)
    return counts[:, [prompts[key] for key in keys]].T.float()


def item_losses(
    scores: torch.Tensor, own: Heads, items: Items, numbers: Sequence[int], *, centring: float
) -> torch.Tensor:
    """Return (I, M) losses of items given pairs first; pairs own two of the scores' rows, thumbs one."""
    pairs = [number for number in numbers if number < len(items.pairs)]
    thumbs = [number - len(items.pairs) for number in numbers[len(pairs) :]]
    compared = scores[: 2 * len(pairs)].view(len(pairs), 2, scores.shape[1])
    of_pairs = pair_losses(
        compared[:, 0],
        compared[:, 1],
        margins=items.margins[pairs],
        ties=items.ties[pairs],
        centring=centring,
        flip_rate=items.flip_rate,
    )
    of_thumbs = thumb_losses(
        scores[2 * len(pairs) :],
        ups=items.ups[thumbs],
        slopes=own["slopes"],
        biases=own["biases"][items.raters[thumbs]],
    )
    return torch.cat([of_pairs, of_thumbs])
