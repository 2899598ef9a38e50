"""The fit: one linear head on what the bare base makes of an answer, convex and done in a second.

It weighs raters, tells turned labels and ranks answers to learn from, so it must see what people like and resist what is
wrong. A base's last state is about what comes next; what an answer said lies in its tokens. So the head sees the state of
the last token, the mean of the states and the mean of the embeddings. The more a head sees, the more of wrong labels it
learns by heart: how strongly it is pulled to zero is chosen by labels that it did not see.
Letters: C answers, D hidden size, N answer tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alignment.batching import Batch, Tree
from alignment.distributed import ALONE, Crew
from alignment.logprobs import states_at
from alignment.models import Base
from alignment.progress import Progress
from alignment.reward_items import Items
from alignment.reward_training import fit_heads, new_parameters, of_answers
from alignment.training_config import RewardConfig

PULLS = (0.3, 1.0, 3.0)
"""Weights of a head's squared size that the labels may choose from, as `RewardConfig.head_penalty`. Right labels choose the
first, with 30% turned mostly the last (docs/robustness.md)."""
PARTS = 3
"""Of the features, D wide each."""


def answer_features(
    base: Base,
    trees: Sequence[Tree],
    *,
    batch_tokens: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> torch.Tensor:
    """Return (C, 3 D) float32 of the bare base: each answer's last state, the mean of its states and that of its
    embeddings, tree by tree.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    return of_answers(
        base, None, trees, _features, parts=PARTS, batch_tokens=batch_tokens, progress=progress, crew=crew
    )


def _features(base: Base, batch: Batch) -> torch.Tensor:
    states = states_at(base, batch, batch.places).float()  # (N, D)
    said = base.model.get_input_embeddings().weight[batch.targets].float()
    means = torch.segment_reduce(torch.cat([states, said], dim=1), "mean", lengths=batch.lengths, axis=0)
    return torch.cat([states[batch.lengths.cumsum(0) - 1], means], dim=1)


def fitted_head(
    base: Base, features: torch.Tensor, items: Items, config: RewardConfig, *, pull: float = 0.0
) -> dict[str, torch.Tensor]:
    """Return one head fitted to the items' `features` (C, F) alone, with its slope and biases: `fit_heads`, no ensemble.

    It is pulled to zero, as a member's random start would be nothing but an error here.

    Args:
        pull: how strongly; 0: as right labels choose.
    """
    one = replace(config, members=1, head_penalty=pull or PULLS[0])
    own = new_parameters(base, items, one, seed=0, former=features.new_zeros(1, features.shape[1]))
    fit_heads(features, own, items, one)
    return {name: value.detach() for name, value in own.items()}
