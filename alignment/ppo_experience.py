"""Steps 2 to 6 of PPO: answers, their log-probs under the references, scores, rewards and advantages.

Letters: C answers, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignment.critic import CRITIC
from alignment.ema import MOVING
from alignment.models import has_adapter
from alignment.ppo_forward import logprobs_of, of_each_token
from alignment.ppo_losses import (
    advantages_and_returns,
    ensemble_scores,
    explained_variance,
    kl_k1,
    kl_k3,
    line_of,
    shaped_scores,
    token_rewards,
    whitened,
    with_scores,
)
from alignment.ppo_rollouts import Answers, take_answers
from alignment.ppo_state import Training
from alignment.ppo_update import Experience
from alignment.progress import Progress

Curves = dict[str, float]


@dataclass(frozen=True, slots=True)
class References:
    """(C, T) log-probs of the answers' tokens in nats."""

    penalty: torch.Tensor
    """Under the reference of the KL penalty."""
    start: torch.Tensor
    """Under what the training began with: the same, unless the reference moves."""
    base: torch.Tensor
    """Under the base model: the same, where the training began with it or has no budget from it."""


def rollouts(training: Training, prompts: Sequence[Sequence[int]], progress: Progress) -> Answers:
    """Answer the step's prompts.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    learner = training.learner
    return take_answers(
        learner.base,
        prompts,
        learner.config,
        sampler=training.sampler,
        seed=training.seed,
        step=training.state.step,
        progress=progress,
        crew=learner.crew,
    )


def reference_logprobs(training: Training, answers: Answers, progress: Progress) -> References:
    """Score the answers under the references: one pass, one more for each that is another policy."""
    base, config = training.learner.base, training.learner.config

    def scored(adapter: str | None) -> torch.Tensor:
        """Return the log-probs of all answer tokens under an adapter."""
        numbers_of = logprobs_of(base, temperature=config.temperature)
        return of_each_token(
            base,
            answers.rows,
            numbers_of,
            adapter=adapter,
            batch_tokens=config.batch_tokens,
            progress=progress,
            crew=training.learner.crew,
        )

    start = scored("reference")
    return References(
        penalty=scored(MOVING) if has_adapter(base, MOVING) else start,
        start=start,
        base=scored(None) if training.hold.began_from_base is not None else start,
    )


def ensemble_score(training: Training, answers: Answers, progress: Progress) -> torch.Tensor:
    """Return (C,) scores of the ensemble, its penalty taken, in log-odds."""
    config = training.learner.config
    found = training.scorer.score(answers.rows, progress=progress, crew=training.learner.crew)
    members = torch.from_numpy(found.members)
    scores = ensemble_scores(members, rule=config.ensemble_rule, penalty=config.ensemble_penalty)
    return scores.float().to(training.learner.base.device)


def objective(answers: Answers, references: References, scores: torch.Tensor) -> Curves:
    """Return what the answers say about the policy, read from the device at once."""
    mask, old = answers.mask, answers.old
    tokens, count = mask.sum(), len(answers.rows)
    numbers = {
        "objective/score": scores.mean(),
        "objective/kl_per_response_nats": kl_k1(old, references.penalty)[mask].sum() / count,
        "objective/kl_k3_nats": kl_k3(old, references.penalty)[mask].sum() / count,
        "objective/kl_from_start_nats": kl_k3(old, references.start)[mask].sum() / count,
        "objective/kl_from_base_nats": kl_k1(old, references.base)[mask].sum() / count,
        "objective/entropy_nats_per_token": -old[mask].sum() / tokens,
        "objective/importance_weight": answers.weights.sum() / tokens,
        "response/length": tokens / count,
        "response/eos_rate": answers.finished.float().mean(),
    }
    values = torch.stack([number.float() for number in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def rewards_of(
    training: Training, answers: Answers, references: References, scores: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return (C, T) rewards and the std that is their unit; the critic's values follow a change of the unit."""
    state, config = training.state, training.learner.config
    mean, std = 0.0, 1.0
    if config.whiten_scores:
        before = state.scores.std()
        state.scores = with_scores(state.scores, scores[answers.finished])
        mean, std = state.scores.mean, state.scores.std()
        training.learner.critic.rescale(before / std)
    shaped = shaped_scores(
        scores,
        answers.finished,
        mean=mean,
        std=std,
        clip=config.score_clip,
        missing_eos_stds=config.missing_eos_stds,
    )
    kl = kl_k1(answers.old, references.penalty)
    return token_rewards(shaped, kl, answers.mask, beta=state.beta), std


def experience_of(training: Training, answers: Answers, rewards: torch.Tensor) -> Experience:
    """Value the answers' positions and turn rewards into whitened advantages."""
    learner = training.learner
    config, critic = learner.config, learner.critic
    values = of_each_token(
        learner.base,
        answers.rows,
        lambda hidden, targets: critic.values(hidden),
        adapter=CRITIC,
        batch_tokens=config.batch_tokens,
        crew=learner.crew,
    )
    if training.state.step == 0:
        values = _calibrated(training, answers, rewards, values)
    advantages, returns = advantages_and_returns(
        rewards, values, answers.mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    return Experience(
        rows=answers.rows,
        mask=answers.mask,
        old=answers.old,
        weights=answers.weights,
        values=values,
        advantages=whitened(advantages, answers.mask),
        returns=returns,
    )


def _calibrated(
    training: Training, answers: Answers, rewards: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Put the critic on the line that fits the first returns best: a reward model only knows whole answers.

    Read at every position it explained less than nothing of the starter's returns (explained variance -2 to -3).
    """
    config, critic = training.learner.config, training.learner.critic
    _, returns = advantages_and_returns(rewards, values, answers.mask, gamma=config.gamma, gae_lambda=1.0)
    slope, intercept = line_of(values, returns, answers.mask)
    critic.rescale(slope, intercept)
    return slope * values + intercept


def before_learning(experience: Experience, rewards: torch.Tensor) -> Curves:
    """Return the mean reward and how much of the returns the critic foresaw."""
    explained = explained_variance(experience.values, experience.returns, experience.mask)
    return {
        "objective/reward": float(rewards.sum(dim=1).mean()),
        "value/explained_variance": float(explained),
    }
