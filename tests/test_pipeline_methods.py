"""A whole run by each method that is not DPO on comparisons: thumbs, PPO, corrections alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment import kl_hold, ppo
from alignment.config import AlignmentConfig, config_of
from alignment.kl_budget import Kl
from alignment.outcome import recorded_outcome
from alignment.pipeline import Outcome, align, run_folder
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
from storage import deployments, feedback, people, policies, runs
from storage.errors import InvalidField
from storage.people import SYSTEM
from storage.records import Policy
from storage.store import Store

LABELS = 48


def config(**tables: Any) -> AlignmentConfig:
    choice = {**SMALL["choice"], "min_thumbs": 40, "min_corrections": 20, **tables.pop("choice", {})}
    kto = {"batch_thumbs": 8, "epochs": 1, "min_class_thumbs": 4} | NO_KL_BUDGETS
    ppo = {"steps": 2, "prompts_per_step": 8, "max_new_tokens": 8, "minibatches": 1, "epochs": 1}
    return config_of({**SMALL, "gate": OPEN_GATE, "choice": choice, "kto": kto, "ppo": ppo, **tables})


def chosen(store: Store, outcome: Outcome) -> dict[str, Any]:
    kept = json.loads((run_folder(store, outcome.run_id) / "choice.json").read_text())
    return dict(kept["choice"])


def curves(store: Store, outcome: Outcome) -> set[str]:
    return set(runs.metrics(store, outcome.run_id))


def test_thumbs_alone_train_by_kto_and_are_judged_by_thumbs(filled: Filled, tokenizer: Any) -> None:
    rate_all(filled, add_answers(filled, tokenizer, LABELS, (KIND, CURT)), ("up", "down"))
    outcome = align(filled.store, config())
    assert outcome.status == "passed", outcome.message
    assert chosen(filled.store, outcome)["rule"].startswith("3")
    assert {"kto/loss", "kto/accuracy", "kto/kl_nats"} <= curves(filled.store, outcome)
    assert outcome.policy_id is not None
    evaluation = policies.evaluation_of(filled.store, outcome.policy_id)
    assert evaluation is not None
    for name in ("judge_accuracy", "preference_accuracy"):
        assert evaluation.numbers[name]["n"] > 0
    report = (run_folder(filled.store, outcome.run_id) / "report.md").read_text()
    assert "kto, beta 0.1" in report
    assert re.search(r"It learnt from people's labels: only \d+ of \d+ questions got two different", report)


@pytest.mark.usefixtures("whole_answers")
def test_kto_ranks_answers_to_questions_without_a_label_too(filled: Filled, tokenizer: Any) -> None:
    turns = add_answers(filled, tokenizer, LABELS + 60, (KIND, CURT))
    rate_all(filled, turns[60:], ("up", "down"))
    outcome = align(filled.store, config())
    assert outcome.status == "passed", outcome.message
    report = (run_folder(filled.store, outcome.run_id) / "report.md").read_text()
    told = re.search(
        r"It learnt from (\d+) of its own answers, the best and the worst of 4 to a question", report
    )
    assert told is not None
    assert int(told[1]) > 2 * (0.4 * LABELS + 10), (
        "of 0.4 labelled questions and about thirty without a label"
    )


@pytest.mark.usefixtures("whole_answers")
@pytest.mark.parametrize(
    ("method", "curve", "learnt"),
    [("dpo", "dpo/loss", ""), ("ppo", "objective/score", "PPO's reward model: ")],
)
def test_noisy_comparisons_train_on_ranked_answers(
    filled: Filled, tokenizer: Any, method: str, curve: str, learnt: str
) -> None:
    for number in range(4):  # of four people, each of whom chooses the other side every third time
        rater = people.add_person(filled.store, name=f"rater {number}", role="reviewer", actor=SYSTEM)
        for start in range(12 * number, 12 * number + 12):
            answers = (CURT, KIND) if start % 3 == 0 else (KIND, CURT)
            add_comparisons(filled, tokenizer, 1, start=start, rater=rater, answers=answers)
    outcome = align(filled.store, config(method=method, choice={"turned_share_high_min": 0.1}))
    assert outcome.status == "passed", outcome.message
    choice = chosen(filled.store, outcome)
    assert "of the pairs are turned round" in choice["ranked_because"]
    assert choice["ranked_because"] in choice["warnings"]
    report = (run_folder(filled.store, outcome.run_id) / "report.md").read_text()
    assert re.search(
        rf"turned round.* {learnt}It learnt from \d+ pairs of its own answers, the best against the worst of 4",
        report,
    )
    assert curve in curves(filled.store, outcome)


def test_ppo_optimises_a_reward_model_that_is_not_the_judge(filled: Filled, tokenizer: Any) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    outcome = align(filled.store, config(method="ppo"))
    assert outcome.status == "passed", outcome.message
    named = {"objective/score", "ppo/beta", "value/loss", "objective/kl_from_base_nats"}
    assert named <= curves(filled.store, outcome)
    report = (run_folder(filled.store, outcome.run_id) / "report.md").read_text()
    assert "ppo, beta automatic at first" in report
    assert "its own answers" not in report


def watched(monkeypatch: pytest.MonkeyPatch, looks: list[str | None]) -> None:
    """Let PPO's watch say this, step by step."""
    said = iter(looks)
    monkeypatch.setattr(ppo, "why_stop", lambda *_: next(said))


