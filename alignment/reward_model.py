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
from alignment.distributed import ALONE, Crew
from alignment.intervals import Floats
from alignment.logprobs import Row
from alignment.models import (
    Base,
    add_adapter,
    free_name,
    load_adapter,
    save_adapter,
)
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Progress, Silent
from alignment.reward_items import make_items
from alignment.reward_metrics import held_out_metrics, length_slopes, thumb_metrics
from alignment.reward_raters import left_out_rater_metrics
from alignment.reward_training import last_states, train_member_heads
from alignment.training_config import RewardConfig
from alignment.training_data import without_prompts
from storage.digests import base_digest
from storage.errors import InvalidField

__all__ = ["RewardConfig", "Scores", "TrainedReward", "load_reward_model", "train_reward_model"]

ABOUT, WEIGHTS = "reward.json", "heads.safetensors"


@dataclass(frozen=True, slots=True)
class Scores:
    """Of C answers, in the order asked."""

    mean: Floats
    """(C,) over the ensemble, in log-odds: a difference is the log-odds that people prefer the answer."""
    std: Floats
    """(C,) over the ensemble."""
    members: Floats
    """(C, A*M)."""

    def conservative(self, *, penalty: float) -> Floats:
        """Return (C,) mean - penalty * std: what PPO may count on where the members differ (arXiv 2310.02743)."""
        found: Floats = self.mean - penalty * self.std
        return found


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
    length_slopes: Floats | None = None
    """(A*M,) taken off each score a token above `mean_length`; None: scores are as the heads give them."""
    mean_length: float = 0.0
    """Tokens of the training answers, where the length term is zero."""
    seen_prompts: frozenset[str] = frozenset()
    """Keys of the prompts that it or a model it was started from learnt from."""
    learnt_from: str = ""
    """For people: what it learnt from, where that are not their labels."""

    def score(self, rows: Sequence[Row], *, progress: Progress | None = None, crew: Crew = ALONE) -> Scores:
        """Score (prompt ids, answer ids) rows.

        Raises:
            Interrupted: `progress` asked to stop.
        """
        trees, numbers = group_by_prompt(rows)
        order = torch.tensor([number for group in numbers for number in group], dtype=torch.int64)
        tokens, watch = self.config.batch_tokens, progress or Silent()
        parts = [
            last_states(self.base, name, trees, batch_tokens=tokens, progress=watch, crew=crew) @ head.T
            for name, head in zip(self.adapters, self.heads, strict=True)
        ]
        found = torch.cat(parts, dim=1).double().cpu()  # (C, A*M), tree by tree
        members: Floats = torch.empty_like(found).index_copy(0, order, found).numpy()
        members = self.freed(members, np.array([len(answer) for _, answer in rows], dtype=np.float64))
        return Scores(mean=members.mean(axis=1), std=members.std(axis=1), members=members)

    def freed(self, members: Floats, lengths: Floats) -> Floats:
        """Return scores (C, A*M) of answers of `lengths` (C,) tokens without their length term, if it is taken off."""
        if self.length_slopes is None:
            return members
        found: Floats = members - np.outer(lengths - self.mean_length, self.length_slopes)
        return found

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
        slopes = np.zeros(0) if self.length_slopes is None else self.length_slopes
        weights = {"heads": self.heads.cpu().contiguous(), "length_slopes": torch.from_numpy(slopes.copy())}
        save_file(weights, str(folder / WEIGHTS))
        about = {
            "base_sha256": base_digest(self.base.path),
            "config": asdict(self.config),
            "mean_length": self.mean_length,
            "metrics": self.metrics,
            "seen_prompts": sorted(self.seen_prompts),
            "learnt_from": self.learnt_from,
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True))


