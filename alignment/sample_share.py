"""How far the served policy has moved from the policies whose answers were compared, measured on those answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignment.config import AlignmentConfig
from alignment.logprobs import completion_logprobs
from alignment.models import Base, load_adapter, remove_adapter
from alignment.preferences import Preferences
from alignment.progress import Progress
from alignment.training_data import Answered, answers_by_policy, effective_sample_share
from storage.policies import get_policy
from storage.records import Policy
from storage.store import Store

FORMER = "former"
"""Name of the adapter while it is asked."""


def measured_share(
    store: Store,
    base: Base,
    preferences: Preferences,
    incumbent: Policy,
    config: AlignmentConfig,
    *,
    progress: Progress,
) -> float | None:
    """Return the effective share of the answers behind the pairs under the served policy, at temperature 1.

    Answers of a policy whose adapter was removed from the disk are left out. None without answers, or not wanted.

    Raises:
        Interrupted: `progress` asked to stop.
    """
    answers = [
        (policy, answer)
        for policy, given in answers_by_policy(store, preferences).items()
        if _is_there(get_policy(store, policy))
        for answer in given
    ]
    size = min(config.choice.effective_sample_answers, len(answers))
    drawn: dict[str, list[Answered]] = {}
    for policy, answer in random.Random(config.seed).sample(answers, size):
        drawn.setdefault(policy, []).append(answer)

    def log_ratios(policy: str, given: Sequence[Answered]) -> list[float]:
        with _loaded(base, get_policy(store, policy)) as adapter:
            former = completion_logprobs(base, given, adapter=adapter, progress=progress)
        served = completion_logprobs(base, given, adapter="reference", progress=progress)
        return [sum(now) - sum(then) for now, then in zip(served, former, strict=True)]

    return effective_sample_share(drawn, served=incumbent.id, log_ratios=log_ratios)


def _is_there(policy: Policy) -> bool:
    return policy.adapter_path is None or Path(policy.adapter_path).is_dir()


@contextmanager
def _loaded(base: Base, policy: Policy) -> Iterator[str | None]:
    """Yield the name of the policy's adapter for a while; None: it is the base."""
    if policy.adapter_path is None:
        yield None
        return
    load_adapter(base, FORMER, Path(policy.adapter_path), trainable=False)
    try:
        yield FORMER
    finally:
        remove_adapter(base, FORMER)
