"""Every setting of PPO, without torch, so that reading a configuration stays cheap.

Where this PPO differs from TRL 1.12's `PPOTrainer`, and the setting that makes it equal:

| detail | TRL 1.12 | here | equal with |
| --- | --- | --- | --- |
| loss of an optimiser step | mean of micro-batch means | sum over the global token count | one micro-batch in TRL |
| log-ratio | free | clamped to `log_ratio_cap` | any ratio below e^10 |
| gradient clip | none | `gradient_clip`, policy and critic apart | `gradient_clip` = 1e6 |
| Adam's epsilon | 1e-8 | `adam_epsilon` 1e-5 | `adam_epsilon` = 1e-8 |
| beta | constant `kl_coef` | adaptive | `beta` = `kl_coef`, `kl_horizon_answers` = 0 |
| lambda of GAE | 0.95 | 1 | `gae_lambda` = 0.95 |
| score | as it is | divided by its running std, clipped | `whiten_scores` = false |
| answer without an end | score minus `missing_eos_penalty` | score replaced | answers that end |
| where the score is put | one after the last token where there is room | last token | answers of full length |
| value loss counts | one position after the last token too | answer tokens | answers of full length |
| whitening of advantages | per process, Bessel, epsilon 1e-8 | the same over the step's whole batch | one process |
| order in an epoch | numpy's global generator | a permutation by (seed, step, epoch), prompts kept whole | the same order |
| critic | a whole model of its own | LoRA adapter and head on the policy's base | the same values |
| early stop of an epoch | none | `epoch_kl_cap_nats_per_token` | a high cap |
| reference | fixed | fixed, or a moving average | `reference` = "fixed" |

Letters: K answers to a prompt, A advantage, r = pi / pi_old.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignment.training_config import BaseBudget, LearnFrom, LoraSpec

EnsembleRule = Literal["mean_std", "mean_variance", "min"]
ReferenceKind = Literal["fixed", "moving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig(BaseBudget):
    """How the policy is trained on its own answers.

    Defaults without a source are first settings for the starter model, not yet measured on it.
    """

    lora: LoraSpec = field(default_factory=LoraSpec)
    steps: int = 30
    """Batches of answers, at most: the KL budget ends a training sooner."""
    prompts_per_step: int = 48
    answers_per_prompt: int = 2
    """K: a prompt's answers share its tokens in every scoring and training pass."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    """Of the sampling and of every log-prob (1.0: arXiv 1909.08593; TRL 0.7)."""
    rollout_url: str = ""
    """Address of a vLLM server that gives the answers; empty: this process does (see `rollout_server`)."""

    epochs: int = 1
    """Passes over a batch of answers (4 in arXiv 2403.17031). Two passes in halves take as many optimiser steps as one
    in quarters, from the same answers, at twice the cost."""
    minibatches: int = 4
    """Optimiser steps a pass."""
    learning_rate: float = 1e-3
    """Of the policy's adapter; falls linearly to zero (arXiv 2403.17031). 5e-4 clipped no token on the starter after the
    first step and moved it by 0.01 nats a step."""
    critic_learning_rate: float = 1e-3
    """Of the critic's adapter and head, with the same fall."""
    adam_epsilon: float = 1e-5
    """Huang et al. 2022, "The 37 implementation details of PPO", detail 3."""
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    """Global norm, of the policy and of the critic each ("37 details", detail 11, uses 0.5 for Atari)."""
    clip_range: float = 0.2
    """epsilon of max(-A r, -A clip(r, 1 +- epsilon)) (arXiv 1707.06347 eq. 7)."""
    log_ratio_cap: float = 10.0
    """|log r| is clamped here, so that one odd token cannot overflow exp."""
    value_clip_range: float = 0.2
    """"37 details", detail 9; TRL 0.2."""
    value_weight: float = 0.1
    """arXiv 1909.08593; TRL 0.1."""
    gamma: float = 1.0
    """arXiv 1909.08593; TRL the same."""
    gae_lambda: float = 1.0
    """The return itself, without the critic's guesses on the way (best of all in arXiv 2402.14740, section 5; 0.95 in
    arXiv 1909.08593 and TRL). The first words of an answer decide its manner: at 0.95 a fifth of the score reaches them."""
    importance_cap: float = 2.0
    """Most that exp(old - served) weighs a token whose sampler was not the trainer (truncated importance sampling,
    Ionides 2008)."""

    reward_from: LearnFrom = "auto"
    """What its reward model learns from. labels: what people said. ranked: the best and the worst of the served policy's own
    answers to each question by a fit to all labels, sampled as DPO's are (`dpo.ranked_answers`). auto: ranked where many
    labels may be turned (choice.turned_share_high_min, choice.noisy_flip_rate_min): a reward model learns those by heart,
    and PPO goes where they lead."""
    ensemble_rule: EnsembleRule = "mean_std"
    """The members' scores become one: mean - penalty * std, mean - penalty * variance, or the least (arXiv 2310.02743)."""
    ensemble_penalty: float = 0.5
    """lambda (of the order of arXiv 2310.02743's, which takes the variance)."""
    whiten_scores: bool = True
    """Divide by the running std; the mean stays ("37 details", continuous-action detail 8)."""
    score_clip: float = 10.0
    """Most standard deviations a score may lie from the running mean ("37 details", continuous-action detail 9)."""
    missing_eos_stds: float = 1.0
    """An answer that does not end gets the running mean minus this many standard deviations (-1 with scores of mean
    0 and std 1 in arXiv 2403.17031)."""

    beta: float = 0.0
    """At the start, per nat, in standard deviations of the score (TRL 0.05; arXiv 1909.08593 0.15). 0: automatic, where
    the best policy lies `kl_target_nats` away (`ppo_losses.starting_beta`): 0.7 for 1 nat."""
    kl_target_nats: float = 1.0
    """KL of an answer that the controller steers to (arXiv 1909.08593 section 2.2)."""
    kl_horizon_answers: int = 200
    """Answers over which beta follows fully; 0 keeps beta (10,000 in lm-human-preferences, for runs of a million)."""
    kl_error_clip: float = 0.2
    """arXiv 1909.08593 section 2.2."""
    kl_lookahead_steps: float = 10.0
    """Steps ahead that the controller looks along the KL's trend; 0: the controller of arXiv 1909.08593, which
    overshoots at short horizons (arXiv 2007.03964; simulated in the tests)."""
    kl_smoothing: float = 0.5
    """Part of a new KL in the smoothed one that the controller follows; 1: none."""
    kl_budget_nats: float = 0.0
    """Mean KL of an answer from the start at which training ends, without a fault; 0 for no budget."""
    kl_cap_nats: float = 10.0
    """Mean KL of an answer from the start that stops a training as broken (well under the gate's
    25: what the gate would refuse need not be trained)."""

    reference: ReferenceKind = "fixed"
    """"moving": the penalty's reference follows the policy (WARP, arXiv 2406.16768; TR-DPO, arXiv 2404.09656)."""
    reference_share: float = 0.05
    """Part of the policy that enters the moving average; 1.0 copies the policy (arXiv 2406.16768: 0.01)."""
    reference_every: int = 1
    """Steps between two moves."""
    reference_rank: int = 32
    """Rank the moving average is kept at; what does not fit is reported as `ppo/reference_error`."""

    entropy_every: int = 5
    """Steps between two exact measurements of the entropy; the watch uses the sampled estimate of every step."""
    entropy_share_min: float = 0.3
    """Part of the start's entropy below which the policy counts as collapsed."""
    entropy_fall_nats_min: float = 0.1
    """Nats a token that it must have lost as well. A policy that begins sure of nearly every token may become surer still
    within the KL's limits: later rounds of docs/learning.md, which knew the share alone, stopped at 0.01 and 0.02 nats
    from 0.05 and 0.08. A collapse is the loss of variety that there was: several tenths, where answers vary."""
    length_ratio_min: float = 0.33
    length_ratio_max: float = 3.0
    """Mean tokens of an answer per token at the start: beyond, length runs away (arXiv 2310.03716)."""
    epoch_kl_cap_nats_per_token: float = 0.05
    """Approximate KL from the sampling policy at which a batch's remaining minibatches are skipped (Spinning Up's
    early stop uses 0.015; the clip alone lets r drift)."""

    batch_tokens: int = 0
    """Token budget of a micro-batch, 0: by device. Changes speed and memory, never the result."""
    sample_batch_tokens: int = 0
    """Tokens in memory while sampling, 0: by device. Changes speed; answers to rounding at most."""
    checkpoint_every: int = 5
    """Steps between checkpoints."""
    shown_samples: int = 8
    """Answers of the first and of the last batch kept in the result."""


