"""Golden and red-team questions put to both sides, greedily, so that the marks do not depend on luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignment.answers import CANDIDATE, INCUMBENT, text_of
from alignment.config import EvaluationConfig
from alignment.golden import GoldenQuestion, passes
from alignment.intervals import Estimate, bootstrap_weights, paired_bootstrap, wilson
from alignment.models import Base, prompt_ids
from alignment.progress import Progress
from alignment.rollouts import sample
from alignment.safety import Suite, withstands
from storage.records import Json

SHOWN_DETAILS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedQuestions:
    """What every candidate is asked."""

    golden: tuple[GoldenQuestion, ...]
    suite: Suite
    system_prompt: str
    """As the deployment puts it before every conversation; "" for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Both sides' answers to one question, and whether they are right."""

    id: str
    ask: str
    candidate: str
    incumbent: str
    candidate_right: bool
    incumbent_right: bool


def ask_fixed(
    base: Base, fixed: FixedQuestions, config: EvaluationConfig, *, seed: int, progress: Progress
) -> tuple[dict[str, Estimate], Json]:
    """Return the golden and safety numbers, and the answers worth reading.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    progress.stage("questions", 2)
    asks = [question.ask for question in fixed.golden] + [probe.ask for probe in fixed.suite.probes]
    prompts = [prompt_ids(base, _messages(fixed.system_prompt, ask)) for ask in asks]
    sides = []
    for number, adapter in enumerate((CANDIDATE, INCUMBENT), start=1):
        sides.append(_greedy(base, prompts, adapter, config, progress))
        progress.step(number, f"{number} of 2 sides answered {len(asks)} fixed questions")
    ours, theirs = sides
    golden, safety = _marks(fixed, ours, theirs)
    numbers = _numbers("golden", golden, config, seed) | _numbers("safety", safety, config, seed)
    return numbers, {"golden": _worth_reading(golden), "safety": _worth_reading(safety)}


def _messages(system_prompt: str, ask: str) -> list[Json]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": ask}]


def _greedy(
    base: Base, prompts: Sequence[Sequence[int]], adapter: str, config: EvaluationConfig, progress: Progress
) -> list[str]:
    """Answer greedily; a prompt that fills the context gets an empty answer."""
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < base.max_positions]
    rollouts = sample(
        base,
        [prompts[i] for i in fitting],
        adapter=adapter,
        temperature=0.0,
        max_new_tokens=config.max_new_tokens,
        batch_tokens=config.batch_tokens,
        progress=progress,
    )
    texts = [""] * len(prompts)
    for i, rollout in zip(fitting, rollouts, strict=True):
        texts[i] = text_of(base, rollout)
    return texts


def _marks(
    fixed: FixedQuestions, ours: Sequence[str], theirs: Sequence[str]
) -> tuple[list[Mark], list[Mark]]:
    golden = [
        Mark(
            id=question.id,
            ask=question.ask,
            candidate=mine,
            incumbent=other,
            candidate_right=passes(question, mine),
            incumbent_right=passes(question, other),
        )
        for question, mine, other in zip(fixed.golden, ours, theirs, strict=False)
    ]
    rest = zip(fixed.suite.probes, ours[len(golden) :], theirs[len(golden) :], strict=True)
    safety = [
        Mark(
            id=probe.id,
            ask=probe.ask,
            candidate=mine,
            incumbent=other,
            candidate_right=withstands(probe, mine, fixed.suite),
            incumbent_right=withstands(probe, other, fixed.suite),
        )
        for probe, mine, other in rest
    ]
    return golden, safety


def _numbers(name: str, marks: Sequence[Mark], config: EvaluationConfig, seed: int) -> dict[str, Estimate]:
    if not marks:
        return {}
    ours = np.array([float(mark.candidate_right) for mark in marks])
    theirs = np.array([float(mark.incumbent_right) for mark in marks])
    weights = bootstrap_weights(len(marks), resamples=config.bootstrap_resamples, seed=seed)
    return {
        f"{name}_rate": wilson(float(ours.sum()), len(marks)),
        f"{name}_rate_incumbent": wilson(float(theirs.sum()), len(marks)),
        f"{name}_change": paired_bootstrap(ours - theirs, weights),
    }


def _worth_reading(marks: Sequence[Mark]) -> list[Json]:
    """Return what was lost first, then what both fail, then what was gained."""
    told = [mark for mark in marks if not (mark.candidate_right and mark.incumbent_right)]
    told.sort(key=lambda mark: (mark.candidate_right, not mark.incumbent_right))
    return [
        {
            "id": mark.id,
            "question": mark.ask,
            "candidate": mark.candidate,
            "incumbent": mark.incumbent,
            "candidate_right": mark.candidate_right,
            "incumbent_right": mark.incumbent_right,
        }
        for mark in told[:SHOWN_DETAILS]
    ]
