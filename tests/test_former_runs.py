"""What a run takes over from former ones: how far the served policy has moved, and the judge it may start from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment import stages
from alignment.config import AlignmentConfig, config_of
from alignment.evaluation import Evidence, Trial, evaluate
from alignment.models import add_policy, load_base, save_adapter
from alignment.pipeline import align
from alignment.preferences import Preferences, load_preferences, take_snapshot
from alignment.progress import Interrupted, Silent
from alignment.run_record import new_run
from alignment.sample_share import measured_share
from alignment.training_data import Parts
from alignment.warm_start import former_judge
from alignment_fixtures import OPEN_GATE, PAIRS, SMALL, Filled, add_comparisons, open_store
from learning_fixtures import SMALL as LORA
from learning_fixtures import make_pairs, make_thumbs, randomise
from storage import policies, runs
from storage.adapters import import_adapter
from storage.records import Policy, Snapshot, now


@pytest.fixture
def filled(tmp_path: Path, model: Path) -> Iterator[Filled]:
    from transformers import AutoTokenizer

    made = open_store(tmp_path / "data", model)
    add_comparisons(made, AutoTokenizer.from_pretrained(model), PAIRS)
    yield made
    made.store.close()


def labels_of(filled: Filled) -> tuple[Preferences, Snapshot]:
    run = new_run(AlignmentConfig(), trigger="manual")
    runs.open_run(filled.store, run)
    snapshot = take_snapshot(filled.store, run_id=run.id)
    runs.close_run(filled.store, run.id, status="cancelled", message="", cost={})
    sha256 = filled.base.base_sha256
    preferences = load_preferences(
        filled.store, snapshot, tokenize=lambda text, served: [1], max_tokens=200, base_sha256=sha256
    )
    return preferences, snapshot


def trained_policy(filled: Filled, folder: Path, *, spread: float) -> Policy:
    """Return a policy with random weights, known to the store."""
    base = load_base(filled.base.base_path)
    add_policy(base, LORA, seed=1)
    randomise(base, "policy", seed=1, spread=spread)
    save_adapter(base, "policy", folder)
    stored = import_adapter(filled.store.data, folder)
    policy = Policy(
        id=policies.new_policy_id(filled.store),
        base_path=filled.base.base_path,
        base_sha256=filled.base.base_sha256,
        adapter_path=str(stored.path),
        adapter_sha256=stored.sha256,
        parent_id=filled.base.id,
        run_id=None,
        created_at=now(),
    )
    policies.add_policy(filled.store, policy)
    return policy


def share(filled: Filled, served: Policy, preferences: Preferences, answers: int = 1000) -> float | None:
    base = load_base(filled.base.base_path)
    start = Path(served.adapter_path) if served.adapter_path else None
    add_policy(base, LORA, seed=1, start_from=start)
    config = config_of({"choice": {"effective_sample_answers": answers}})
    return measured_share(filled.store, base, preferences, served, config, progress=Silent())


def test_the_sample_share_is_one_for_the_served_policys_own_answers_and_small_for_anothers(
    filled: Filled, tmp_path: Path
) -> None:
    preferences, _ = labels_of(filled)
    assert share(filled, filled.base, preferences) == 1.0
    near = share(filled, trained_policy(filled, tmp_path / "near", spread=0.01), preferences)
    far = share(filled, trained_policy(filled, tmp_path / "far", spread=0.3), preferences)
    assert near is not None
    assert far is not None
    assert 0 < far < 0.1 < near < 1
    assert share(filled, filled.base, preferences, answers=0) is None


def test_a_run_is_told_how_much_its_answers_are_worth(filled: Filled) -> None:
    outcome = align(filled.store, config_of({**SMALL, "gate": OPEN_GATE}))
    kept = json.loads((filled.store.data / "runs" / outcome.run_id / "choice.json").read_text())
    assert kept["data"]["effective_sample_share"] == 1.0


def warm(**reward: Any) -> AlignmentConfig:
    table = {**SMALL["reward"], "start_from": "last_run", **reward}
    return config_of({**SMALL, "gate": OPEN_GATE, "reward": table})


def test_the_judge_starts_from_the_last_runs_and_says_so(filled: Filled) -> None:
    first = align(filled.store, warm())
    second = align(filled.store, warm())
    (before,) = runs.reward_models_of(filled.store, first.run_id)
    (after,) = runs.reward_models_of(filled.store, second.run_id)
    assert "start_from" not in before.metrics
    assert after.metrics["start_from"] == before.id
    assert after.metrics["reward/seen_before"] == 0  # the same prompts were held out
    assert after.sha256 != before.sha256
    seen = json.loads((Path(after.path) / "reward.json").read_text())["seen_prompts"]
    assert seen == json.loads((Path(before.path) / "reward.json").read_text())["seen_prompts"]


def test_a_run_that_goes_on_starts_from_the_judge_that_the_interrupted_one_started_from(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has judged by the interrupted run's own: trained on, it would be no judge of a run left alone."""

    def stop(*args: object) -> None:
        raise Interrupted("the run was stopped on request")

    judges = []
    for _ in range(2):  # without a former run, and with one
        with monkeypatch.context() as patch:
            patch.setattr(stages, "update_policy", stop)
            left = align(filled.store, warm())
        resumed = align(filled.store, warm())
        assert (left.status, resumed.status) == ("cancelled", "passed")
        judges += [runs.reward_models_of(filled.store, outcome.run_id)[0] for outcome in (left, resumed)]
    first_left, first, second_left, second = (judge.metrics.get("start_from") for judge in judges)
    assert first_left is first is None
    assert second_left == second == judges[1].id


def test_the_judge_is_not_asked_what_it_learnt_in_a_former_run(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another seed the parts are others, and what it learnt then belongs to none of them: it is asked as recent."""
    trials: list[Trial] = []

    def noted(trial: Trial, progress: Any) -> Evidence:
        trials.append(trial)
        return evaluate(trial, progress)

    monkeypatch.setattr(stages, "evaluate", noted)
    first = warm()
    for config in (first, replace(first, seed=1)):
        assert align(filled.store, config).status == "passed"
    (former,) = runs.reward_models_of(filled.store, runs.list_runs(filled.store)[1].id)
    seen = set(json.loads((Path(former.path) / "reward.json").read_text())["seen_prompts"])
    assert seen < trials[1].judge.seen_prompts
    asked = {question.key for question in trials[1].questions}
    assert asked
    assert not asked & trials[1].judge.seen_prompts


def test_a_judge_of_another_shape_or_base_is_not_started_from(filled: Filled) -> None:
    align(filled.store, warm())
    sha256 = filled.base.base_sha256
    assert former_judge(filled.store, warm().reward, base_sha256=sha256) is not None
    assert former_judge(filled.store, warm(members=3).reward, base_sha256=sha256) is None
    assert former_judge(filled.store, warm().reward, base_sha256="another") is None
    assert former_judge(filled.store, warm(start_from="nothing").reward, base_sha256=sha256) is None


def test_what_the_judge_has_learnt_before_is_nobody_elses() -> None:
    labels = Preferences(pairs=tuple(make_pairs(4)), thumbs=tuple(make_thumbs(2)))
    parts = Parts(policy=labels, judge=labels, held_out=labels)
    left = parts.unseen_by({"prompt-1", "thumb-prompt-0"})
    assert left.judge == labels
    for part in (left.policy, left.held_out):
        assert [pair.prompt_key for pair in part.pairs] == ["prompt-0", "prompt-2", "prompt-3"]
        assert [thumb.prompt_key for thumb in part.thumbs] == ["thumb-prompt-1"]
