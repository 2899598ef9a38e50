"""What a run tells of itself while it works, and how it is asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from alignment import run_progress
from alignment.config import AlignmentConfig, config_of
from alignment.pipeline import align
from alignment.run_progress import RunProgress, stages_of, stopping_on_signals
from alignment.run_record import new_run
from alignment_fixtures import (
    CURT,
    KIND,
    NO_KL_BUDGETS,
    OPEN_GATE,
    SMALL,
    Filled,
    add_answers,
    add_comparisons,
    rate_all,
)
from storage import runs
from storage.processes import name_of_process
from storage.store import Store


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Store, str]]:
    store = Store(tmp_path)
    run = new_run(AlignmentConfig(), trigger="manual")
    runs.open_run(store, run)
    yield store, run.id
    store.close()


def test_a_run_is_known_by_the_name_of_its_process(opened: tuple[Store, str]) -> None:
    store, run_id = opened
    assert runs.get_run(store, run_id).process == name_of_process(os.getpid())


def test_progress_is_written_about_twice_a_second_and_loses_no_point(
    opened: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = opened
    writes = []
    report = runs.report_progress
    monkeypatch.setattr(runs, "report_progress", lambda *a, **k: (writes.append(k), report(*a, **k)))
    progress = RunProgress(store, run_id)
    progress.stage("dpo", 200)
    for step in range(1, 201):
        progress.step(step, "learning", **{"dpo/loss": 1 / step})
    assert len(writes) <= 3
    progress.flush()
    assert len(runs.metrics(store, run_id)["dpo/loss"]) == 200
    now_told = runs.get_run(store, run_id).progress
    assert (now_told["step"], now_told["steps"], now_told["message"]) == (200, 200, "learning")


def test_the_fraction_never_goes_back_and_tells_the_time_left(opened: tuple[Store, str]) -> None:
    progress = RunProgress(*opened)
    seen = []
    for stage in (
        "preparing",
        "reward model",
        "reference",
        "dpo",
        "answers",
        "questions",
        "scores",
        "report",
    ):
        progress.stage(stage, 2)
        seen.append(progress.fraction())
        progress.step(1)
        seen.append(progress.fraction())
    progress.step(2)
    seen.append(progress.fraction())
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == pytest.approx(1.0)


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize(
    ("method", "learnt"),
    [
        ("dpo", ["answers to rank", "reference", "dpo"]),
        ("kto", ["answers to rank", "reward model", "reward model", "reference", "kto"]),
        ("ppo", ["answers to rank", "reward model", "reward model", "ppo"]),
    ],
)
def test_every_stage_of_a_run_takes_it_further_and_none_back(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, method: str, learnt: list[str]
) -> None:
    """A second reward model, of two adapters each, is work of its own."""
    rate_all(filled, add_answers(filled, tokenizer, 48, (KIND, CURT)), ("up", "down"))
    add_comparisons(filled, tokenizer, 48)
    begun: list[tuple[str, float]] = []
    told: list[float] = []
    stage, report = RunProgress.stage, runs.report_progress

    def noted(self: RunProgress, name: str, steps: int) -> None:
        stage(self, name, steps)
        begun.append((name, self.fraction()))

    def reported(store: Store, run_id: str, **now: Any) -> None:
        told.append(now["fraction"])
        report(store, run_id, **now)

    monkeypatch.setattr(RunProgress, "stage", noted)
    monkeypatch.setattr(runs, "report_progress", reported)
    outcome = align(filled.store, ranked(method))
    assert outcome.status == "passed", outcome.message
    assert told == sorted(told)
    assert told[-1] == 1.0
    counted = [(name, fraction) for name, fraction in begun if name != "reward heads"]
    assert [name for name, _ in counted] == [
        "preparing",
        *["reward model"] * 2,
        *learnt,
        *["answers", "questions", "scores", "report"],
    ]
    begins = [fraction for _, fraction in counted]
    assert all(one < after for one, after in pairwise(begins)), counted


def ranked(method: str) -> AlignmentConfig:
    small = {"epochs": 1, "batch_thumbs": 8, "min_class_thumbs": 4} | NO_KL_BUDGETS
    few = {"steps": 1, "prompts_per_step": 8, "max_new_tokens": 8, "minibatches": 1}
    return config_of(
        {
            **SMALL,
            "method": method,
            "gate": OPEN_GATE,
            "choice": {**SMALL["choice"], "min_thumbs": 40},
            "reward": {**SMALL["reward"], "adapters": 2},
            "dpo": {**SMALL["dpo"], "pairs_from": "ranked"},
            "kto": {**small, "thumbs_from": "ranked", "ranked_by": "reward_model"},
            "ppo": {**few, "reward_from": "ranked"},
        }
    )


def test_stages_that_an_interrupted_run_has_done_count_as_done(opened: tuple[Store, str]) -> None:
    progress = RunProgress(*opened)
    progress.stage("preparing", 1)
    progress.step(1)
    left = 1 - progress.fraction()
    progress.plan(stages_of("ppo", AlignmentConfig()))
    progress.stage("reward model", 1)
    progress.step(1)
    judged = progress.fraction()
    progress.stage("answers", 1)
    # a reward model 0.20 and PPO 0.25, of what is left: two reward models, PPO and 0.48 of evaluation
    assert progress.fraction() == pytest.approx(judged + left * 0.45 / 1.13)
    progress.stage("report", 1)
    progress.step(1)
    assert progress.fraction() == pytest.approx(1.0)


def test_a_run_that_was_closed_is_asked_to_stop(opened: tuple[Store, str]) -> None:
    store, run_id = opened
    progress = RunProgress(store, run_id)
    runs.close_run(store, run_id, status="cancelled", message="enough", cost={})
    progress.stage("dpo", 10)
    assert progress.should_stop()


def test_a_second_signal_ends_the_run_at_once_unless_it_is_the_first_one_passed_on(
    opened: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = RunProgress(*opened)
    with stopping_on_signals(progress):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert progress.should_stop()
        monkeypatch.setattr(run_progress, "SAME_SIGNAL_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