def load_reward_model(base: Base, folder: Path) -> TrainedReward:
    """Put a saved reward model on the base it was trained on.

    Raises:
        InvalidField: it was trained on another base.
    """
    about = json.loads((folder / ABOUT).read_text())
    if about.get("base_sha256", base_digest(base.path)) != base_digest(base.path):
        raise InvalidField("reward model", str(folder), "use one of the same base model")
    weights = load_file(str(folder / WEIGHTS))
    heads = weights["heads"].to(base.device)
    names = [_load(base, folder, number, trainable=False) for number in range(heads.shape[0])]
    slopes = weights.get("length_slopes", torch.zeros(0)).double().numpy()
    config = RewardConfig(
        batch_tokens=about["config"]["batch_tokens"],
        members=heads.shape[1],
        adapters=len(names),
        length_debias=len(slopes) > 0,
    )
    return TrainedReward(
        base=base,
        adapters=tuple(names),
        heads=heads,
        metrics=about["metrics"],
        config=config,
        length_slopes=slopes if len(slopes) else None,
        mean_length=about.get("mean_length", 0.0),
        seen_prompts=frozenset(about.get("seen_prompts", [])),
        learnt_from=about.get("learnt_from", ""),
    )


def _load(base: Base, folder: Path, number: int, *, trainable: bool) -> str:
    name = free_name(base, "reward")
    load_adapter(base, name, folder / f"adapter_{number}", trainable=trainable)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What a training begins from: nothing, or a former reward model's folder."""

    folder: Path | None
    heads: torch.Tensor | None
    """(A, M, D)."""
    seen_prompts: frozenset[str]


def _start(base: Base, folder: Path | None, config: RewardConfig) -> _Start:
    """Read the former model's heads, after checking that the training can continue from it."""
    if folder is None:
        return _Start(folder=None, heads=None, seen_prompts=frozenset())
    if not (folder / ABOUT).is_file():
        raise InvalidField("start_from", str(folder), "give the folder of a saved reward model")
    about = json.loads((folder / ABOUT).read_text())
    if about.get("base_sha256") != base_digest(base.path):
        raise InvalidField("start_from", str(folder), "use a reward model of the same base, or start afresh")
    heads = load_file(str(folder / WEIGHTS))["heads"].to(base.device)
    for name, wanted, has in zip(
        ("adapters", "members"), (config.adapters, config.members), heads.shape[:2], strict=True
    ):
        if wanted != has:
            raise InvalidField(f"reward.{name}", wanted, f"use {has}, as {folder} has, or start afresh")
    return _Start(folder=folder, heads=heads, seen_prompts=frozenset(about["seen_prompts"]))


def train_reward_model(
    base: Base,
    train: Preferences,
    held_out: Preferences | None,
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    start_from: Path | None = None,
    crew: Crew = ALONE,
) -> TrainedReward:
    """Train on pairs, ties and thumbs of `train` and measure on the pairs and thumbs of `held_out`, if there are any.

    Pairs made of thumbs are left out where their thumbs are given: the same judgement would count twice.
    The adapters are named reward_0, reward_1, ...: the first names that are free.
    One kind of thumb alone, or ties alone, train without error and teach that nothing is better: the scores of two
    answers then differ by little more than the members' random start, and the held-out figures say so.

    Args:
        start_from: folder of a former reward model (`TrainedReward.save`) whose adapters and heads the training continues
            from; the adapters' own rank counts. Held-out prompts that it has learnt from are not measured on.
        crew: the processes that train together; process 0 alone measures, the others return without metrics.

    Raises:
        InvalidField: nothing to learn from, an answer without tokens, or a former model that does not fit.
        Interrupted: `progress` asked to stop.
    """
    pairs = [pair for pair in train.pairs if pair.source != "ratings" or not train.thumbs]
    if not pairs and not train.thumbs:
        raise InvalidField("pairs", 0, "collect comparisons or thumbs first")
    start = _start(base, start_from, config)
    trained = _trained(base, start, pairs, train.thumbs, config, seed=seed, progress=progress, crew=crew)
    if config.length_debias:
        trained = _without_length(trained, pairs, train.thumbs, progress, crew)
    if held_out is None or crew.rank > 0:
        return trained
    fresh = without_prompts(held_out, start.seen_prompts)
    metrics = _measure(trained, pairs, fresh, progress)
    asked = [pair for pair in fresh.pairs if not pair.tie]
    if not _by_a_fit(pairs):
        metrics |= left_out_rater_metrics(
            base, pairs, train.thumbs, asked, config, seed=seed, progress=progress
        )
    if start.folder is not None:
        dropped = len(held_out.pairs) + len(held_out.thumbs) - len(fresh.pairs) - len(fresh.thumbs)
        metrics["reward/seen_before"] = float(dropped)
    return replace(trained, metrics=metrics)


