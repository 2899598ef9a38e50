"""Every setting of the learning modules, without torch, so that reading a configuration stays cheap.

`alignment.reward_model` and `alignment.dpo` re-export theirs. Letters: h the log-ratio margin in nats,
|y| the answer's length in tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

DpoLoss = Literal["dpo", "cdpo", "robust", "ipo"]
LearnFrom = Literal["auto", "labels", "ranked"]
RankedBy = Literal["auto", "fit", "reward_model"]
KtoLoss = Literal["kto", "apo_zero_unpaired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Shape of a LoRA adapter that vLLM can serve."""

    rank: int = 16
    """One of vLLM's ranks (8, 16, 32, 64, ...). 16 on every linear layer: "LoRA Without Regret" (Schulman 2025)."""
    alpha: int = 32
    """Scale is alpha / rank. Twice the rank: the common setting (QLoRA, arXiv 2305.14314, and public recipes)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers, such as q_proj; empty: all of the decoder's (arXiv 2305.14314, section 4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How the reward model is trained. Defaults without a source were measured on the starter model."""

    lora: LoraSpec = LoraSpec(rank=8, alpha=16)
    start_from: Literal["nothing", "last_run"] = "nothing"
    """Where the judge begins. "last_run": adapters and heads of the last run's judge on the same base, of the same shape;
    prompts that it learnt from then are taken from the policy's and the held-out part. Keep the seed: with another one
    the parts are drawn anew, and most prompts would be taken. PPO's own reward model always begins from nothing."""
    members: int = 4
    """Heads per adapter, each with its own seed and bootstrap (arXiv 2310.02743: 4 to 5)."""
    adapters: int = 1
    """Separate adapters, each with `members` heads: less correlated errors at proportional cost."""
    head_penalty: float = 0.3
    """Weight of the squared distance from the random start in the fit of the heads, in units of the
    features' standard deviations and of the mean loss. A fit of one head alone, which weighs raters and ranks answers, is
    pulled to zero as strongly as the labels choose (`ranked_pull`)."""
    epochs: int = 2
    """Of the adapter's training after the fit; 0 leaves the heads on the base's own states."""
    batch_pairs: int = 32
    """Pairs (or thumbs) an optimiser step."""
    learning_rate: float = 5e-4
    """Of the adapter."""
    head_learning_rate: float = 3e-4
    """Of the heads, the thumbs' slope and the raters' biases."""
    warmup_share: float = 0.1
    """Part of the steps with a rising rate; cosine to zero after it."""
    weight_decay: float = 0.01
    centring: float = 0.01
    """Weight of (s_w + s_l)^2 (arXiv 2312.09244)."""
    thumb_weight: float = 0.5
    """Weight of a thumb's term against a pair's: a thumb says less, and its rater's mood more."""
    rater_bias_penalty: float = 0.05
    """Weight of b^2 and (a - 1)^2, so that a rater with few thumbs stays near no bias and the slope is finite."""
    length_debias: bool = False
    """Take the part of a score that follows the answer's length out of it (measured within training prompts;
    arXiv 2310.03716). Off: it also takes away a taste for short answers that people really have."""
    rater_folds: int = 5
    """Groups of raters left out in turn to measure accuracy on people who gave no label; below 2: not measured."""
    gradient_clip: float = 1.0
    batch_tokens: int = 0
    """Token budget of a micro-batch, 0: by device. Changes speed and memory, never the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseBudget:
    """How far all runs together may take a policy from the base model. DPO, KTO and PPO hold the same budget."""

    kl_base_budget_nats: float = 2.0
    """Mean KL of an answer from the base model that no run may pass, whatever the number of rounds; 0 for no budget."""
    kl_base_share: float = 0.3
    """Part of what is left of that budget that one run may spend, after the first run: of 2 nats, 1 of them spent, the next
    runs get 0.3, 0.21, ... Right answers are lost with it, 5 to 6 points a nat under one taste: 0.3 is for 2 points
    at most. 0.5 lets later runs learn more (docs/learning.md)."""
    kl_prompts: int = 96
    """Prompts answered for one measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedAnswersConfig(BaseBudget):
    """What DPO and KTO, which learn from given answers, have in common. "Preferred" answers are the chosen ones of pairs
    and those with a thumb up. Defaults without a source were measured on the starter model."""

    lora: LoraSpec = LoraSpec()
    beta: float = 0.1
    """Per nat (arXiv 2305.18290; arXiv 2402.01306, section 4.1)."""
    learning_rate: float = 2e-4
    """About 10x the rate of full fine-tuning ("LoRA Without Regret", Schulman 2025). 5e-4 spent 1 nat in little more than
    one pass over 320 pairs; twice as many smaller steps won more with fewer nats ("hurried", docs/learning.md)."""
    epochs: int = 8
    """At most: a KL budget ends a training sooner (arXiv 2406.02900: direct methods degrade with long training)."""
    kl_budget_nats: float = 0.6
    """Mean KL of an answer from the reference at which training ends; 0 for no budget. The best of three answers,
    0.43 nats away, wins 77 to 86% under made-up tastes: more cannot be learnt at 0.4. About 3 right answers in a hundred
    are lost a nat, where no training data are near (docs/learning.md): 0.6 is for 2 at most."""
    kl_every: int = 4
    """Optimiser steps between two measurements of the KL."""
    warmup_share: float = 0.1
    """Part of the steps with a rising rate; cosine to zero after it."""
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    """Global norm (arXiv 2305.18290 uses 10 with RMSprop; 1.0 is the usual one with AdamW)."""
    ranked_answers: int = 4
    """Own answers to each question, where those are ranked to learn from (iterative DPO of arXiv 2405.07863: best and worst
    of 8)."""
    ranked_temperature: float = 0.7
    """They are sampled at, the chat page's default."""
    ranked_prompts: int = 1000
    """Most questions that are answered for it: those with a label of any kind, then recent ones without."""
    ranked_flip_rate: float = 0.0
    """Share of the labelled pairs that the fit which ranks them takes to be turned round, at most 0.45. 0: as a fit to the
    other labels tells, from `choice.min_pairs` pairs on, as it cannot tell of few. It is asked of pairs only: of thumbs it
    ranks better under one taste and worse under two (docs/robustness.md)."""
    ranked_pull: float = 0.0
    """Weight of the squared size of that fit's head, in units of the features' standard deviations and of the mean loss.
    0: the one of 0.3, 1 and 3 by which fits tell most about labels that they did not see (docs/robustness.md)."""
    nll_weight: float = 1.0
    """Weight of -log pi(preferred) / |y| (arXiv 2404.19733: 1); the displacement watch may raise it. Without it the starter
    gave a right answer 13 points less often at temperature 0.7, with it 5 (DPO, made-up taste "hurried")."""
    displacement_cap_nats_per_token: float = 0.1
    """Mean fall of log pi(preferred) a token that counts as displacement (arXiv 2410.08847)."""
    displacement_share_cap: float = 0.6
    """Share of preferred answers whose log pi falls that counts as displacement (arXiv 2410.08847)."""
    falling_floor_nats_per_token: float = 0.01
    """A smaller fall of one answer is noise and does not count into the share."""
    displacement_window: int = 4
    """Optimiser steps over which both are averaged."""
    displacement_nll_weight: float = 0.5
    """What the watch raises `nll_weight` to at first; it doubles it after that."""
    displacement_raises: int = 3
    """How often it may raise before it stops the run."""
    batch_tokens: int = 0
    """Token budget of a micro-batch, 0: by device. Changes speed and memory, never the result."""
    checkpoint_every: int = 5
    """Optimiser steps between checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(FixedAnswersConfig):
    """How the policy is trained on pairs."""

    loss: DpoLoss = "dpo"
    """dpo (arXiv 2305.18290 eq. 7), cdpo (its section on noisy labels, Mitchell 2023), robust (arXiv
    2403.00409), ipo (arXiv 2310.12036, length-normalised)."""
    flip_rate: float = 0.0
    """Share of wrong labels that cdpo and robust assume; at most 0.45. 0: as measured, the larger one of what people's
    agreement tells (as a = (1 - e)^2 + e^2) and of a fit to the other labels; with neither, both are plain DPO."""
    pairs_from: LearnFrom = "auto"
    """labels: the pairs that people made. ranked: the best and the worst of the served policy's own answers, by a fit to all
    labels (`alignment.ranked_answers`). auto: ranked where that fit is good (choice.fit_accuracy_low_min) or many labels may
    be turned (choice.turned_share_high_min, choice.noisy_flip_rate_min), and enough answers differ."""
    batch_pairs: int = 16
    """Pairs an optimiser step."""
    reference_every: int = 0
    """Optimiser steps after which the loss measures from the policy reached by then instead of from the one that training
    began with (hard updates of TR-DPO, arXiv 2404.09656); each costs a forward pass over all pairs. KL budgets and the
    watch over displacement go on measuring from the beginning. 0: never."""
    margin_weight: float = 0.5
    """Factor of a comparison's strength margin inside the sigmoid (ODPO, arXiv 2402.10571)."""
    length_weight: float = 0.0
    """alpha of alpha * (|y_w| - |y_l|) subtracted inside the sigmoid, per token (arXiv 2403.19159)."""
    correction_dpop_weight: float = 5.0
    """lambda of the DPOP penalty, on corrections only (arXiv 2402.13228): plain DPO lowers both of two
    answers that differ little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KtoConfig(FixedAnswersConfig):
    """How the policy is trained on single thumbs."""

    loss: KtoLoss = "kto"
    """kto (arXiv 2402.01306 eq. 7) or apo_zero_unpaired (arXiv 2408.06266 eq. 7, unpaired as in TRL): the same with
    z0 = 0, which saves the mismatched rows."""
    desirable_weight: float = 0.0
    """lambda_D, the factor on thumbs up. 0: automatic, so that lambda_D n_D / (lambda_U n_U), with n the thumbs' weights
    together, is kept in [1, 4/3] (arXiv 2402.01306 eq. 8) by raising the class that has too little."""
    undesirable_weight: float = 0.0
    """lambda_U, the factor on thumbs down. 0: automatic. Two given weights are used as they are."""
    min_class_thumbs: int = 20
    """Thumbs of each class below which nothing is trained: automatic weights would make a few people's labels as loud
    as everybody's. A floor only: the choice of a method asks for 10% of 1,000."""
    thumbs_from: LearnFrom = "auto"
    """labels: the thumbs that people gave. ranked: one up for the best and one down for the worst of the served policy's own
    answers to a question (`alignment.ranked_answers`). auto: ranked where enough answers differ."""
    ranked_by: RankedBy = "auto"
    """fit: one linear head on what the base makes of an answer. reward_model: one that is trained for it, adapter and all.
    auto: the fit where it is good (choice.fit_accuracy_low_min)."""
    batch_thumbs: int = 32
    """Thumbs an optimiser step (arXiv 2402.01306: 32), at least 2: z0 needs answers to other prompts."""


def deciding(config: Any) -> dict[str, Any]:
    """Return the settings of a method that decide what its training makes.

    Those of speed and memory are none: after them a run that was interrupted goes on.
    """
    return {name: value for name, value in asdict(config).items() if not name.endswith("batch_tokens")}
