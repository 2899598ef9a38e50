"""A run that is started again goes on where the interrupted one was: it trains nothing twice and changes no result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from alignment import preparation, ranked_answers, stages, together
from alignment.config import AlignmentConfig, config_of
from alignment.pipeline import Outcome, align
from alignment.ppo_config import PpoConfig
from alignment.reward_model import TrainedReward
from alignment.run_progress import RunProgress
from alignment.training_config import DpoConfig, deciding
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
from storage.policies import get_policy

LABELS = 48
CURVES = {"dpo": "dpo/loss", "kto": "kto/loss", "ppo": "objective/score"}


def config(method: str, **tables: Any) -> AlignmentConfig:
    small = {"epochs": 2, "checkpoint_every": 1} | NO_KL_BUDGETS
    return config_of(
        {
            **SMALL,
            "method": method,
            "gate": OPEN_GATE,
            "choice": {**SMALL["choice"], "min_thumbs": 40},
            "dpo": {**SMALL["dpo"], "pairs_from": "ranked"},
            "kto": {"batch_thumbs": 8, "min_class_thumbs": 4, "thumbs_from": "ranked", **small},
            "ppo": {
                "steps": 3,
                "prompts_per_step": 8,
                "max_new_tokens": 8,
                "minibatches": 1,
                "epochs": 1,
                "checkpoint_every": 1,
            },
            **tables,
        }
    )


@pytest.fixture
def labelled(filled: Filled, tokenizer: Any) -> Filled:
    """A store with comparisons and thumbs."""
    add_comparisons(filled, tokenizer, LABELS)
    rate_all(filled, add_answers(filled, tokenizer, LABELS, (KIND, CURT)), ("up", "down"))
    return filled


def interrupted(filled: Filled, wanted: AlignmentConfig, *, stage: str, step: int) -> Outcome:
    """Do a run that is asked to stop once this step of the stage is done."""
    said = RunProgress.step

    def stopping(self: RunProgress, done: int, message: str = "", **metrics: float) -> None:
        said(self, done, message, **metrics)
        if self._stage == stage and done >= step:
            self.ask_to_stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunProgress, "step", stopping)
        outcome = align(filled.store, wanted)
    assert (outcome.status, outcome.exit_code) == ("cancelled", 130), outcome.message
    return outcome


def adapter_of(filled: Filled, outcome: Outcome) -> str | None:
    """Return the digest of the candidate's adapter."""
    assert outcome.policy_id is not None, outcome.message
    return get_policy(filled.store, outcome.policy_id).adapter_sha256


def steps_of(filled: Filled, outcome: Outcome, method: str) -> list[int]:
    """Return the steps of the policy's training that the run took itself."""
    points = runs.metrics(filled.store, outcome.run_id).get(CURVES[method], [])
    return [step for step, _ in points]


def kept(filled: Filled) -> list[Path]:
    folder = filled.store.data / "cache" / "checkpoints"
    return list(folder.iterdir()) if folder.exists() else []


def rounded_otherwise(train: Callable[..., TrainedReward]) -> Callable[..., TrainedReward]:
    """Return a training whose reward model agrees with `train`'s to rounding only, as on a GPU."""

    def trained(*args: Any, **options: Any) -> TrainedReward:
        made = train(*args, **options)
        return replace(made, heads=made.heads * (1 + 1e-6))

    return trained


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize("method", ["dpo", "kto", "ppo"])
def test_a_run_interrupted_after_its_training_is_evaluated_without_training_again(
    labelled: Filled, method: str
) -> None:
    whole = align(labelled.store, config(method))
    assert len(steps_of(labelled, whole, method)) >= 3
    assert kept(labelled) == []

    interrupted(labelled, config(method), stage="answers", step=1)
    assert kept(labelled)
    resumed = align(labelled.store, config(method))
    assert resumed.status == "passed", resumed.message
    assert steps_of(labelled, resumed, method) == []
    assert adapter_of(labelled, resumed) == adapter_of(labelled, whole)
    assert kept(labelled) == []

    def card(outcome: Outcome) -> str:
        """Without the candidate's name and what the run itself took."""
        text = (labelled.store.data / "runs" / outcome.run_id / "report.md").read_text()
        return "\n".join(line for line in text.splitlines() if "learnt from" in line or "steps" in line)

    assert card(resumed) == card(whole)


