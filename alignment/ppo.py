"""Proximal policy optimisation with a KL penalty: trains the adapter "policy" on its own answers, scored by the judge.

Policy, reference, reward model and critic are adapters of one resident base (arXiv 1909.08593 with 2403.17031's details;
differences from TRL are listed in `ppo_config`).

Names of the curves:

| name | meaning |
| --- | --- |
| `objective/score` | mean score of the ensemble, its penalty taken, in log-odds |
| `objective/reward` | mean whitened score minus beta times the KL of the answer |
| `objective/kl_per_response_nats` | k1: sum of log pi - log ref over an answer; penalty and controller look at it |
| `objective/kl_k3_nats` | k3 of the same, which single tokens far below the reference can blow up |
| `objective/kl_from_start_nats` | k3 to the policy the training began with; cap and budget look at it |
| `objective/kl_from_base_nats` | k1 to the base model, in later rounds with a budget from it; else to the start |
| `objective/entropy_nats_per_token` | mean -log pi of the sampled tokens |
| `objective/importance_weight` | mean truncated weight; 1 with answers of this process |
| `policy/loss`, `policy/clip_fraction`, `policy/approx_kl`, `policy/ratio` | means over tokens and minibatches |
| `policy/entropy` | exact, nats a token, every `entropy_every` steps |
| `policy/updates`, `policy/stopped_early` | optimiser steps taken; 1 when the epoch's KL cap ended them |
| `policy/gradient_norm`, `value/gradient_norm` | of the last minibatch, before clipping |
| `value/loss`, `value/clip_fraction`, `value/explained_variance` | of the critic |
| `ppo/beta`, `ppo/learning_rate`, `ppo/score_std`, `ppo/reference_error` | the controller, the schedule, the units |
| `ppo/kl_per_response_nats`, `ppo/kl_from_base_nats` | of the final policy, measured and held as DPO's and KTO's are |
| `response/length`, `response/eos_rate` | tokens of an answer; share that ended by itself |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.critic import CRITIC
from alignment.distributed import ALONE, Crew
from alignment.ema import MOVING, move_reference
from alignment.models import Base, has_adapter, remove_adapter
from alignment.ppo_config import PpoConfig
from alignment.ppo_experience import (
    Curves,
    References,
    before_learning,
    ensemble_score,
    experience_of,
    objective,
    reference_logprobs,
    rewards_of,
    rollouts,
)
from alignment.ppo_losses import kl_ahead, kl_k1, next_beta
from alignment.ppo_rollouts import Answers, Sampler, step_prompts
from alignment.ppo_state import Sample, Training, all_weights, save, start_training
from alignment.ppo_update import Experience, minibatch_epochs
from alignment.ppo_watch import Start, why_stop
from alignment.progress import Interrupted, Progress
from alignment.reward_model import TrainedReward
from alignment.training import all_finite, copy_weights, restore_weights, set_rate
from storage.errors import InvalidField

__all__ = ["PpoConfig", "PpoResult", "Sample", "train_ppo"]

ABOVE_ZERO = (
    "steps",
    "prompts_per_step",
    "answers_per_prompt",
    "temperature",
    "epochs",
    "minibatches",
    "learning_rate",
    "clip_range",
    "value_clip_range",
    "kl_target_nats",
    "reference_every",
    "entropy_every",
    "checkpoint_every",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoResult:
    """How the training ended. The adapter "policy" holds the last good weights in any case."""

    metrics: dict[str, float]
    """The latest of each curve; those of answers are the final policy's, unless it was stopped or brought back."""
    steps: int
    """Batches of answers learnt from."""
    stopped_because: str | None
    """None when it ran to its end or spent its KL budget."""
    samples: tuple[Sample, ...]
    """Of the first and of the last batch of answers."""
    moved: bool
    """Whether the policy is another than it began with."""
    held: str
    """For people: what the KL budget from the base did to the training; "" where it did not matter."""
    learnt_from: str = ""
    """For people: which labels its reward model learnt from, where those are not theirs."""


