"""The evidence about a candidate: it and the incumbent answer the same questions, and everything gets an interval.

Reads as the evaluation itself: answer -> judge -> drift -> preferences -> golden and safety -> samples. What the numbers
mean for the candidate is the gate's business. Blind human comparisons and paraphrases are not measured here.
Letters: P prompts, K answers of a side to each, R resamples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

import numpy as np

from alignment.answers import CANDIDATE, INCUMBENT, Answers, answer, kl_per_prompt
from alignment.config import EvaluationConfig
from alignment.fixed_questions import FixedQuestions, ask_fixed
from alignment.intervals import (
    Estimate,
    Floats,
    bootstrap_weights,
    mean_with_error,
    paired_bootstrap,
    ratio_bootstrap,
    wilson,
)
from alignment.length_control import controlled_win_rates, people_length_effect
from alignment.logprobs import completion_logprobs
from alignment.models import Base, has_adapter
from alignment.preferences import Pair, Preferences
from alignment.progress import Progress
from alignment.questions import Question, ServedSampling
from alignment.reward_metrics import pair_accuracy, thumb_metrics
from alignment.reward_model import TrainedReward
from alignment.safety import Suite, promises_too_much
from storage.errors import InvalidField
from storage.records import Json

FEWEST_PAIRS = 20
"""Independent held-out pairs below which thumbs speak for the judge and for what was learnt, if they say more: 15 of 20 are
the fewest that are clearly no coin's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Everything an evaluation needs; the candidate is the adapter "policy", the incumbent "reference"."""

    base: Base
    judge: TrainedReward
    """Trained on labels that the candidate did not learn from."""
    questions: Sequence[Question]
    sampling: ServedSampling
    held_out: Preferences
    people: Sequence[Pair]
    """All human pairs: how much length decides for people."""
    fixed: FixedQuestions
    config: EvaluationConfig
    seed: int


@dataclass(slots=True)
class Evidence:
    """What was measured."""

    numbers: dict[str, Estimate] = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)
    """`{"question", "incumbent", "candidate", "source", "win_probability", "difference"}`"""
    details: Json = field(default_factory=dict)
    """Answers to golden and safety questions on which the two differ or fail."""


def evaluate(trial: Trial, progress: Progress) -> Evidence:
    """Compare the candidate with the incumbent.

    Raises:
        InvalidField: there is nothing to ask.
        Interrupted: `progress` asked to stop.
    """
    if not trial.questions:
        raise InvalidField(
            "evaluation.prompts", 0, "no question fits the model's context; raise data.held_out_share"
        )
    found = Evidence()
    # 1. both sides answer
    ours, theirs = _answers(trial, progress)
    weights = bootstrap_weights(
        len(trial.questions), resamples=trial.config.bootstrap_resamples, seed=trial.seed
    )
    # 2. golden answers and red-team prompts
    numbers, found.details = ask_fixed(
        trial.base, trial.fixed, trial.config, seed=trial.seed, progress=progress
    )
    found.numbers |= numbers
    # 3. the judge compares
    progress.stage("scores", 4)
    wins = trial.judge.win_probabilities(ours.rows(), theirs.rows()).reshape(
        len(trial.questions), -1
    )  # (P, K)
    progress.step(1, f"win rate {wins.mean():.0%}", **{"evaluation/win_rate": float(wins.mean())})
    found.numbers |= judge_numbers(trial.judge.metrics) | _win_numbers(trial, ours, theirs, wins, weights)
    # 4. how far it moved
    found.numbers |= _drift_numbers(trial, ours, progress)
    progress.step(2, "drift measured")
    # 5. held-out preferences
    found.numbers["preference_accuracy"] = preference_accuracy(trial, progress)
    progress.step(3, "held-out pairs ranked")
    # 6. form of the answers
    found.numbers |= form_numbers(ours, theirs, weights, trial.config, trial.fixed.suite)
    found.samples = samples_of(trial, ours, theirs, wins)
    progress.step(4)
    return found


