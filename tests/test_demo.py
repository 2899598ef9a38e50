"""The demo: what it refuses, and that it leaves the schedule as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

import app
from assistant.demo import _schedule_paused, what_now
from storage import settings
from storage.store import Store


@pytest.mark.parametrize("number", ["0", "-3"])
def test_comparisons_that_nobody_can_make_are_refused_before_anything_starts(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    assert app.main(["demo", "--comparisons", number, "--data", str(data)]) == 2
    assert f"--comparisons: got {number}; use a whole number above 0" in capsys.readouterr().err
    assert not data.exists()


@pytest.mark.parametrize("before", [{}, {"after_labels": 50}, {"paused": True}])
def test_the_schedule_pauses_and_is_as_before_also_after_a_failure(
    before: dict[str, object], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    settings.put(store, "schedule", before, "system")

    def fail_while_paused() -> None:
        with _schedule_paused(tmp_path):
            assert settings.get(store, "schedule") == {**before, "paused": True}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_paused()
    assert settings.get(store, "schedule") == {"paused": False, **before}


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "and decide"), (3, "and decide"), (4, "No candidate came of it"), (1, "did not end well")],
)
def test_only_a_run_that_made_a_candidate_is_said_to_have_evidence(code: int, words: str) -> None:
    said = what_now(code, "http://host")
    assert words in said
    assert "http://host/operator" in said
