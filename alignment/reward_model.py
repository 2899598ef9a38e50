"""The reward model: a small LoRA adapter and an ensemble of linear heads on the last token's hidden state.

All members of an adapter share its forward pass, so an ensemble costs as much as one model; they differ by
their random start and by the bootstrap of prompts they learn from. More `adapters` make errors less alike.
Training itself is in `reward_training`.
Letters: C answers, D hidden size, M members of an adapter, A adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from alignment.batching import group_by_prompt
from alignment.intervals import Floats
from alignment.logprobs import Row
from alignment.models import (
    Base,
    add_adapter,
    free_name,
    load_adapter,
    save_adapter,
)
from alignment.preferences import Pair, Preferences
from alignment.progress import Progress, Silent
from alignment.reward_items import make_items
from alignment.reward_metrics import held_out_metrics
from alignment.reward_training import last_states, train_member_heads
from alignment.training_config import RewardConfig
from storage.errors import InvalidField

__all__ = ["RewardConfig", "Scores", "TrainedReward", "load_reward_model", "train_reward_model"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of C answers, in the order asked."""

    mean: Floats
    """(C,) over the ensemble, in log-odds: a difference is the log-odds that people prefer the answer."""
    std: Floats
    """(C,) over the ensemble."""
    members: Floats
    """(C, A*M)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """A scorer: adapters on the base it was trained on, and their heads."""

    base: Base
    adapters: tuple[str, ...]
    heads: torch.Tensor
    """(A, M, D) float32."""
    metrics: dict[str, float]
    """Held-out evidence, `reward/...` (see `reward_metrics.held_out_metrics`)."""
    config: RewardConfig
    stopped_because: str | None = None
    """Set when training met numbers that are not finite; the last good weights are kept."""

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None) -> Scores:
        """Score (prompt ids, answer ids) rows.

        Raises:
            Interrupted: `progress` asked to stop.
        """
        trees, numbers = group_by_prompt(rows)
        order = torch.tensor([number for group in numbers for number in group], dtype=torch.int64)
        tokens, watch = self.config.batch_tokens, progress or Silent()
        parts = [
            last_states(self.base, name, trees, batch_tokens=tokens, progress=watch) @ head.T
            for name, head in zip(self.adapters, self.heads, strict=True)
        ]
        found = torch.cat(parts, dim=1).double().cpu()  # (C, A*M), tree by tree
        members = torch.empty_like(found).index_copy(0, order, found).numpy()
        return Scores(mean=members.mean(axis=1), std=members.std(axis=1), members=members)

    def win_probabilities(self, ours: Sequence[Row], theirs: Sequence[Row]) -> Floats:
        """Return the calibrated probability that people prefer each of `ours` to its counterpart in `theirs`."""
        scores = self.score([*ours, *theirs]).mean
        leads = scores[: len(ours)] - scores[len(ours) :]
        odds: Floats = 1 / (1 + np.exp(-leads / self.metrics.get("reward/temperature", 1.0)))
        return odds

    def save(self, folder: Path) -> None:
        """Write adapters, heads and metrics for `load_reward_model`."""
        for number, name in enumerate(self.adapters):
            save_adapter(self.base, name, folder / f"adapter_{number}")
        save_file({"heads": self.heads.cpu().contiguous()}, str(folder / "heads.safetensors"))
        about = {"config": asdict(self.config), "metrics": self.metrics}
        (folder / "reward.json").write_text(json.dumps(about, indent=2, sort_keys=True))


def load_reward_model(base: Base, folder: Path) -> TrainedReward:
    """Put a saved reward model on the base it was trained on."""
    about = json.loads((folder / "reward.json").read_text())
    heads = load_file(str(folder / "heads.safetensors"))["heads"].to(base.device)
    names = []
    for number in range(heads.shape[0]):
        names.append(free_name(base, "reward"))
        load_adapter(base, names[-1], folder / f"adapter_{number}", trainable=False)
    config = RewardConfig(
        batch_tokens=about["config"]["batch_tokens"], members=heads.shape[1], adapters=len(names)
    )
    return TrainedReward(
        base=base, adapters=tuple(names), heads=heads, metrics=about["metrics"], config=config
    )


def train_reward_model(
    base: Base,
    train: Preferences,
    held_out: Preferences,
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
) -> TrainedReward:
    """Train on pairs, ties and thumbs of `train` and measure on the pairs of `held_out`.

    Pairs made of thumbs are left out where their thumbs are given: the same judgement would count twice.
    The adapters are named reward_0, reward_1, ...: the first names that are free.

    Raises:
        InvalidField: nothing to learn from.
        Interrupted: `progress` asked to stop.
    """
    pairs = [pair for pair in train.pairs if pair.source != "ratings" or not train.thumbs]
    if not pairs and not train.thumbs:
        raise InvalidField("pairs", 0, "collect comparisons or thumbs first")
    names, heads, stops = [], [], []
    for number in range(config.adapters):
        names.append(free_name(base, "reward"))
        add_adapter(base, names[-1], config.lora, seed=seed + 7919 * number)
        items = make_items(base, pairs, list(train.thumbs), config, seed=seed + 104_729 * number)
        head, stop = train_member_heads(
            base, names[-1], items, config, seed=seed + 1_299_709 * number, progress=progress
        )
        heads.append(head)
        stops.append(stop)
    trained = TrainedReward(
        base=base,
        adapters=tuple(names),
        heads=torch.stack(heads),
        metrics={},
        config=config,
        stopped_because=next((stop for stop in stops if stop), None),
    )
    return replace(trained, metrics=_measure(trained, pairs, held_out, progress))


def _measure(
    trained: TrainedReward, pairs: Sequence[Pair], held_out: Preferences, progress: Progress
) -> dict[str, float]:
    """Score the held-out pairs with a winner, and hand the numbers to the report."""
    asked = [pair for pair in held_out.pairs if not pair.tie]
    rows = [(p.prompt_ids, answer) for p in asked for answer in (p.chosen_ids, p.rejected_ids)]
    scores = trained.score(rows, progress=progress).members  # (2P, M)
    members = scores.reshape(len(asked), 2, scores.shape[1])
    longer = sum(np.sign(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs if not p.tie)
    return held_out_metrics(
        members, asked, seen_raters={pair.rater for pair in pairs}, longer_wins=bool(longer >= 0)
    )
