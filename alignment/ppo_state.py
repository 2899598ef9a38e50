"""What a PPO training keeps: its parts, the state a resumed run must know, and the checkpoint.

Letters: C answers, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from alignment.critic import CRITIC, add_critic, critic_parameters
from alignment.distributed import ALONE, Crew
from alignment.ema import MOVING, add_moving_reference
from alignment.kl_budget import where_measured
from alignment.kl_hold import Hold
from alignment.models import Base, adapter_parameters, remove_adapter
from alignment.ppo_config import PpoConfig
from alignment.ppo_losses import Moments, starting_beta
from alignment.ppo_rollouts import Sampler
from alignment.ppo_update import Learner
from alignment.ppo_watch import Start
from alignment.reward_model import TrainedReward
from alignment.training import (
    Weights,
    adamw,
    copy_weights,
    read_checkpoint,
    restore_weights,
    write_checkpoint,
)
from alignment.training_config import deciding
from storage.digests import sha256_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer worth showing."""

    step: int
    """Batches the policy had learnt from."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    score: float
    kl_nats: float
    """k1 of this answer from the penalty's reference."""


@dataclass(slots=True)
class State:
    """Everything besides weights and optimiser that a resumed run must know; random numbers follow from `step`."""

    beta: float
    kl: float = 0.0
    """Smoothed KL of an answer, for the controller."""
    step: int = 0
    """Batches of answers learnt from."""
    scores: Moments = field(default_factory=Moments)
    start: Start | None = None
    curves: dict[str, float] = field(default_factory=dict)
    """The latest of each."""
    first_samples: list[Sample] = field(default_factory=list)
    last_samples: list[Sample] = field(default_factory=list)


@dataclass(slots=True)
class Training:
    """One training under way."""

    learner: Learner
    scorer: TrainedReward
    prompts: Sequence[Sequence[int]]
    sampler: Sampler | None
    hold: Hold
    good: Weights
    """The last weights of the policy whose answers were fine."""
    state: State
    seed: int
    checkpoint: Path | None
    fingerprint: str


def ppo_fingerprint(
    prompts: Sequence[Sequence[int]],
    scorer: TrainedReward,
    config: PpoConfig,
    *,
    seed: int,
    unseen: Sequence[Sequence[int]] = (),
) -> str:
    """Name everything a checkpoint depends on besides base and starting adapter."""
    heads: list[object] = scorer.heads.double().cpu().tolist()
    asked = [[list(prompt) for prompt in some] for some in (prompts, unseen)]
    return sha256_of([deciding(config), seed, asked, heads])


def start_training(
    base: Base,
    prompts: Sequence[Sequence[int]],
    scorer: TrainedReward,
    config: PpoConfig,
    *,
    seed: int,
    unseen: Sequence[Sequence[int]] = (),
    checkpoint: Path | None,
    sampler: Sampler | None,
    crew: Crew = ALONE,
) -> Training:
    """Add critic and moving reference, set up the optimiser, and go on from the checkpoint if there is one.

    Raises:
        CorruptData: the checkpoint belongs to another run.
    """
    remove_adapter(base, CRITIC)
    critic = add_critic(base, scorer)
    if config.reference == "moving":
        add_moving_reference(base, rank=config.reference_rank)
    policy, value = adapter_parameters(base, "policy"), critic_parameters(base, critic)
    measured_on = where_measured(unseen, prompts, count=config.kl_prompts)
    learner = Learner(
        base=base,
        critic=critic,
        policy_parameters=policy,
        critic_parameters=value,
        optimiser=_optimiser(policy, value, config),
        config=config,
        crew=crew,
    )
    training = Training(
        learner=learner,
        scorer=scorer,
        prompts=prompts,
        sampler=sampler,
        hold=Hold(base=base, budget=config, own_nats=0.0, prompts=measured_on, crew=crew),
        good=copy_weights(policy),
        state=State(beta=config.beta or starting_beta(config.kl_target_nats)),
        seed=seed,
        checkpoint=checkpoint,
        fingerprint=ppo_fingerprint(prompts, scorer, config, seed=seed, unseen=unseen),
    )
    if not _resume(training):
        training.hold.begin()
    return training


def _optimiser(
    policy: dict[str, torch.nn.Parameter], value: dict[str, torch.nn.Parameter], config: PpoConfig
) -> torch.optim.Optimizer:
    groups = [
        (list(policy.values()), config.learning_rate),
        (list(value.values()), config.critic_learning_rate),
    ]
    optimiser = adamw(groups, weight_decay=config.weight_decay)
    for group in optimiser.param_groups:
        group["eps"] = config.adam_epsilon
    return optimiser


def all_weights(training: Training) -> dict[str, torch.nn.Parameter]:
    """Return policy, critic and moving reference by name."""
    learner = training.learner
    moving = adapter_parameters(learner.base, MOVING)
    return {**learner.policy_parameters, **learner.critic_parameters, **moving}


def save(training: Training) -> None:
    """Write the checkpoint, if one was asked for."""
    if training.checkpoint is not None:
        content = {
            "fingerprint": training.fingerprint,
            "weights": copy_weights(all_weights(training)),
            "good": training.good,
            "hold": training.hold.saved(),
            "optimiser": training.learner.optimiser.state_dict(),
            "state": asdict(training.state),
        }
        write_checkpoint(training.checkpoint, content)


def _resume(training: Training) -> bool:
    """Go on from the checkpoint; return whether there was one."""
    file = training.checkpoint
    saved = training.learner.crew.told(
        read_checkpoint(file, fingerprint=training.fingerprint) if file else None
    )
    if saved is None:
        return False
    device, state = training.learner.base.device, saved["state"]
    restore_weights(all_weights(training), saved["weights"])
    training.learner.optimiser.load_state_dict(saved["optimiser"])
    training.good = {name: weight.to(device) for name, weight in saved["good"].items()}
    training.hold.restore(saved["hold"])
    training.state = State(
        beta=state["beta"],
        kl=state["kl"],
        step=state["step"],
        scores=Moments(**state["scores"]),
        start=Start(**state["start"]) if state["start"] else None,
        curves=state["curves"],
        first_samples=[Sample(**sample) for sample in state["first_samples"]],
        last_samples=[Sample(**sample) for sample in state["last_samples"]],
    )
    return True