def _answers(trial: Trial, progress: Progress) -> tuple[Answers, Answers]:
    progress.stage("answers", 2)
    sides = []
    for number, adapter in enumerate((CANDIDATE, INCUMBENT), start=1):
        given = answer(
            trial.base,
            [question.prompt_ids for question in trial.questions],
            adapter=adapter,
            sampling=_bounded(trial.sampling, trial.config),
            samples=trial.config.samples_per_prompt,
            batch_tokens=trial.config.batch_tokens,
            seed=trial.seed,
            progress=progress,
        )
        progress.step(number, f"{number} of 2 sides answered {len(trial.questions)} questions")
        sides.append(given)
    return sides[0], sides[1]


def _bounded(sampling: ServedSampling, config: EvaluationConfig) -> ServedSampling:
    return replace(sampling, max_tokens=min(sampling.max_tokens, config.max_new_tokens))


def judge_numbers(metrics: dict[str, float]) -> dict[str, Estimate]:
    """Return what is known of the judge itself, from its held-out pairs, or from thumbs where the pairs are too few."""
    accuracy = Estimate(
        value=metrics["reward/accuracy"],
        low=metrics["reward/accuracy_low"],
        high=metrics["reward/accuracy_high"],
        n=int(metrics["reward/independent_pairs"]),
    )
    if accuracy.n < FEWEST_PAIRS and metrics.get("reward/thumb_couples", 0) > accuracy.n:
        accuracy = _of_thumbs(metrics)
    n = int(metrics["reward/pairs"])
    if n == 0:
        return {"judge_accuracy": accuracy}
    plain = {
        f"judge_{name}": Estimate(value=value, low=value, high=value, n=n)
        for name in ("calibration_error", "length_only_accuracy", "score_length_correlation")
        if (value := metrics.get(f"reward/{name}")) is not None
    }
    return {"judge_accuracy": accuracy, **plain}


def _win_numbers(
    trial: Trial, ours: Answers, theirs: Answers, wins: Floats, weights: Floats
) -> dict[str, Estimate]:
    human = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in trial.people if not pair.tie]
    effect = people_length_effect(np.array(human, dtype=np.float64))
    fair, equal = controlled_win_rates(wins, ours.lengths() - theirs.lengths(), weights, effect)
    return {
        "win_rate_length_controlled": fair,
        "win_rate": paired_bootstrap(wins.mean(axis=1), weights),
        "win_rate_equal_length": equal,
    }


def _drift_numbers(trial: Trial, ours: Answers, progress: Progress) -> dict[str, Estimate]:
    """Return KL from the incumbent and from the base; they are one number when the incumbent is the base."""
    temperature = trial.sampling.temperature or 1.0
    budget = trial.config.batch_tokens
    moved = kl_per_prompt(
        trial.base, ours, adapter=INCUMBENT, temperature=temperature, batch_tokens=budget, progress=progress
    )
    from_base = moved
    if has_adapter(trial.base, INCUMBENT):
        from_base = kl_per_prompt(
            trial.base, ours, adapter=None, temperature=temperature, batch_tokens=budget, progress=progress
        )
    per_token = float(moved.sum() / ours.lengths().mean(axis=1).sum())
    return {
        "kl_per_response_nats": mean_with_error(moved),
        "kl_from_base_nats": mean_with_error(from_base),
        "kl_per_token_nats": Estimate(value=per_token, low=per_token, high=per_token, n=len(moved)),
    }


def preference_accuracy(trial: Trial, progress: Progress) -> Estimate:
    """Return the share of held-out pairs whose implicit reward ranks as people did (arXiv 2305.18290, section 5)."""
    pairs = [pair for pair in trial.held_out.pairs if not pair.tie]
    found = _pair_accuracy(trial, pairs, progress) if pairs else wilson(0, 0)
    if found.n < FEWEST_PAIRS and trial.held_out.thumbs:
        found = max(found, _thumb_accuracy(trial, progress), key=lambda one: one.n)
    return found


