"""What the processes of a run do together: process 0 names a piece of work, and each does it at its own place.

Process 0 alone has storage, progress, caches, checkpoints and files. The others hold the model and what was trained on it;
they need the base's and the adapters' folders at the same paths. Alone, a place is just where the model is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from alignment.choose import Method
from alignment.config import AlignmentConfig
from alignment.distributed import ALONE, Crew, LostProcess, join, leave
from alignment.dpo import train_dpo
from alignment.kto import train_kto
from alignment.memory import longest, longest_learnt, plan_batches
from alignment.models import (
    Base,
    adapter_parameters,
    add_policy,
    has_adapter,
    load_base,
    lora_targets,
    remove_adapter,
)
from alignment.ppo import train_ppo
from alignment.ppo_config import PpoConfig
from alignment.ppo_rollouts import Sampler
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Interrupted, Progress, Silent
from alignment.ranked_answers import pairs_to_learn, thumbs_to_learn
from alignment.reference_cache import ReferenceCache
from alignment.resume import Kept, Trained, same_to_learn
from alignment.reward_model import RewardConfig, TrainedReward, load_reward_model, train_reward_model
from alignment.rollouts import CPU_SAMPLE_TOKENS
from alignment.training import Weights, all_finite, restore_weights
from alignment.training_config import LoraSpec
from storage.errors import CorruptData
from storage.records import Policy

Made = TypeVar("Made")


@dataclass(slots=True, kw_only=True)
class Place:
    """One process's part of a run."""

    progress: Progress
    crew: Crew = ALONE
    base: Base | None = None
    scorer: TrainedReward | None = None
    """The latest trained reward model."""
    at_work: bool = False
    """The others are busy with a piece of work and hear nothing else."""

    def together(self, work: Callable[..., Made], *shared: Any, **own: Any) -> Made:
        """Do `work(place, *shared, **own)` here, and `work(place, *shared)` in the other processes."""
        self.crew.told((work, shared))
        self.at_work = True
        try:
            made = work(self, *shared, **own)
        except Interrupted:  # agreed by all, or in a part that is process 0's alone
            self.at_work = False
            raise
        self.at_work = False
        return made


@contextmanager
def leading(progress: Progress, *, cpu: bool) -> Iterator[Place]:
    """Join the others as process 0, and let them go at the end.

    Raises:
        LostProcess: the work was to stop, because a launcher ends all when one has died.
    """
    place = Place(progress=progress, crew=join(cpu=cpu))
    stopped = False
    try:
        yield place
    except Interrupted:
        stopped = True
        raise
    finally:
        try:
            _let_go(place)
        except LostProcess:
            if stopped:
                raise
        finally:
            leave()


def _let_go(place: Place) -> None:
    """Tell the others that all is done, and hear that they are there."""
    if not place.at_work:
        place.crew.told(None)
        place.crew.any(False)


def follow(*, cpu: bool) -> int:
    """Do what process 0 names until it lets go; return the exit code.

    Signals are process 0's to answer: it ends the work in all processes, after a checkpoint.
    """
    crew = join(cpu=cpu)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    place = Place(progress=Silent(), crew=crew)
    nothing: Any = None
    try:
        while (told := crew.told(nothing)) is not None:
            work, shared = told
            with suppress(Interrupted):
                work(place, *shared)
        crew.any(False)
    except LostProcess:
        return 1
    leave()
    return 0


# -- the pieces of work -----------------------------------------------------------------------------------


