"""What a run tells of itself while it works, and how it is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment import run_progress
from alignment.config import AlignmentConfig
from alignment.run_progress import RunProgress, stopping_on_signals
from alignment.run_record import new_run
from storage import runs
from storage.store import Store


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Store, str]]:
    store = Store(tmp_path)
    run = new_run(AlignmentConfig(), trigger="manual")
    runs.open_run(store, run)
    yield store, run.id
    store.close()


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