PPO_LIMITS: dict[str, tuple[float, float]] = {
    "ppo.steps": (1, 100_000),
    "ppo.prompts_per_step": (1, 100_000),
    "ppo.answers_per_prompt": (1, 64),
    "ppo.max_new_tokens": (1, 100_000),
    "ppo.temperature": (0.01, 10),
    "ppo.minibatches": (1, 1000),
    "ppo.critic_learning_rate": (1e-8, 1),
    "ppo.adam_epsilon": (1e-12, 1e-2),
    "ppo.clip_range": (1e-3, 1),
    "ppo.log_ratio_cap": (0.1, 50),
    "ppo.value_clip_range": (1e-3, 1e6),
    "ppo.gamma": (0.5, 1),
    "ppo.gae_lambda": (0, 1),
    "ppo.importance_cap": (1, 100),
    "ppo.score_clip": (0.1, 1e6),
    "ppo.beta": (0, 100),
    "ppo.kl_target_nats": (1e-3, 1e3),
    "ppo.kl_cap_nats": (1e-3, 1e4),
    "ppo.kl_error_clip": (0, 1),
    "ppo.kl_lookahead_steps": (0, 1000),
    "ppo.kl_smoothing": (0.01, 1),
    "ppo.reference_share": (0, 1),
    "ppo.reference_every": (1, 100_000),
    "ppo.reference_rank": (1, 4096),
    "ppo.entropy_every": (1, 100_000),
    "ppo.entropy_share_min": (0, 1),
    "ppo.length_ratio_min": (0, 1),
    "ppo.length_ratio_max": (1, 1000),
    "ppo.epoch_kl_cap_nats_per_token": (1e-5, 1e3),
    "ppo.sample_batch_tokens": (0, 100_000_000),
    "ppo.shown_samples": (0, 1000),
}
"""(least, most) of a number, by key."""