def test_ppo_that_stops_itself_hands_its_last_good_weights_to_the_gate(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    watched(monkeypatch, [None, None, "answers run away"])
    outcome = align(filled.store, config(method="ppo"))
    assert outcome.status == "passed", outcome.message
    assert (
        "stopped itself after 2 steps: answers run away. The candidate is the last policy" in outcome.message
    )
    assert outcome.policy_id is not None
    assert policies.evaluation_of(filled.store, outcome.policy_id) is not None
    report = (run_folder(filled.store, outcome.run_id) / "report.md").read_text()
    assert "stopped itself after 2 steps: answers run away." in report


def test_ppo_that_stops_itself_before_anything_was_good_fails_with_the_reason(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    watched(monkeypatch, [None, "answers run away"])
    outcome = align(filled.store, config(method="ppo"))
    assert (outcome.status, outcome.policy_id) == ("failed", None)
    assert "training stopped itself after 1 steps: answers run away" in outcome.message


def test_ppo_asks_the_server_that_its_configuration_names(filled: Filled, tokenizer: Any) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    outcome = align(filled.store, config(method="ppo", ppo={"rollout_url": "http://127.0.0.1:9"}))
    assert outcome.status == "failed"
    assert "rollout server: /v1/load_lora_adapter failed" in outcome.message


def test_labels_on_a_former_policy_wait_for_a_reward_model_that_is_good_enough(
    filled: Filled, tokenizer: Any
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    first = align(filled.store, config())
    serve(filled, str(first.policy_id))
    former = {"recent_policies": 1, "ppo_min_labels": 20}
    weak = align(filled.store, config(choice={**former, "reward_accuracy_low_min": 1.0}))
    assert (weak.status, weak.exit_code) == ("not_enough_data", 4)
    assert "The reward model is too weak for PPO" in weak.message
    assert "collect fresh A/B answers" in weak.message
    assert chosen(filled.store, weak)["rule"].startswith("4")
    trusted = {"reward_accuracy_low_min": 0.0, "reward_lead_min": 0.0, "reward_calibration_error_max": 1.0}
    good = align(filled.store, config(choice={**former, **trusted}))
    assert good.status == "passed", good.message
    assert chosen(filled.store, good)["rule"].startswith("1")
    assert "objective/score" in curves(filled.store, good)


def serve(filled: Filled, policy_id: str) -> None:
    operator = people.add_person(filled.store, name="op", role="operator", actor=SYSTEM)
    policies.decide(
        filled.store, policy_id=policy_id, person_id=operator.id, decision="approve", reason="better"
    )
    deployments.deploy(
        filled.store, policy_id=policy_id, role="stable", share=1, actor=SYSTEM, reason="approved"
    )


def test_a_run_that_begins_beyond_the_budget_from_the_base_says_so_and_may_end_without_a_candidate(
    filled: Filled, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    serve(filled, str(align(filled.store, config()).policy_id))
    # 3 nats from the base at the beginning, and at every measurement after it as far or farther
    distances = iter([3.0, 3.0, 3.0, *range(3, 100)])
    monkeypatch.setattr(
        kl_hold,
        "kl_per_response",
        lambda *_, **__: Kl(from_reference=0.1, from_base=float(next(distances))),
    )
    bounded = config(dpo={**SMALL["dpo"], "epochs": 1, "kl_base_budget_nats": 2.0, "kl_every": 1})
    changed = align(filled.store, bounded)
    assert changed.status == "passed", changed.message
    assert "already 3 nats from the base model's, and training may take them to 2 (dpo." in changed.message
    assert "already 3 nats" in (run_folder(filled.store, changed.run_id) / "report.md").read_text()
    known = filled.store.all(Policy)
    stayed = align(filled.store, bounded)
    assert (stayed.status, stayed.exit_code, stayed.policy_id) == ("refused", 3, None)
    assert stayed.message.startswith("No candidate was made, and the served policy stays")
    assert filled.store.all(Policy) == known
    assert recorded_outcome(filled.store, runs.get_run(filled.store, stayed.run_id)) == stayed


def test_corrections_alone_train_with_a_supervised_term(filled: Filled, tokenizer: Any) -> None:
    for turn in add_answers(filled, tokenizer, LABELS, (CURT,)):
        feedback.correct(filled.store, turn_id=turn.id, person_id=filled.person.id, edited=KIND)
    outcome = align(filled.store, config())
    assert outcome.status == "passed", outcome.message
    assert chosen(filled.store, outcome)["rule"].startswith("5")
    nll = runs.metrics(filled.store, outcome.run_id)["dpo/nll_weight"]
    assert {value for _, value in nll} == {1.0}


def adapter_config(store: Store, outcome: Outcome) -> dict[str, Any]:
    folder = Path(str(policies.get_policy(store, str(outcome.policy_id)).adapter_path))
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def test_the_chosen_method_gives_the_adapter_its_shape_unless_a_served_one_has(
    filled: Filled, tokenizer: Any
) -> None:
    rate_all(filled, add_answers(filled, tokenizer, LABELS, (KIND, CURT)), ("up", "down"))
    kto = {"batch_thumbs": 8, "epochs": 1, "min_class_thumbs": 4} | NO_KL_BUDGETS
    shaped = {**kto, "lora": {"rank": 4, "alpha": 12, "targets": ["q_proj", "v_proj"]}}
    chosen_by_rule, asked_for = (
        align(filled.store, config(method=method, kto=shaped)) for method in ("auto", "kto")
    )
    found = adapter_config(filled.store, chosen_by_rule)
    assert (found["r"], found["lora_alpha"], found["target_modules"]) == (4, 12, ["q_proj", "v_proj"])
    one, other = (
        policies.get_policy(filled.store, str(outcome.policy_id)).adapter_sha256
        for outcome in (chosen_by_rule, asked_for)
    )
    assert one == other, "as if the method had been asked for"
    serve(filled, str(chosen_by_rule.policy_id))
    second = align(filled.store, config(kto={**kto, "lora": {"rank": 8}}))
    assert second.status == "passed", second.message
    assert adapter_config(filled.store, second)["r"] == 4


def test_a_method_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidField, match="method: got 'sft'"):
        config(method="sft")
