"""What DPO and KTO learn from besides people's labels: the policy's own answers, ranked by what the labels say.

The served policy answers each question several times, and its best answer is put against its worst, as in RSO (arXiv
2309.06657) and in iterative DPO (arXiv 2405.07863). These are farther apart than two answers that people happened to see,
and every question gives some, also one that nobody labelled. What ranks them is a fit to all labels (`linear_fit`), one
head on what the base makes of an answer. Where it is good, what it ranks wins as much or more than the labels and loses
fewer right answers.

It is for noisy labels too: one that is wrong teaches its opposite, and a training that repeats the labels learns it by
heart and spends its KL on that. A linear head cannot: it is more often right about the labelled pairs than such labels are.

Where it is not good, DPO wins more with the labels; KTO with answers that a reward model ranks, adapter and all. A thumb
says how good an answer is, question and answer in one, and KTO spends its KL on that some questions are always answered
well; ranking compares answers to the same question.

What they win, and when labels win more: docs/learning.md and docs/robustness.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import MappingProxyType

from alignment.batching import make_tree
from alignment.distributed import ALONE, Crew
from alignment.linear_fit import answer_features, fitted_head
from alignment.models import Base, remove_adapter
from alignment.preferences import Pair, Preferences, Thumb
from alignment.progress import Progress
from alignment.reward_items import make_items
from alignment.reward_model import train_reward_model
from alignment.rollouts import Rollout, sample
from alignment.training_config import DpoConfig, FixedAnswersConfig, KtoConfig, RewardConfig
from alignment.training_data import longest_answer, prompts_in
from storage.errors import InvalidField

RATER = "the fit to all labels"
FEWEST_SHARE = 0.5
"""Of the questions asked that must get two different answers: a policy that is sure of itself gives few, and of those
questions only that it is not sure of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Questions and what the adapter "reference" answered."""

    questions: dict[tuple[int, ...], str]
    """Prompt to its key."""
    answers: list[list[tuple[int, ...]]]
    """The different whole answers to each."""

    @property
    def ranked(self) -> int:
        """Questions with two or more answers."""
        return sum(len(given) > 1 for given in self.answers)


def pairs_to_learn(
    base: Base,
    labels: Preferences,
    config: DpoConfig,
    reward: RewardConfig,
    *,
    unlabelled: Mapping[tuple[int, ...], str] = MappingProxyType({}),
    seed: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> tuple[Sequence[Pair], str]:
    """Return the pairs that DPO learns from by `config.pairs_from`, and what people should know of it.

    "auto" takes ranked answers unless too few questions get two different ones. Corrections stay as they are: no policy
    gives the edited answer. Every process returns the same.

    Args:
        unlabelled: prompts with their keys, of which as many are answered too as `config.ranked_prompts` leaves room for.

    Raises:
        InvalidField: "ranked", and no question got two different whole answers.
        Interrupted: `progress` asked to stop.
    """
    if config.pairs_from == "labels":
        return labels.pairs, ""
    asked = _ask(base, labels, unlabelled, config, seed=seed, progress=progress, crew=crew)
    if told := _too_few(asked, config, "dpo.pairs_from", wanted=config.pairs_from == "ranked", least=1):
        return labels.pairs, told
    found = _best_and_worst(
        asked,
        _fit_scores(
            base,
            labels,
            asked,
            reward,
            flip_rate=config.ranked_flip_rate,
            pull=config.ranked_pull,
            seed=seed,
            progress=progress,
            crew=crew,
        ),
    )
    told = (
        f"It learnt from {len(found)} pairs of its own answers, the best against the worst of "
        f"{config.ranked_answers} to a question by {_fit_says(config)}."
    )
    return found + [pair for pair in labels.pairs if pair.source == "correction"], told


def thumbs_to_learn(
    base: Base,
    labels: Preferences,
    config: KtoConfig,
    reward: RewardConfig,
    *,
    unlabelled: Mapping[tuple[int, ...], str] = MappingProxyType({}),
    seed: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> tuple[Sequence[Thumb], str]:
    """Return the thumbs that KTO learns from by `config.thumbs_from`, and what people should know of it.

    The best answer to a question gets a thumb up, the worst one down. "auto" takes them unless too few questions get two
    different answers. Unless `config.ranked_by` says "fit", a reward model ranks. Every process returns the same.

    Args:
        unlabelled: prompts with their keys, of which as many are answered too as `config.ranked_prompts` leaves room for.

    Raises:
        InvalidField: "ranked", and no question got two different whole answers.
        Interrupted: `progress` asked to stop.
    """
    if config.thumbs_from == "labels":
        return labels.thumbs, ""
    asked = _ask(base, labels, unlabelled, config, seed=seed, progress=progress, crew=crew)
    wanted, least = config.thumbs_from == "ranked", config.min_class_thumbs
    if told := _too_few(asked, config, "kto.thumbs_from", wanted=wanted, least=least):
        return labels.thumbs, told
    by_fit = config.ranked_by == "fit"
    by_labels = partial(_fit_scores, flip_rate=config.ranked_flip_rate, pull=config.ranked_pull)
    scored = by_labels if by_fit else _reward_scores
    scores = scored(base, labels, asked, reward, seed=seed, progress=progress, crew=crew)
    found = [
        Thumb(
            id=f"{pair.id}-{'up' if up else 'down'}",
            prompt_ids=pair.prompt_ids,
            answer_ids=pair.chosen_ids if up else pair.rejected_ids,
            up=up,
            weight=pair.weight,
            prompt_key=pair.prompt_key,
            rater=pair.rater,
        )
        for pair in _best_and_worst(asked, scores)
        for up in (True, False)
    ]
    return found, (
        f"It learnt from {len(found)} of its own answers, the best and the worst of {config.ranked_answers} to a question "
        f"by {_fit_says(config) if by_fit else 'a reward model of the labels'}."
    )


def _fit_says(config: FixedAnswersConfig) -> str:
    """Return what ranks, and what it takes the labels for."""
    rate = config.ranked_flip_rate
    return "a fit to all labels" + (f", which takes {rate:.0%} of the pairs for turned round" if rate else "")


def _too_few(asked: _Asked, config: FixedAnswersConfig, key: str, *, wanted: bool, least: int) -> str:
    """Return why the labels are learnt from after all, "" where they are not.

    Args:
        least: questions with different answers that the method needs.

    Raises:
        InvalidField: ranked answers are `wanted`, and there are none.
    """
    if wanted and not asked.ranked:
        fix = 'the policy gave no question two different whole answers; use "labels"'
        raise InvalidField(key, "ranked", fix)
    if wanted or asked.ranked >= max(least, FEWEST_SHARE * len(asked.questions)):
        return ""
    return (
        f"It learnt from people's labels: only {asked.ranked} of {len(asked.questions)} questions got two different "
        f"whole answers in {config.ranked_answers}."
    )


def _best_and_worst(asked: _Asked, scores: Sequence[Sequence[float]]) -> list[Pair]:
    """Return a pair for each question whose answers have different scores, weighing as much as those are apart, 1 on
    average."""
    found: list[Pair] = []
    for (prompt, key), given, score in zip(asked.questions.items(), asked.answers, scores, strict=True):
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
    return [replace(pair, weight=pair.weight / mean) for pair in found]


def _ask(
    base: Base,
    labels: Preferences,
    unlabelled: Mapping[tuple[int, ...], str],
    config: FixedAnswersConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> _Asked:
    questions = _questions(labels, most=config.ranked_prompts)
    questions |= dict(list(unlabelled.items())[: config.ranked_prompts - len(questions)])
    answers = _answers(base, list(questions), labels, config, seed=seed, progress=progress, crew=crew)
    return _Asked(questions=questions, answers=answers)


def _questions(labels: Preferences, *, most: int) -> dict[tuple[int, ...], str]:
    """Return the labels' different prompts with their keys, ties' and thumbs' too, spread evenly when they are too many."""
    found = prompts_in(labels)
    if len(found) <= most:
        return found
    kept = list(found.items())
    return dict(kept[number * len(kept) // most] for number in range(most))


def _answers(
    base: Base,
    prompts: Sequence[tuple[int, ...]],
    labels: Preferences,
    config: FixedAnswersConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> list[list[tuple[int, ...]]]:
    """Return the different answers to each prompt that came to their end, no longer than the longest labelled one."""
    mine = list(crew.share(range(len(prompts))))
    found: dict[int, list[tuple[int, ...]]] = {number: [] for number in mine}
    progress.stage("answers to rank", config.ranked_answers)
    for turn in range(config.ranked_answers):
        given: list[Rollout] = sample(
            base,
            [prompts[number] for number in mine],
            adapter="reference",
            temperature=config.ranked_temperature,
            max_new_tokens=longest_answer(labels),
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


def _fit_scores(
    base: Base,
    labels: Preferences,
    asked: _Asked,
    reward: RewardConfig,
    *,
    flip_rate: float,
    pull: float,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> list[list[float]]:
    """Return the answers' scores by one head, fitted to every label on what the bare base makes of an answer."""
    one = replace(reward, members=1)
    pairs = [pair for pair in labels.pairs if pair.source != "ratings"]  # their thumbs are here themselves
    items = make_items(base, pairs, list(labels.thumbs), one, seed=seed, flip_rate=flip_rate)
    trees = [
        make_tree(prompt, given)
        for prompt, given in zip(asked.questions, asked.answers, strict=True)
        if given
    ]
    features = answer_features(
        base, [*items.trees, *trees], batch_tokens=reward.batch_tokens, progress=progress, crew=crew
    )
    labelled = sum(len(tree.completions) for tree in items.trees)
    head = fitted_head(base, features[:labelled], items, one, pull=pull)["heads"][0]
    return _by_question((features[labelled:] @ head).tolist(), asked)


def _reward_scores(
    base: Base,
    labels: Preferences,
    asked: _Asked,
    reward: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    crew: Crew,
) -> list[list[float]]:
    """Return the answers' mean scores by a reward model that is trained on every label for it and then forgotten."""
    scorer = train_reward_model(base, labels, None, reward, seed=seed, progress=progress, crew=crew)
    rows = [
        (prompt, answer)
        for prompt, given in zip(asked.questions, asked.answers, strict=True)
        for answer in given
    ]
    scores = scorer.score(rows, progress=progress, crew=crew).mean.tolist()
    for name in scorer.adapters:
        remove_adapter(base, name)
    return _by_question(scores, asked)


def _by_question(scores: Sequence[float], asked: _Asked) -> list[list[float]]:
    """Return the answers' scores, which come in their order, question by question."""
    ends = list(accumulate(map(len, asked.answers)))
    return [list(scores[end - len(given) : end]) for given, end in zip(asked.answers, ends, strict=True)]