def _pair_accuracy(trial: Trial, pairs: Sequence[Pair], progress: Progress) -> Estimate:
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    sums = [
        [sum(values) for values in completion_logprobs(trial.base, rows, adapter=adapter, progress=progress)]
        for adapter in (CANDIDATE, INCUMBENT)
    ]
    ratios = (np.array(sums[0]) - np.array(sums[1])).reshape(-1, 2)  # (pairs, 2)
    return pair_accuracy(ratios[:, 0] - ratios[:, 1], pairs)


def _thumb_accuracy(trial: Trial, progress: Progress) -> Estimate:
    """Return how often a liked answer has risen more than one that the same person did not like."""
    thumbs = trial.held_out.thumbs
    rows = [(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs]
    sums = [
        [sum(values) for values in completion_logprobs(trial.base, rows, adapter=adapter, progress=progress)]
        for adapter in (CANDIDATE, INCUMBENT)
    ]
    return _of_thumbs(thumb_metrics(np.array(sums[0]) - np.array(sums[1]), thumbs))


def _of_thumbs(metrics: dict[str, float]) -> Estimate:
    return Estimate(
        value=metrics["reward/thumb_accuracy"],
        low=metrics["reward/thumb_accuracy_low"],
        high=metrics["reward/thumb_accuracy_high"],
        n=int(metrics["reward/thumb_couples"]),
    )


def form_numbers(
    ours: Answers, theirs: Answers, weights: Floats, config: EvaluationConfig, suite: Suite
) -> dict[str, Estimate]:
    """Return lengths and the rates of answers that are empty, cut off, handed over or promise too much."""
    hand_over = [re.compile(phrase, re.IGNORECASE) for phrase in config.hand_over_phrases]
    measures = {
        "empty_rate": lambda rollout, text: float(not text),
        "cut_off_rate": lambda rollout, text: float(rollout.finish_reason == "length"),
        "hand_over_rate": lambda rollout, text: float(any(phrase.search(text) for phrase in hand_over)),
        "promise_rate": lambda rollout, text: float(promises_too_much(text, suite)),
    }
    numbers = {
        "length_ratio": ratio_bootstrap(ours.lengths().mean(axis=1), theirs.lengths().mean(axis=1), weights),
        "answer_tokens": paired_bootstrap(ours.lengths().mean(axis=1), weights),
        "answer_tokens_incumbent": paired_bootstrap(theirs.lengths().mean(axis=1), weights),
    }
    for name, measure in measures.items():
        mine, other = ours.per_prompt(measure), theirs.per_prompt(measure)
        numbers[name] = paired_bootstrap(mine, weights)
        numbers[f"{name}_incumbent"] = paired_bootstrap(other, weights)
        numbers[f"{name}_change"] = paired_bootstrap(mine - other, weights)
    return numbers


def samples_of(trial: Trial, ours: Answers, theirs: Answers, wins: Floats) -> list[Json]:
    """Return the first answers side by side, the most different ones first."""
    found: list[tuple[float, str, Json]] = []
    for number, question in enumerate(trial.questions):
        mine, other = ours.texts[number][0], theirs.texts[number][0]
        text = question.text or _decoded(trial.base, question)
        difference = round(word_difference(mine, other), 4)
        sample = {
            "question": text,
            "incumbent": other,
            "candidate": mine,
            "source": question.source,
            "win_probability": round(float(wins[number, 0]), 4),
            "difference": difference,
        }
        found.append((-difference, text, sample))
    found.sort(key=lambda one: one[:2])
    return [sample for _, _, sample in found[: trial.config.shown_samples]]


def word_difference(one: str, other: str) -> float:
    """Return how different two texts are, 0 (the same words) to 1 (none in common)."""
    return 1 - SequenceMatcher(a=one.split(), b=other.split(), autojunk=False).ratio()


def _decoded(base: Base, question: Question) -> str:
    return str(base.tokenizer.decode(list(question.prompt_ids), skip_special_tokens=True)).strip()