def _trained(
    base: Base,
    start: _Start,
    pairs: list[Pair],
    thumbs: Sequence[Thumb],
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> TrainedReward:
    """Train every adapter with its heads; nothing is measured yet."""
    names, heads, stops = [], [], []
    for number in range(config.adapters):
        items = make_items(base, pairs, list(thumbs), config, seed=seed + 104_729 * number)
        names.append(_adapter(base, start, number, config, seed=seed + 7919 * number))
        head, stop = train_member_heads(
            base,
            names[-1],
            items,
            config,
            seed=seed + 1_299_709 * number,
            progress=progress,
            former=None if start.heads is None else start.heads[number],
            crew=crew,
        )
        heads.append(head)
        stops.append(stop)
    learnt = {p.prompt_key for p in pairs} | {t.prompt_key for t in thumbs}
    return TrainedReward(
        base=base,
        adapters=tuple(names),
        heads=torch.stack(heads),
        metrics={},
        config=config,
        stopped_because=next((stop for stop in stops if stop), None),
        seen_prompts=start.seen_prompts | learnt,
    )


def _adapter(base: Base, start: _Start, number: int, config: RewardConfig, *, seed: int) -> str:
    """Add adapter `number`, fresh or a copy of the former one, and return its name."""
    if start.folder is not None:
        return _load(base, start.folder, number, trainable=True)
    name = free_name(base, "reward")
    add_adapter(base, name, config.lora, seed=seed)
    return name


def _rows(pairs: Sequence[Pair]) -> list[Row]:
    return [(p.prompt_ids, answer) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)]


def _without_length(
    trained: TrainedReward, pairs: Sequence[Pair], thumbs: Sequence[Thumb], progress: Progress, crew: Crew
) -> TrainedReward:
    """Measure each member's length term within the training pairs, and among the thumbs, and take it off its scores."""
    rows = _rows(pairs) + [(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs]
    lengths = np.array([len(answer) for _, answer in rows], dtype=np.float64)
    groups = np.array(
        [*(n // 2 for n in range(2 * len(pairs))), *(len(pairs) for _ in thumbs)], dtype=np.int64
    )
    slopes = length_slopes(trained.score(rows, progress=progress, crew=crew).members, lengths, groups)
    return replace(trained, length_slopes=slopes, mean_length=float(lengths.mean()))


def _by_a_fit(pairs: Sequence[Pair]) -> bool:
    """Return whether a fit to everybody's labels ranked the pairs: then they say nothing of raters."""
    return any(pair.source == "ranked" for pair in pairs)


def _measure(
    trained: TrainedReward, pairs: Sequence[Pair], held_out: Preferences, progress: Progress
) -> dict[str, float]:
    """Score the held-out pairs with a winner and the thumbs, and hand the numbers to the report."""
    asked = [pair for pair in held_out.pairs if not pair.tie]
    rows = _rows(asked) + [(thumb.prompt_ids, thumb.answer_ids) for thumb in held_out.thumbs]
    plain = replace(trained, length_slopes=None).score(rows, progress=progress)
    lengths = np.array([len(answer) for _, answer in rows], dtype=np.float64)
    members = trained.freed(plain.members, lengths)
    shape, ends = (len(asked), 2, members.shape[1]), 2 * len(asked)
    longer = sum(np.sign(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs if not p.tie)
    found = held_out_metrics(
        members[:ends].reshape(shape),
        asked,
        seen_raters=None if _by_a_fit(pairs) else {pair.rater for pair in pairs},
        longer_wins=bool(longer >= 0),
        plain_members=plain.members[:ends].reshape(shape),
    )
    if held_out.thumbs:
        found |= thumb_metrics(members[ends:].mean(axis=1), held_out.thumbs)
    return found
