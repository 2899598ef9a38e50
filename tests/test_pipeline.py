"""A whole run on a real tiny model, and every way in which it can end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment import preparation, stages
from alignment.config import AlignmentConfig, config_of
from alignment.evaluation import Evidence
from alignment.pipeline import OUTCOME_EXIT_CODES, align, run_folder
from alignment.run_record import new_run
from alignment_fixtures import OPEN_GATE, PAIRS, SMALL, Filled, add_comparisons, open_store
from assistant.engine.behaviour_gate import BehaviourGate
from assistant.engine.local import LocalEngine
from storage import deployments, people, policies, runs
from storage.adapters import verify_adapter
from storage.errors import Busy, NotFound
from storage.people import SYSTEM
from storage.policies import get_policy
from storage.probes import read_probes
from storage.records import Policy
from storage.store import Store

ROOT = Path(__file__).parent.parent


@pytest.fixture
def filled(tmp_path: Path, model: Path, tokenizer: Any) -> Iterator[Filled]:
    made = open_store(tmp_path / "data", model)
    add_comparisons(made, tokenizer, PAIRS)
    yield made
    made.store.close()


def small(**gate: float) -> AlignmentConfig:
    return config_of({**SMALL, "gate": {**OPEN_GATE, **gate}})


def adapters(store: Store) -> list[Policy]:
    return [policy for policy in store.all(Policy) if policy.adapter_sha256 is not None]


def test_a_passed_run_leaves_a_candidate_with_everything_an_operator_needs(
    filled: Filled, model: Path
) -> None:
    outcome = align(filled.store, small())
    assert (outcome.status, outcome.exit_code, outcome.reasons) == ("passed", 0, ())
    assert outcome.policy_id is not None
    candidate = get_policy(filled.store, outcome.policy_id)
    assert (candidate.parent_id, candidate.run_id) == (filled.base.id, outcome.run_id)
    assert policies.standing(filled.store, candidate.id) == "candidate"
    _check_files(filled.store, candidate, outcome.run_id)
    _check_evaluation(filled.store, candidate)
    _check_run(filled.store, outcome.run_id)
    _check_adapter_loads(candidate, model)


def _check_files(store: Store, candidate: Policy, run_id: str) -> None:
    assert candidate.adapter_path is not None
    assert candidate.adapter_sha256 is not None
    verify_adapter(candidate.adapter_path, candidate.adapter_sha256)
    folder = run_folder(store, run_id)
    names = {path.name for path in folder.iterdir()}
    assert {
        "report.md",
        "loss.png",
        "reward.png",
        "kl.png",
        "choice.json",
        "evaluation.json",
        "adapter",
    } <= names
    card = (folder / "report.md").read_text()
    assert card.startswith(f"# {candidate.id}\n")
    assert f"Trained on {PAIRS} pairs, fewer than the 500" in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def _check_evaluation(store: Store, candidate: Policy) -> None:
    evaluation = policies.evaluation_of(store, candidate.id)
    assert evaluation is not None
    assert evaluation.passed
    wins = evaluation.numbers["win_rate_length_controlled"]
    assert 0 <= wins["low"] <= wins["value"] <= wins["high"] <= 1
    assert wins["n"] == 8
    assert evaluation.numbers["kl_per_response_nats"]["threshold"] == 1000
    assert len(evaluation.samples) == 3
    differences = [sample["difference"] for sample in evaluation.samples]
    assert differences == sorted(differences, reverse=True)


def _check_run(store: Store, run_id: str) -> None:
    run = runs.get_run(store, run_id)
    assert run.progress["fraction"] == 1.0
    assert run.cost["wall_s"] > 0
    assert run.cost["cpu_s"] > 0
    assert run.cost["peak_memory_bytes"] > 2**26
    assert run.code_version
    assert config_of(run.config) == small()
    curves = runs.metrics(store, run_id)
    assert len(curves["dpo/loss"]) == 4  # 20 pairs for the policy, 2 or 3 steps of 8 an epoch, 2 epochs
    assert curves["data/pairs"] == [(0, float(PAIRS))]
    snapshot = runs.snapshot_of(store, run_id)
    assert snapshot is not None
    assert snapshot.counts["comparisons"] == PAIRS
    assert len(runs.reward_models_of(store, run_id)) == 1


def _check_adapter_loads(candidate: Policy, model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), candidate.adapter_path)
    asyncio.run(_check_answers_as_recorded(candidate, model))
    changed = [p for name, p in loaded.named_parameters() if "lora_B" in name and bool(p.abs().sum() > 0)]
    assert changed


async def _check_answers_as_recorded(candidate: Policy, model: Path) -> None:
    assert candidate.adapter_path is not None
    adapter = Path(candidate.adapter_path)
    assert read_probes(adapter) is not None
    engine = LocalEngine(str(model), base_name="policy-base-00000000")
    await engine.load(policy_id=candidate.id, adapter=adapter)
    await BehaviourGate(engine).check(candidate.id, adapter)
    await engine.close()


def test_a_judge_without_epochs_is_the_fit_on_the_bases_own_states(filled: Filled) -> None:
    plain = config_of({**SMALL, "gate": OPEN_GATE, "reward": {**SMALL["reward"], "epochs": 0}})
    outcome = align(filled.store, plain)
    assert outcome.status == "passed", outcome.message
    (judge,) = runs.reward_models_of(filled.store, outcome.run_id)
    assert judge.metrics["reward/accuracy"] > 0.9  # kind against curt: the base tells them apart
    assert "reward/loss" not in runs.metrics(filled.store, outcome.run_id)


def test_a_refused_run_says_why_and_its_candidate_cannot_be_approved(filled: Filled) -> None:
    outcome = align(filled.store, small(win_rate_low_min=1.0))
    assert (outcome.status, outcome.exit_code) == ("refused", 3)
    assert len(outcome.reasons) == 1
    assert "not clearly better" in outcome.reasons[0]
    assert outcome.reasons[0] in outcome.message
    assert outcome.policy_id is not None
    assert policies.standing(filled.store, outcome.policy_id) == "refused"


def test_too_few_labels_end_the_run_before_a_model_is_loaded(
    tmp_path: Path, model: Path, tokenizer: Any
) -> None:
    made = open_store(tmp_path / "data", model)
    add_comparisons(made, tokenizer, 10)
    outcome = align(made.store, AlignmentConfig())
    assert (outcome.status, outcome.exit_code) == ("not_enough_data", 4)
    assert "10 comparisons, 0 corrections, 0 ratings are too few: collect 200 comparisons" in outcome.message
    assert adapters(made.store) == []
    made.store.close()


def test_ties_do_not_count_as_pairs(tmp_path: Path, model: Path, tokenizer: Any) -> None:
    made = open_store(tmp_path / "data", model)
    add_comparisons(made, tokenizer, 30)
    add_comparisons(made, tokenizer, 12, start=30, choice="tie")
    outcome = align(made.store, small())
    assert outcome.status == "not_enough_data"
    assert "30 usable pairs of 40 needed: collect 10 more" in outcome.message
    kept = json.loads((run_folder(made.store, outcome.run_id) / "choice.json").read_text())
    assert kept["data"]["pairs"] == 30
    assert kept["choice"]["rule"] == "0: not enough data"
    made.store.close()


def test_nothing_served_is_bad_input_and_opens_no_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(NotFound, match="served policy"):
        align(store, AlignmentConfig())
    assert runs.list_runs(store) == []
    store.close()


def test_a_second_run_is_refused_while_one_is_alive(filled: Filled) -> None:
    runs.open_run(filled.store, new_run(AlignmentConfig(), trigger="cron"))
    with pytest.raises(Busy, match="is under way"):
        align(filled.store, small())


@pytest.mark.parametrize(
    "stage",
    ["check_incumbent", "prepare", "train_judge", "update_policy", "evaluate_candidate", "write_report"],
)
def test_a_stage_that_throws_fails_the_run_with_the_reason(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for name in ("train_judge", "write_report"):
        monkeypatch.setattr(stages, name, lambda *args, **rest: None)
    trained = SimpleNamespace(held="", moved=True)
    monkeypatch.setattr(stages, "update_policy", lambda *args: trained)
    monkeypatch.setattr(stages, "evaluate_candidate", lambda *args: Evidence())
    monkeypatch.setattr(stages, "name_candidate", lambda *args: filled.base)
    monkeypatch.setattr(stages, "publish", lambda *args: pytest.fail("went on"))
    monkeypatch.setattr(stages if hasattr(stages, stage) else preparation, stage, _throw)
    outcome = align(filled.store, small())
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    run = runs.get_run(filled.store, outcome.run_id)
    assert run.message.startswith("MemoryError: the machine is full")
    assert "MemoryError" in (run_folder(filled.store, run.id) / "error.txt").read_text()
    assert adapters(filled.store) == []


def _throw(*args: object, **rest: object) -> None:
    raise MemoryError("the machine is full")


def test_a_changed_base_model_fails_the_run(filled: Filled, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(filled.base.base_path, moved)
    policies.register_base(filled.store, base_path=str(moved), base_sha256=filled.base.base_sha256)
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    outcome = align(filled.store, small())
    assert outcome.status == "failed"
    assert "is no longer the one that is served" in outcome.message


def test_a_run_closed_by_an_operator_ends_as_they_left_it(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = stages.train_judge

    def cancelled_meanwhile(work: Any) -> Any:
        runs.close_run(work.store, work.run.id, status="cancelled", message="not tonight", cost={})
        return train(work)

    monkeypatch.setattr(stages, "train_judge", cancelled_meanwhile)
    outcome = align(filled.store, small())
    assert (outcome.status, outcome.message) == ("cancelled", "not tonight")
    assert adapters(filled.store) == []


def test_a_second_round_continues_from_the_served_adapter(filled: Filled, tokenizer: Any) -> None:
    first = align(filled.store, small())
    assert first.policy_id is not None
    boss = people.add_person(filled.store, name="mori", role="operator", actor=SYSTEM)
    policies.decide(
        filled.store, policy_id=first.policy_id, person_id=boss.id, decision="approve", reason="better"
    )
    deployment = deployments.deploy(
        filled.store, policy_id=first.policy_id, role="stable", share=1, actor=boss.id, reason="better"
    )
    add_comparisons(filled, tokenizer, 4, start=PAIRS, deployment=deployment)
    second = align(filled.store, small())
    assert second.status == "passed"
    assert second.policy_id is not None
    assert get_policy(filled.store, second.policy_id).parent_id == first.policy_id
    evaluation = policies.evaluation_of(filled.store, second.policy_id)
    assert evaluation is not None
    assert evaluation.incumbent_id == first.policy_id
    numbers = evaluation.numbers
    assert numbers["kl_from_base_nats"]["value"] != numbers["kl_per_response_nats"]["value"]


def test_the_same_data_and_seed_give_the_same_candidate(filled: Filled) -> None:
    outcomes = [align(filled.store, small()) for _ in range(2)]
    shas = [get_policy(filled.store, outcome.policy_id or "").adapter_sha256 for outcome in outcomes]
    assert shas[0] == shas[1]


# -- other processes ------------------------------------------------------------------------------------

CHILD = """
import sys, json
from pathlib import Path
from alignment.config import config_of
from alignment.evaluation import Evidence
from alignment.pipeline import align
from storage.store import Store
outcome = align(Store(Path(sys.argv[1])), config_of(json.loads(sys.argv[2])), trigger="labels")
print(outcome.message)
sys.exit(outcome.exit_code)
"""


def start(store: Store, **changes: Any) -> subprocess.Popen[str]:
    config = {**SMALL, "gate": OPEN_GATE, **changes}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.data), json.dumps(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_stage(store: Store, stage: str, child: subprocess.Popen[str], *, step: int = 0) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and child.poll() is None:
        run = runs.running(store)
        if run is not None and run.progress.get("stage") == stage and run.progress.get("step", 0) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"never saw {stage}: {child.communicate()}")


LONG_DPO = {"dpo": {**SMALL["dpo"], "epochs": 40}}


@pytest.mark.slow
def test_a_signal_cancels_cleanly_and_the_next_run_goes_on_from_the_checkpoint(filled: Filled) -> None:
    child = start(filled.store, **LONG_DPO)
    wait_for_stage(filled.store, "dpo", child, step=1)
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == OUTCOME_EXIT_CODES["cancelled"] == 130, errors
    run = runs.list_runs(filled.store)[0]
    assert (run.status, run.trigger) == ("cancelled", "labels")
    assert "stopped on request after" in run.message
    assert run.message in output
    assert adapters(filled.store) == []
    checkpoints = filled.store.data / "cache" / "checkpoints"
    assert len(list(checkpoints.glob("*.pt"))) == 1

    outcome = align(filled.store, config_of({**SMALL, **LONG_DPO, "gate": OPEN_GATE}))
    assert outcome.status == "passed"
    first_step, _ = runs.metrics(filled.store, outcome.run_id)["dpo/loss"][0]
    assert first_step > 1
    assert list(checkpoints.glob("*.pt")) == []


@pytest.mark.slow
def test_a_killed_run_is_marked_failed_by_the_next_start(filled: Filled) -> None:
    child = start(filled.store, **LONG_DPO)
    wait_for_stage(filled.store, "dpo", child)
    child.kill()
    child.communicate()
    left = runs.running(filled.store)
    assert left is not None
    outcome = align(filled.store, small())
    assert outcome.status == "passed"
    killed = runs.get_run(filled.store, left.id)
    assert killed.status == "failed"
    assert killed.message.startswith("the process died")
    assert len(adapters(filled.store)) == 1
