"""What a run learns from stays within what it planned memory for, also what nobody labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignment import memory, together
from alignment.config import AlignmentConfig, config_of
from alignment.memory import longest_learnt
from alignment.models import load_base
from alignment.pipeline import align
from alignment.preferences import Pair, Thumb, take_snapshot
from alignment.preparation import prepare
from alignment.run_progress import RunProgress
from alignment.run_record import new_run
from alignment.together import Place
from alignment.work import Prepared
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
from tiny_models import make_tiny_model

LABELS = 48
LONG = "Where is the lamp that I sent back to you with the parcel of Tuesday"


def prepared(filled: Filled, config: AlignmentConfig) -> Prepared:
    run = new_run(config, trigger="manual")
    runs.open_run(filled.store, run)
    progress = RunProgress(filled.store, run.id)
    snapshot = take_snapshot(filled.store, run_id=run.id)
    return prepare(filled.store, snapshot, filled.base, config, progress, Place(progress=progress))


def test_questions_that_leave_no_room_for_the_longest_answer_are_not_learnt_from(
    filled: Filled, tokenizer: Any
) -> None:
    short = add_answers(filled, tokenizer, 20, (KIND,))
    long = add_answers(filled, tokenizer, 20, (CURT,), asked=LONG)
    add_comparisons(filled, tokenizer, LABELS)
    answer, question = len(short[0].answer_token_ids), max(len(turn.prompt_token_ids) for turn in short)
    bound = config_of({**SMALL, "data": {"max_tokens": question + answer}})
    found = {len(prompt) for prompt in prepared(filled, bound).unlabelled}
    assert found
    assert (
        max(found) <= question < min(len(turn.prompt_token_ids) for turn in long) <= 128
    )  # half the context


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize("method", ["dpo", "kto", "ppo"])
def test_memory_is_planned_again_for_what_is_learnt_from(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The best and the worst of the policy's own answers share a row with their question, whatever the labels were."""
    answers = (KIND, CURT)
    rate_all(filled, add_answers(filled, tokenizer, 2 * LABELS, answers), ("up", "down"))
    add_comparisons(filled, tokenizer, LABELS if method == "dpo" else 0)
    said: list[tuple[str, int]] = []
    note_plans(monkeypatch, said)
    note_training(
        monkeypatch, {"dpo": "train_dpo", "kto": "train_kto", "ppo": "train_reward_model"}[method], said
    )
    outcome = align(filled.store, ranked(method))
    assert outcome.status == "passed", outcome.message
    at = max(number for number, (name, _) in enumerate(said) if name == "learnt")
    assert said[at - 1] == ("planned", said[at][1])


def test_thumbs_are_planned_for_as_they_are_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with its answers in one row, or each answer in a row of its own."""
    thumbs = [
        Thumb(
            id=f"{number}",
            prompt_ids=(1,) * 20,
            answer_ids=(number,) * 5,
            up=True,
            weight=1.0,
            prompt_key="one",
            rater="aya",
        )
        for number in range(2, 8)
    ]
    base = load_base(str(make_tiny_model(tmp_path)), device="cpu")
    assert longest_learnt(base, thumbs) == 20 + 6 * 5
    monkeypatch.setattr(memory, "packs", lambda base: False)
    monkeypatch.setattr(memory, "masks", lambda base: False)
    assert longest_learnt(base, thumbs) == 25


def ranked(method: str) -> AlignmentConfig:
    small = {"thumbs_from": "ranked", "batch_thumbs": 8, "epochs": 1, "min_class_thumbs": 4} | NO_KL_BUDGETS
    ppo = {"steps": 1, "prompts_per_step": 8, "max_new_tokens": 8, "minibatches": 1, "reward_from": "ranked"}
    return config_of(
        {
            **SMALL,
            "method": method,
            "gate": OPEN_GATE,
            "choice": {**SMALL["choice"], "min_thumbs": 40},
            "dpo": {**SMALL["dpo"], "pairs_from": "ranked"},
            "kto": small,
            "ppo": ppo,
        }
    )


def note_plans(monkeypatch: pytest.MonkeyPatch, said: list[tuple[str, int]]) -> None:
    """Note the tokens of the largest prompt with its answers that memory is planned for."""
    plan = together.plan_batches

    def noted(base: Any, *, longest: int, **options: Any) -> None:
        said.append(("planned", longest))
        plan(base, longest=longest, **options)

    monkeypatch.setattr(together, "plan_batches", noted)


def note_training(monkeypatch: pytest.MonkeyPatch, name: str, said: list[tuple[str, int]]) -> None:
    """Note the tokens of the largest prompt with its answers that is trained on."""
    train = getattr(together, name)

    def noted(base: Any, labels: Any, *rest: Any, **options: Any) -> Any:
        items: list[Pair | Thumb] = list(labels.pairs if name == "train_reward_model" else labels)
        by_prompt: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for item in items:
            answers = (item.answer_ids,) if isinstance(item, Thumb) else (item.chosen_ids, item.rejected_ids)
            by_prompt.setdefault(item.prompt_ids, set()).update(answers)
        if items:
            largest = max(len(prompt) + sum(map(len, given)) for prompt, given in by_prompt.items())
            said.append(("learnt", largest))
        return train(base, labels, *rest, **options)

    monkeypatch.setattr(together, name, noted)