def train_ppo(
    base: Base,
    prompts: Sequence[Sequence[int]],
    scorer: TrainedReward,
    config: PpoConfig,
    *,
    seed: int,
    progress: Progress,
    unseen: Sequence[Sequence[int]] = (),
    checkpoint: Path | None = None,
    sampler: Sampler | None = None,
    crew: Crew = ALONE,
) -> PpoResult:
    """Train the adapter "policy" (`models.add_policy`) to be scored higher on the prompts, near the reference.

    It stops itself, with a reason and the last good weights, on what `ppo_watch` names. With `checkpoint`, a file, an
    interrupted run resumes to the same weights.

    Args:
        prompts: token ids of prompts, as served.
        scorer: a reward model on the same base.
        unseen: prompts that the policy does not learn from: the final KL is measured there.
        sampler: answers prompts elsewhere (`rollout_server`); None: in this process.
        crew: the processes that train together; checkpoint and sampler belong to process 0.

    Raises:
        InvalidField: no prompts, no adapter "policy", a scorer of another base, or a setting out of range.
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    _check(base, prompts, scorer, config)
    try:
        training = start_training(
            base,
            prompts,
            scorer,
            config,
            seed=seed,
            unseen=unseen,
            checkpoint=checkpoint,
            sampler=sampler,
            crew=crew,
        )
        stopped_because = _trained(training, progress)
    finally:
        remove_adapter(base, CRITIC)
        remove_adapter(base, MOVING)
    return _result(training, stopped_because)


def _result(training: Training, stopped_because: str | None) -> PpoResult:
    state = training.state
    return PpoResult(
        metrics=state.curves,
        steps=state.step,
        stopped_because=stopped_because,
        samples=(*state.first_samples, *state.last_samples),
        moved=training.hold.moved(),
        held=training.hold.told("ppo"),
    )


def _trained(training: Training, progress: Progress) -> str | None:
    """Train to the end, leaving the last good weights or a checkpoint; return why it stopped early."""
    steps = training.learner.config.steps
    progress.stage("ppo", steps + 1)  # the last batch is only looked at: it shows the final policy
    try:
        stopped_because = _train(training, progress)
    except Interrupted:
        save(training)  # nothing of a step has changed before its last question to `progress`
        raise
    if stopped_because is not None:  # what was still good may be beyond the budget all the same
        restore_weights(training.learner.policy_parameters, training.good)
        training.state.curves |= _held(training, training.state.curves)
    return stopped_because


def _check(base: Base, prompts: Sequence[Sequence[int]], scorer: TrainedReward, config: PpoConfig) -> None:
    if not prompts:
        raise InvalidField("prompts", 0, "give at least one prompt")
    if not has_adapter(base, "policy"):
        raise InvalidField("adapter", "policy", "call add_policy first")
    if scorer.base is not base:
        raise InvalidField("scorer", scorer.base.path, "train or load the reward model on the same base")
    for name in ABOVE_ZERO:
        value = getattr(config, name)
        if not value > 0:
            raise InvalidField(f"ppo.{name}", value, "use a number above 0")
    if not 0 <= config.reference_share <= 1:
        raise InvalidField("ppo.reference_share", config.reference_share, "use 0 to 1")


def _train(training: Training, progress: Progress) -> str | None:
    """Take the steps that are left; return why it stopped early."""
    state, config, seed = training.state, training.learner.config, training.seed
    while True:
        _boundary(training, progress)
        # 1. prompts
        prompts = step_prompts(training.prompts, config, seed=seed, step=state.step)
        # 2. rollouts
        answers = rollouts(training, prompts, progress)
        # 3. reference log-probs
        references = reference_logprobs(training, answers, progress)
        # 4. scores: they end the training when the policy is broken, or has gone as far as it may
        scores = ensemble_score(training, answers, progress)
        curves = objective(answers, references, scores)
        reason = _judged(training, answers, references, scores, curves)
        if reason is not None or _is_over(training, curves):
            curves |= {} if reason else _held(training, curves)
            state.curves |= curves
            progress.step(config.steps + 1, _told(curves), **curves)
            return reason
        # 5. per-token rewards: the shaped score at the end, the KL penalty on the way
        rewards, curves["ppo/score_std"] = rewards_of(training, answers, references, scores)
        # 6. advantages
        experience = experience_of(training, answers, rewards)
        curves |= before_learning(experience, rewards)
        # 7. minibatch epochs
        learnt, reason = _learn(training, experience)
        if reason is not None:
            return f"{reason} at step {state.step + 1}"
        # 8. KL controller, and a moving reference follows
        curves |= learnt | {"ppo/beta": state.beta}
        state.beta = _next_beta(training, answers, curves)
        state.step += 1
        curves |= _move_reference(training)
        # 9. the log
        state.curves |= curves
        progress.step(state.step, _told(curves), **curves)


def _boundary(training: Training, progress: Progress) -> None:
    """Between two steps: stop if asked, save now and then."""
    training.learner.crew.begin(progress, "training")
    step = training.state.step
    if step and step % training.learner.config.checkpoint_every == 0:
        save(training)


def _judged(
    training: Training, answers: Answers, references: References, scores: torch.Tensor, curves: Curves
) -> str | None:
    """Keep samples, and the weights if their answers are fine; return why the training must stop."""
    state, config = training.state, training.learner.config
    if state.start is None:
        state.start = Start(curves["objective/entropy_nats_per_token"], curves["response/length"])
    reason = why_stop(curves, state.start, config)
    if reason is None:
        training.good = copy_weights(training.learner.policy_parameters)
    kls = torch.where(answers.mask, kl_k1(answers.old, references.penalty), 0.0).sum(dim=1)
    shown = range(min(config.shown_samples, len(answers.rows)))
    samples = [
        Sample(
            step=state.step,
            prompt_ids=tuple(answers.rows[i][0]),
            answer_ids=tuple(answers.rows[i][1]),
            score=float(scores[i]),
            kl_nats=float(kls[i]),
        )
        for i in shown
    ]
    if state.step == 0:
        state.first_samples = samples
    else:
        state.last_samples = samples
    return reason


def _is_over(training: Training, curves: Curves) -> bool:
    state, config = training.state, training.learner.config
    spent = curves["objective/kl_from_start_nats"] >= config.kl_budget_nats > 0
    return spent or state.step == config.steps


def _held(training: Training, curves: Curves) -> Curves:
    """Bring the final policy back if it is beyond the budget from the base; return its KL where it was measured.

    It goes back on the line to the policy it began with (arXiv 2406.16768 goes that way to trade score for KL). In the
    first round the answers' own KL says whether there is anything to measure.
    """
    hold, budget = training.hold, training.learner.config.kl_base_budget_nats
    first = hold.began_from_base is None
    if budget == 0 or (first and curves.get("objective/kl_from_start_nats", 0.0) <= budget):
        return {}
    kl, _ = hold.hold(training.state.step)
    return {"ppo/kl_per_response_nats": kl.from_reference, "ppo/kl_from_base_nats": kl.from_base}


def _learn(training: Training, experience: Experience) -> tuple[Curves, str | None]:
    """Take the optimiser steps of this batch at this step's learning rate."""
    learner, step = training.learner, training.state.step
    factor = 1 - step / learner.config.steps
    set_rate(learner.optimiser, factor)
    curves, reason = minibatch_epochs(
        learner,
        experience,
        seed=training.seed * 100_003 + step,
        with_entropy=step % learner.config.entropy_every == 0,
    )
    if reason is None and not all_finite(all_weights(training)):
        reason = "a weight is not finite"
    return curves | {"ppo/learning_rate": learner.config.learning_rate * factor}, reason


