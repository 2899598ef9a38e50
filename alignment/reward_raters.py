"""How well labels of some people predict the others': raters left out in turn, measured on held-out prompts of theirs.

Only the convex fit of one head to the base's own states is repeated, which costs seconds; the adapter, which would have
to be trained anew for each group, is absent. So read the figure beside that of the same fit with everybody in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from alignment.batching import Tree, make_tree
from alignment.intervals import Floats
from alignment.models import Base
from alignment.preferences import Pair, Thumb
from alignment.progress import Progress, stop_if_asked
from alignment.reward_items import make_items
from alignment.reward_metrics import new_rater_metrics
from alignment.reward_training import fitted_head, last_states
from alignment.training_config import RewardConfig

FEWEST_RATERS = 3
"""With two, the figure is one person's word against the other's."""


def left_out_rater_metrics(
    base: Base,
    pairs: Sequence[Pair],
    thumbs: Sequence[Thumb],
    held_out: Sequence[Pair],
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """Return `reward/left_out_rater_...` and `reward/left_in_rater_accuracy`; nothing with too few raters.

    Each group's held-out pairs are ranked by a fit to the other groups' labels: prompts and raters are both new.

    Args:
        pairs: training pairs.
        thumbs: training thumbs.
        held_out: pairs with a winner on other prompts.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    folds = rater_folds(sorted({pair.rater for pair in held_out}), config.rater_folds)
    if not folds:
        return {}
    trees = _trees(pairs, thumbs) + _trees(held_out, [])
    states = last_states(base, None, trees, batch_tokens=config.batch_tokens, progress=progress)
    asked = states[-2 * len(held_out) :]
    apart = asked[0::2] - asked[1::2]  # (P, D)

    fits = _Fits(
        base=base, pairs=pairs, thumbs=thumbs, states=states, config=config, seed=seed, progress=progress
    )
    everybody = fits.head_without(set())
    assert everybody is not None  # there are labels: the caller has trained on them
    new, known = [], []
    for fold in folds:
        head = fits.head_without(fold)
        theirs = [number for number, pair in enumerate(held_out) if pair.rater in fold]
        if head is not None:
            new.append(apart[theirs] @ head)
            known.append(apart[theirs] @ everybody)
    return new_rater_metrics(_joined(new), _joined(known)) if new else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fits:
    """What a fit without some raters is made from."""

    base: Base
    pairs: Sequence[Pair]
    thumbs: Sequence[Thumb]
    states: torch.Tensor
    """(C, D) of the pairs' answers, then of the thumbs', then of held-out ones."""
    config: RewardConfig
    seed: int
    progress: Progress

    def head_without(self, left_out: set[str]) -> torch.Tensor | None:
        """Return a head (D,) fitted to the labels of the others; None when there are none."""
        stop_if_asked(self.progress, "the reward model")
        kept = [number for number, pair in enumerate(self.pairs) if pair.rater not in left_out]
        marked = [number for number, thumb in enumerate(self.thumbs) if thumb.rater not in left_out]
        if not kept and not marked:
            return None
        rows = [row for i in kept for row in (2 * i, 2 * i + 1)]
        rows += [2 * len(self.pairs) + i for i in marked]
        chosen = [self.pairs[i] for i in kept], [self.thumbs[i] for i in marked]
        items = make_items(self.base, *chosen, replace(self.config, members=1), seed=self.seed)
        return fitted_head(self.base, self.states[rows], items, self.config, seed=self.seed)


def rater_folds(raters: Sequence[str], folds: int) -> list[set[str]]:
    """Deal the raters into at most `folds` groups; none with fewer than three raters or two groups."""
    if len(raters) < FEWEST_RATERS or folds < 2:
        return []
    count = min(folds, len(raters))
    return [set(raters[number::count]) for number in range(count)]


def _trees(pairs: Sequence[Pair], thumbs: Sequence[Thumb]) -> list[Tree]:
    both = [make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in pairs]
    return both + [make_tree(t.prompt_ids, (t.answer_ids,)) for t in thumbs]


def _joined(parts: Sequence[torch.Tensor]) -> Floats:
    joined: Floats = torch.cat(list(parts)).double().cpu().numpy()
    return joined
