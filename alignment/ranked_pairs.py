"""Pairs for DPO that a fit to all labels makes of the policy's own answers.

The served policy answers each question several times, and its best answer by the fit, one linear head on the base's
states, is put against its worst, as in RSO (arXiv 2309.06657) and in iterative DPO (arXiv 2405.07863). Where the fit is
good, these pairs are farther apart than those that people compared, and every question gives one.

They are for noisy labels too. A label that is wrong teaches its opposite, and a training that repeats the labels learns
it by heart and spends its KL on that. A linear head cannot: it is more often right about the labelled pairs than such
labels are (docs/robustness.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from alignment.batching import make_tree
from alignment.distributed import ALONE, Crew
from alignment.models import Base
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Progress
from alignment.reward_items import make_items
from alignment.reward_training import fitted_head, last_states
from alignment.rollouts import Rollout, sample
from alignment.training_config import DpoConfig, RewardConfig
from storage.errors import InvalidField

RATER = "the fit to all labels"
FEWEST_SHARE = 0.5
"""Of the questions asked that must get two different answers: a policy that is sure of itself gives few, and of those
questions only that it is not sure of."""


def pairs_to_learn(
    base: Base,
    labels: Preferences,
    config: DpoConfig,
    reward: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> tuple[Sequence[Pair], str]:
    """Return what DPO learns from by `config.pairs_from`, and what people should know of it.

    "auto" takes ranked answers unless too few questions get two different ones.

    Raises:
        InvalidField: "ranked", and no question got two different whole answers.
        Interrupted: `progress` asked to stop.
    """
    if config.pairs_from == "labels":
        return labels.pairs, ""
    found = ranked_pairs(base, labels, config, reward, seed=seed, progress=progress, crew=crew)
    ranked = sum(pair.source == "ranked" for pair in found)
    asked = len(_questions(labels, most=config.ranked_prompts))
    if config.pairs_from == "auto" and ranked < FEWEST_SHARE * asked:
        return labels.pairs, (
            f"It learnt from people's labels: only {ranked} of {asked} questions got two different whole answers in "
            f"{config.ranked_answers}."
        )
    if not ranked:
        fix = 'the policy gave no question two different whole answers; use "labels"'
        raise InvalidField("dpo.pairs_from", "ranked", fix)
    return found, (
        f"It learnt from {ranked} pairs of its own answers, the best against the worst of {config.ranked_answers} to a "
        "question by a fit to all labels."
    )


def ranked_pairs(
    base: Base,
    labels: Preferences,
    config: DpoConfig,
    reward: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> list[Pair]:
    """Return a pair for each question to which the adapter "reference" gave two answers that the fit ranks.

    A pair weighs as much as its scores are apart, 1 on average. Corrections stay as they are: no policy gives the edited
    answer. Every process returns the same.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    questions = _questions(labels, most=config.ranked_prompts)
    answers = _answers(base, list(questions), labels, config, seed=seed, progress=progress, crew=crew)
    scores = _scores(base, labels, questions, answers, reward, seed=seed, progress=progress, crew=crew)
    found: list[Pair] = []
    for (prompt, key), given, score in zip(questions.items(), answers, scores, strict=True):
        if len(given) < 2 or max(score) == min(score):
            continue
        best, worst = score.index(max(score)), score.index(min(score))
        found.append(
            Pair(
                id=f"ranked-{len(found)}",
                prompt_ids=prompt,
                chosen_ids=given[best],
                rejected_ids=given[worst],
                weight=score[best] - score[worst],
                margin=0.0,
                source="ranked",
                prompt_key=key,
                rater=RATER,
            )
        )
    mean = sum(pair.weight for pair in found) / max(1, len(found))
    ranked = [replace(pair, weight=pair.weight / mean) for pair in found]
    return ranked + [pair for pair in labels.pairs if pair.source == "correction"]


def _questions(labels: Preferences, *, most: int) -> dict[tuple[int, ...], str]:
    """Return the labels' different prompts with their keys, ties' and thumbs' too, spread evenly when they are too many."""
    items: list[Pair | Thumb] = [*labels.pairs, *labels.thumbs]
    found = {item.prompt_ids: item.prompt_key for item in items}
    if len(found) <= most:
        return found
    kept = list(found.items())
    return dict(kept[number * len(kept) // most] for number in range(most))


def _answers(
    base: Base,
    prompts: Sequence[tuple[int, ...]],
    labels: Preferences,
    config: DpoConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> list[list[tuple[int, ...]]]:
    """Return the different answers to each prompt that came to their end, no longer than the longest labelled one."""
    labelled = [answer for pair in labels.pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    longest = max(map(len, labelled + [thumb.answer_ids for thumb in labels.thumbs]))
    mine = list(crew.share(range(len(prompts))))
    found: dict[int, list[tuple[int, ...]]] = {number: [] for number in mine}
    progress.stage("answers to rank", config.ranked_answers)
    for turn in range(config.ranked_answers):
        given: list[Rollout] = sample(
            base,
            [prompts[number] for number in mine],
            adapter="reference",
            temperature=config.ranked_temperature,
            max_new_tokens=longest,
            seed=(seed * 1_000_003 + 7_000 + turn) % 2**63,
            progress=crew.begin(progress, "sampling"),
            numbers=mine,
        )
        for number, answer in zip(mine, given, strict=True):
            if answer.finish_reason == "stop" and answer.token_ids not in found[number]:
                found[number].append(answer.token_ids)
        progress.step(turn + 1, f"{len(prompts)} questions")
    everyone = crew.united(found)
    return [everyone[number] for number in range(len(prompts))]


def _scores(
    base: Base,
    labels: Preferences,
    questions: dict[tuple[int, ...], str],
    answers: Sequence[Sequence[tuple[int, ...]]],
    reward: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> list[list[float]]:
    """Return the answers' scores by one head, fitted to every label on the base's own states."""
    one = replace(reward, members=1)
    pairs = [pair for pair in labels.pairs if pair.source != "ratings"]  # their thumbs are here themselves
    items = make_items(base, pairs, list(labels.thumbs), one, seed=seed)
    asked = [make_tree(prompt, given) for prompt, given in zip(questions, answers, strict=True) if given]
    states = last_states(
        base, None, [*items.trees, *asked], batch_tokens=reward.batch_tokens, progress=progress, crew=crew
    )
    labelled = sum(len(tree.completions) for tree in items.trees)
    head = fitted_head(base, states[:labelled], items, one, seed=seed)["heads"][0]
    scores = (states[labelled:] @ head).tolist()
    ends = list(accumulate(map(len, answers)))
    return [scores[end - len(given) : end] for given, end in zip(answers, ends, strict=True)]
