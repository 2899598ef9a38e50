"""A setting that cannot work is told before anything is trained, and where possible before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import app
from alignment import preparation, stages
from alignment.config import config_of
from alignment.golden import STARTER_FILE
from alignment.pipeline import align
from alignment_fixtures import OPEN_GATE, PAIRS, SMALL, Filled, add_comparisons
from storage import runs


@pytest.mark.parametrize("text", [None, "no table"])
def test_a_golden_file_that_cannot_be_read_is_bad_input_and_opens_no_run(
    filled: Filled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
) -> None:
    golden, config = tmp_path / "golden.toml", tmp_path / "align.toml"
    if text is not None:
        golden.write_text(text)
    config.write_text(f'[evaluation]\ngolden_file = "{golden}"\n')
    monkeypatch.setattr("alignment.launch.give_way", lambda: None)
    assert app.main(["align", "--data", str(filled.store.data), "--config", str(config)]) == 2
    told = capsys.readouterr().err  # a long path is shown shortened
    assert "evaluation.golden_file: got '" in told
    assert f"{golden.name}'; give a readable TOML file" in told
    assert runs.list_runs(filled.store) == []


def test_the_golden_questions_are_those_of_the_runs_beginning(
    filled: Filled, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, PAIRS)
    golden = tmp_path / "golden.toml"
    golden.write_text(STARTER_FILE.read_text())
    prepare = preparation.prepare

    def removed_meanwhile(*args: Any) -> Any:
        made = prepare(*args)
        golden.unlink()
        return made

    monkeypatch.setattr(preparation, "prepare", removed_meanwhile)
    evaluation = {**SMALL["evaluation"], "golden_file": str(golden)}
    outcome = align(filled.store, config_of({**SMALL, "gate": OPEN_GATE, "evaluation": evaluation}))
    assert outcome.status == "passed", outcome.message


def test_answers_of_ppo_that_leave_no_room_for_a_question_are_told_before_anything_is_trained(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, PAIRS)
    monkeypatch.setattr(stages, "train_judge", lambda *_: pytest.fail("trained"))
    table = {**SMALL, "method": "ppo", "ppo": {"max_new_tokens": 250}}  # of 256 tokens in all
    outcome = align(filled.store, config_of(table))
    assert outcome.status == "failed"
    assert "ppo.max_new_tokens: got 250; " in outcome.message
    assert "256 tokens" in outcome.message
