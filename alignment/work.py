"""What the stages of a run hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.config import AlignmentConfig
from alignment.golden import GoldenQuestion
from alignment.models import Base
from alignment.preferences import Preferences
from alignment.run_progress import RunProgress
from alignment.together import Place
from alignment.training_data import Parts
from alignment.warm_start import Former
from storage.records import Policy, Run
from storage.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The served model in memory, with the adapter "policy" about to be trained, and the labels as its tokens."""

    base: Base
    incumbent: Policy
    preferences: Preferences
    parts: Parts
    on_policy_share: float
    effective_sample_share: float | None
    """Of the answers under the served policy; None: not measured."""
    former: Former | None
    """The judge of a former run that this run's judge starts from."""
    golden: tuple[GoldenQuestion, ...]
    """What its answers must mention: read at the beginning, so that a wrong file is told before hours of training."""
    unlabelled: dict[tuple[int, ...], str]
    """Prompts without a label that the policy may answer to learn from, with their keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every stage after the choice of a method works with."""

    store: Store
    run: Run
    config: AlignmentConfig
    folder: Path
    """Of the run's files."""
    prepared: Prepared
    progress: RunProgress
    place: Place
    """This process's, where all of the run's processes meet."""