def test_a_run_that_failed_in_its_evaluation_keeps_what_it_trained(
    labelled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate_candidate", full)
        assert align(labelled.store, config("ppo")).status == "failed"
    resumed = align(labelled.store, config("ppo"))
    assert resumed.status == "passed", resumed.message
    assert steps_of(labelled, resumed, "ppo") == []


def test_a_refused_candidate_is_trained_anew_when_somebody_asks_again(labelled: Filled) -> None:
    strict = config("ppo", gate={**OPEN_GATE, "win_rate_low_min": 1.0})
    for _ in range(2):
        outcome = align(labelled.store, strict)
        assert outcome.status == "refused"
        assert steps_of(labelled, outcome, "ppo")
    assert kept(labelled) == []


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize("method", ["dpo", "kto", "ppo"])
def test_training_goes_on_although_the_reward_model_is_not_made_again_to_the_bit(
    labelled: Filled, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What ranks or scores the answers is what the interrupted run used, and costs no second training."""
    whole = align(labelled.store, config(method))
    interrupted(labelled, config(method), stage=method, step=2)
    trainings = []

    def counted(*args: Any, **options: Any) -> TrainedReward:
        trainings.append(args)
        return train(*args, **options)

    train = rounded_otherwise(together.train_reward_model)
    fit = ranked_answers.fitted_head
    monkeypatch.setattr(together, "train_reward_model", counted)
    monkeypatch.setattr(ranked_answers, "train_reward_model", counted)
    monkeypatch.setattr(
        ranked_answers,
        "fitted_head",
        lambda *args, **options: {name: value * (1 + 1e-6) for name, value in fit(*args, **options).items()},
    )
    resumed = align(labelled.store, config(method))
    assert resumed.status == "passed", resumed.message
    assert steps_of(labelled, resumed, method)[0] > 2
    assert adapter_of(labelled, resumed) == adapter_of(labelled, whole)
    assert len(trainings) == 1, "the judge alone"
    assert kept(labelled) == []


def test_raters_weights_that_round_otherwise_are_the_same_data(
    labelled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a fit on the device too."""
    by_labels = config("dpo", dpo={**SMALL["dpo"], "pairs_from": "labels"})
    whole = align(labelled.store, by_labels)
    interrupted(labelled, by_labels, stage="dpo", step=2)
    weigh = preparation.weighed_by_others

    def nearly(*args: Any, **options: Any) -> Any:
        found = weigh(*args, **options)
        pairs = tuple(replace(pair, weight=pair.weight * (1 + 1e-6)) for pair in found.pairs)
        return replace(found, pairs=pairs)

    monkeypatch.setattr(preparation, "weighed_by_others", nearly)
    resumed = align(labelled.store, by_labels)
    assert resumed.status == "passed", resumed.message
    assert steps_of(labelled, resumed, "dpo")[0] > 2
    assert adapter_of(labelled, resumed) == adapter_of(labelled, whole)


def test_what_nobody_went_on_from_in_a_week_is_dropped_with_all_that_belongs_to_it(labelled: Filled) -> None:
    """The reward model is older than the checkpoint of the training that it belongs to, and stays as long."""
    long = config("ppo", ppo={**asdict(config("ppo").ppo), "steps": 5})
    interrupted(labelled, long, stage="ppo", step=1)
    assert {path.suffix for path in kept(labelled)} == {".pt", ".scorer"}
    long_ago = time.time() - 8 * 24 * 3600
    for path in kept(labelled):
        if path.suffix == ".scorer":
            os.utime(path, (long_ago, long_ago))
    again = interrupted(labelled, long, stage="ppo", step=3)
    assert steps_of(labelled, again, "ppo")[0] == 2
    for path in kept(labelled):
        os.utime(path, (long_ago, long_ago))
    anew = interrupted(labelled, long, stage="ppo", step=1)
    assert steps_of(labelled, anew, "ppo")[0] == 1


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dpo": {"ranked_answers": 4}}, {"dpo": {"ranked_answers": 3}}),
        ({"choice": {"turned_share_min": 0.0, "turned_share_high_min": 0.0}}, {"choice": {}}),
    ],
    ids=["answers to a question", "labels after all"],
)
def test_ppo_takes_no_reward_model_again_that_learnt_from_something_else(
    labelled: Filled, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any]
) -> None:
    def wanted(tables: dict[str, Any]) -> AlignmentConfig:
        plain = asdict(config("ppo"))
        ranked = "ranked" if "dpo" in tables else "auto"
        more = {name: {**plain[name], **table} for name, table in tables.items()}
        return config("ppo", ppo={**plain["ppo"], "reward_from": ranked}, **more)

    loaded: list[Path] = []
    load = stages.load_scorer

    def noted(place: Any, folder: Path) -> TrainedReward:
        loaded.append(folder)
        return load(place, folder)

    monkeypatch.setattr(stages, "load_scorer", noted)
    interrupted(labelled, wanted(before), stage="ppo", step=1)
    interrupted(labelled, wanted(before), stage="ppo", step=2)
    assert len(loaded) == 1
    outcome = align(labelled.store, wanted(after))
    assert outcome.status == "passed", outcome.message
    assert len(loaded) == 1
    assert steps_of(labelled, outcome, "ppo")[0] == 1


def test_a_run_goes_on_after_a_change_of_what_only_costs_time_and_memory() -> None:
    asked = {"batch_tokens": 64}
    assert deciding(DpoConfig(**asked)) == deciding(DpoConfig())
    assert deciding(PpoConfig(sample_batch_tokens=64, **asked)) == deciding(PpoConfig())
    assert deciding(DpoConfig(beta=0.2)) != deciding(DpoConfig())
