"""A lenient or a strict rater of everybody's taste is as right as everybody; who turns it round is found, lenient or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment import reward_raters
from alignment.labels import Thumb
from alignment.models import Base, load_base
from alignment.preferences import Preferences
from alignment.progress import Silent
from alignment.reward_raters import threshold, weighed_by_others
from alignment.training_config import RewardConfig

MALICIOUS = 5
"""Number of the rater who turns thumbs round where one does."""


@pytest.fixture(scope="module")
def base(model: Path) -> Base:
    return load_base(str(model))


def notes_of(
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
    thresholds: Sequence[float],
    *,
    count: int,
    malicious: bool = False,
) -> dict[str, Any]:
    """Return what is said of raters who like an answer above their threshold of one taste, in standard deviations of it."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(len(thresholds) * count, int(base.model.config.hidden_size)))
    states[:, 0] = 1.0 + 0.1 * states[:, 0]  # hidden states have a direction in common
    liked = states[:, 1:9].sum(axis=1) / 8**0.5 + 0.5 * rng.normal(size=len(states))
    thumbs = []
    for number, taste in enumerate(liked):
        rater = number // count
        thumbs.append(
            Thumb(
                id=f"thumb-{number}",
                prompt_ids=(number,),
                answer_ids=(7,),
                up=bool(taste > thresholds[rater]) is not (malicious and rater == MALICIOUS),
                weight=1.0,
                prompt_key=f"question-{number}",
                rater=f"rater-{rater}",
            )
        )
    monkeypatch.setattr(
        reward_raters, "answer_features", lambda *_, **__: torch.tensor(states, dtype=torch.float32)
    )
    labels = Preferences(pairs=(), thumbs=tuple(thumbs))
    return weighed_by_others(base, labels, RewardConfig(), seed=1, progress=Silent()).notes


def test_one_taste_with_unlike_thresholds_weighs_alike(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = notes_of(base, monkeypatch, [-1.2] * 5 + [1.6], count=120)
    assert notes["rater_warnings"] == []
    weights = notes["rater_weights"].values()
    assert max(weights) < 1.2 * min(weights)
    assert notes["thumb_fit_accuracy"].value > 0.7
    assert notes["turned_thumb_share"].value < 0.05


@pytest.mark.parametrize(
    ("usual", "own"), [(0.0, 0.0), (0.0, 1.2), (-0.8, 1.2), (-0.8, -1.2)], ids=lambda one: str(one)
)
def test_who_turns_everything_round_is_named_lenient_or_not(
    base: Base, monkeypatch: pytest.MonkeyPatch, usual: float, own: float
) -> None:
    notes = notes_of(base, monkeypatch, [usual] * 5 + [own], count=60, malicious=True)
    (warning,) = notes["rater_warnings"]
    assert warning.startswith(f"Rater rater-{MALICIOUS} disagrees")
    assert [rater for rater, weight in notes["rater_weights"].items() if weight == 0] == [
        f"rater-{MALICIOUS}"
    ]


def test_a_threshold_lies_where_up_and_down_are_equally_likely() -> None:
    # One kind is the other one mirrored at 2, though there are three times as many of it.
    scores = np.array([1.0, 2.5, 0.0, *[3.0, 1.5, 4.0] * 3])
    ups = np.array([False] * 3 + [True] * 9)
    assert threshold(scores, ups, usual=9.0, pull=0.0) == pytest.approx(2.0, abs=1e-9)
    assert 2.0 < threshold(scores, ups, usual=9.0, pull=0.1) < 9.0
    assert threshold(scores, np.ones(12, dtype=bool), usual=9.0, pull=0.1) == 9.0, "one kind alone"
    apart = np.array([-1.0, 1.0])
    assert threshold(apart, apart > 0, usual=0.0, pull=0.0) == pytest.approx(0.0, abs=1e-9)