def _next_beta(training: Training, answers: Answers, curves: Curves) -> float:
    config, state = training.learner.config, training.state
    state.kl, ahead = kl_ahead(
        state.kl,
        _steered_by(training, curves),
        smoothing=config.kl_smoothing,
        lookahead_steps=config.kl_lookahead_steps,
    )
    return next_beta(
        state.beta,
        kl=ahead,
        target=config.kl_target_nats,
        answers=len(answers.rows),
        horizon=config.kl_horizon_answers,
        error_clip=config.kl_error_clip,
    )


def _steered_by(training: Training, curves: Curves) -> float:
    """Return the KL that the controller looks at: in a later round the distance from the base counts like that from the
    reference, its limit like the target."""
    kl, hold = curves["objective/kl_per_response_nats"], training.hold
    if hold.began_from_base is None:
        return kl
    share = curves["objective/kl_from_base_nats"] / hold.limits().from_base
    return max(kl, share * training.learner.config.kl_target_nats)


def _move_reference(training: Training) -> Curves:
    base, config = training.learner.base, training.learner.config
    if not has_adapter(base, MOVING) or training.state.step % config.reference_every:
        return {}
    return {"ppo/reference_error": move_reference(base, share=config.reference_share)}


def _told(curves: Curves) -> str:
    score, kl = curves["objective/score"], curves["objective/kl_per_response_nats"]
    return f"score {score:.2f}, {kl:.2f} nats from the reference"