def load(place: Place, incumbent: Policy, config: AlignmentConfig) -> Base:
    """Load the base with the trainable adapter: a copy of the served one, if any.

    Raises:
        CorruptData: the served adapter's weights are not finite.
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // 2 // beside))
    shared_by = place.crew if config.shard_base else ALONE
    base = load_base(
        incumbent.base_path,
        device=config.device,
        dtype=config.precision,
        shared_by=shared_by,
        gpu_memory_share=config.gpu_memory_share,
    )
    start = Path(incumbent.adapter_path) if incumbent.adapter_path else None
    method: Method = (
        "dpo" if config.method == "auto" else config.method
    )  # `shape_policy` corrects what was chosen
    add_policy(base, _lora(config, method), seed=config.seed, start_from=start)
    if start is not None and not all_finite(adapter_parameters(base, "policy")):
        raise CorruptData(
            f"adapter {start}: a weight is not a finite number; roll back to a policy before {incumbent.id}"
        )
    place.base = base
    return base


def _lora(config: AlignmentConfig, method: Method) -> LoraSpec:
    return {"dpo": config.dpo.lora, "kto": config.kto.lora, "ppo": config.ppo.lora}[method]


def shape_policy(place: Place, method: Method, config: AlignmentConfig) -> bool:
    """Give the adapter "policy", untouched so far, the shape that the chosen method asks for; return whether it had another.

    One that continues from a served adapter keeps that one's.
    """
    base, spec = place.base, _lora(config, method)
    assert base is not None
    has = base.model.peft_config["policy"]
    wanted = (spec.rank, spec.alpha, set(lora_targets(base, spec)))
    same = (has.r, has.lora_alpha, set(has.target_modules)) == wanted
    if same or has_adapter(base, "reference"):
        return False
    remove_adapter(base, "policy")
    add_policy(base, spec, seed=config.seed)
    return True


def plan_together(place: Place, row_tokens: int, ppo: PpoConfig | None = None) -> None:
    """Hold the micro-batches to what the process with the least free memory allows: all must cut a batch alike.

    Args:
        row_tokens: of the largest prompt with its answers.
        ppo: of a training by PPO, which samples and whose critic learns too.

    Raises:
        DoesNotFit: it is too large for this process's device.
    """
    base = place.base
    assert base is not None
    plan_batches(
        base,
        longest=row_tokens,
        rank=int(base.model.peft_config["policy"].r),
        learning=2 if ppo else 1,
        sample_tokens=ppo.sample_batch_tokens or CPU_SAMPLE_TOKENS if ppo else 0,
    )
    plans = place.crew.united({place.crew.rank: (base.most_tokens, base.checkpointing)}).values()
    base.most_tokens = min(tokens for tokens, _ in plans)
    base.checkpointing = any(checkpointing for _, checkpointing in plans)


def train_reward(
    place: Place,
    labels: Preferences,
    held_out: Preferences,
    config: RewardConfig,
    seed: int,
    start_from: Path | None,
) -> TrainedReward:
    """Train a reward model; the latest is the one that PPO optimises."""
    assert place.base is not None
    place.scorer = train_reward_model(
        place.base,
        labels,
        held_out,
        config,
        seed=seed,
        progress=place.progress,
        start_from=start_from,
        crew=place.crew,
    )
    return place.scorer


def train_ranked_reward(
    place: Place,
    labels: Preferences,
    held_out: Preferences,
    unlabelled: dict[tuple[int, ...], str],
    config: AlignmentConfig,
    seed: int,
) -> TrainedReward:
    """Train a reward model on the served policy's own answers as a fit to all labels ranks them, measured on people's
    labels; on their labels after all where too few answers differ."""
    assert place.base is not None
    pairs, told = pairs_to_learn(
        place.base,
        labels,
        replace(config.dpo, pairs_from="auto"),
        config.reward,
        unlabelled=unlabelled,
        seed=config.seed,
        progress=place.progress,
        crew=place.crew,
    )
    pairs, told = place.crew.told((pairs, told))  # a near tie may be ranked otherwise elsewhere
    if any(pair.source == "ranked" for pair in pairs):
        labels = Preferences(pairs=tuple(pairs), thumbs=())
        plan_together(place, longest(place.base, labels))
    scorer = train_reward(place, labels, held_out, config.reward, seed, None)
    place.scorer = replace(scorer, learnt_from=f"PPO's reward model: {told}")
    return place.scorer


def load_scorer(place: Place, folder: Path) -> TrainedReward:
    """Take the reward model that an interrupted run trained: another training of it agrees to rounding only."""
    assert place.base is not None
    place.scorer = load_reward_model(place.base, folder)
    return place.scorer


def put_policy(place: Place, weights: Weights) -> None:
    """Give the adapter "policy" the weights that its training, in an interrupted run, ended with."""
    assert place.base is not None
    restore_weights(adapter_parameters(place.base, "policy"), weights)


def train_policy_by(
    place: Place,
    method: Method,
    labels: Preferences,
    prompts: list[tuple[int, ...]],
    unseen: list[tuple[int, ...]],
    unlabelled: dict[tuple[int, ...], str],
    config: AlignmentConfig,
    *,
    cache: ReferenceCache | None = None,
    kept: Kept | None = None,
    sampler: Sampler | None = None,
) -> Trained:
    """Train the adapter "policy" by the method: on pairs, on thumbs, or on its own answers to the prompts.

    Memory is planned again for what DPO and KTO learn from: a question without a label, or a pair of the policy's longest
    answers, may be larger than any label.

    Args:
        unseen: prompts that it does not learn from.
        unlabelled: prompts, with keys, that DPO and KTO may have answered besides the labelled ones.
        cache, kept, sampler: process 0's alone.
    """
    base = place.base
    assert base is not None
    shared: dict[str, Any] = {"seed": config.seed, "progress": place.progress, "crew": place.crew}
    checkpoint = kept.checkpoint if kept else None
    options: dict[str, Any] = {**shared, "unseen": unseen, "checkpoint": checkpoint}
    if method == "ppo":
        assert place.scorer is not None
        trained = train_ppo(base, prompts, place.scorer, config.ppo, sampler=sampler, **options)
        return replace(trained, learnt_from=place.scorer.learnt_from)
    learn: dict[str, Any] = {**shared, "unlabelled": unlabelled}
    if method == "kto":
        taken = partial(thumbs_to_learn, base, labels, config.kto, config.reward, **learn)
        thumbs, told = same_to_learn(kept, Thumb, taken, place.crew)
        plan_together(place, longest_learnt(base, thumbs))
        result = train_kto(base, thumbs, config.kto, cache=cache, **options)
    else:
        made = partial(pairs_to_learn, base, labels, config.dpo, config.reward, **learn)
        pairs, told = same_to_learn(kept, Pair, made, place.crew)
        plan_together(place, longest(base, Preferences(pairs=tuple(pairs), thumbs=())))
        result = train_dpo(base, pairs, config.dpo, cache=cache, **options)
    return replace(result, learnt_from=told)
