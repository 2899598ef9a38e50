"""What the command line answers to data and machines that a run cannot work with, and what is left behind."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import app
from alignment import models, report, reward_model, together, training
from alignment.config import AlignmentConfig
from alignment.failures import explain
from alignment.reference_cache import ReferenceCache
from alignment.run_record import new_run
from alignment.whole_files import whole
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
from storage import adapters, deployments, people, policies, runs
from storage.adapters import import_adapter, verify_adapter
from storage.errors import StorageUnavailable
from storage.people import SYSTEM
from storage.records import Evaluation, Policy, Run, new_id, now
from storage.store import Transaction
from tiny_models import make_adapter

LABELS = 48
CONFIG: dict[str, Any] = {
    **SMALL,
    "choice": {**SMALL["choice"], "min_thumbs": 40, "min_corrections": 20},
    "kto": {"batch_thumbs": 8, "epochs": 1, "min_class_thumbs": 4, **NO_KL_BUDGETS},
    "dpo": {**SMALL["dpo"], "epochs": 1},
    "reward": {**SMALL["reward"], "epochs": 1},
    "gate": OPEN_GATE,
}


@pytest.fixture
def align(filled: Filled, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `kotae align` and return its exit code and what it printed, after checking that nothing is half written."""

    def command(*options: str, **tables: Any) -> tuple[int, str]:
        path = filled.store.data / "config.toml"
        path.write_text(toml({**CONFIG, **tables}))
        code = app.main(["align", "--data", str(filled.store.data), "--config", str(path), *options])
        printed = capsys.readouterr()
        check_nothing_half_written(filled, code)
        return code, printed.out + printed.err

    return command


def toml(config: dict[str, Any]) -> str:
    """Write plain values and one level of tables."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in config.items() if not isinstance(value, dict)]
    tables = [
        "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
        for name, table in config.items()
        if isinstance(table, dict)
    ]
    return "\n".join([*plain, *tables])


def check_nothing_half_written(filled: Filled, code: int) -> None:
    """What is there is whole, and a candidate is known only when the run judged one."""
    data = filled.store.data
    assert list(data.rglob(".new-*")) == []
    assert list(data.rglob(".incoming-*")) == []
    for folder in (data / "adapters").glob("*"):
        verify_adapter(folder, folder.name)
    for policy in filled.store.all(Policy, "run_id IS NOT NULL"):
        assert policies.evaluation_of(filled.store, policy.id) is not None
    if code not in (0, 3):
        assert [policy for policy in filled.store.all(Policy) if policy.run_id] == []


# -- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "kto"])
def test_one_class_of_thumbs_is_not_enough_and_the_other_is_asked_for(
    filled: Filled, tokenizer: Any, align: Any, method: str
) -> None:
    rate_all(filled, add_answers(filled, tokenizer, LABELS, (KIND, CURT)), ("up",))
    code, printed = align("--method", method)
    assert code == 4
    assert "point down" in printed
    assert "mark such answers too" in printed


def test_a_rare_class_that_the_division_leaves_short_is_not_enough(
    filled: Filled, tokenizer: Any, align: Any
) -> None:
    rate_all(filled, add_answers(filled, tokenizer, LABELS, (KIND, CURT)), ("up",) * 7 + ("down",))
    code, printed = align()  # 6 of 48 are a tenth, but a third of the prompts trains the policy
    assert code == 4
    assert "(4 needed, kto.min_class_thumbs)" in printed


def test_ties_alone_are_not_enough(filled: Filled, tokenizer: Any, align: Any) -> None:
    add_comparisons(filled, tokenizer, LABELS, choice="tie")
    code, printed = align()
    assert code == 4
    assert "0 usable pairs of 40 needed: collect 40 more" in printed


def test_two_answers_without_a_word_are_told_apart_from_missing_ones(
    filled: Filled, tokenizer: Any, align: Any
) -> None:
    add_comparisons(filled, tokenizer, LABELS, answers=(KIND, ""))  # an end-of-sequence token alone
    code, printed = align()
    assert code == 0, printed
    assert "passed its gate" in printed


def test_equal_empty_answers_are_not_enough_and_counted(filled: Filled, tokenizer: Any, align: Any) -> None:
    add_comparisons(filled, tokenizer, LABELS, answers=("", ""), choice="left")
    code, printed = align()
    assert code == 4
    assert f"Not usable: {LABELS} the two answers are the same." in printed


def test_answers_over_the_context_are_left_out_and_counted(
    filled: Filled, tokenizer: Any, align: Any
) -> None:
    add_comparisons(filled, tokenizer, LABELS, answers=(KIND, 40 * KIND))
    code, printed = align()
    assert code == 4
    assert (
        f"Not usable: {LABELS} longer than 256 tokens (data.max_tokens, or the model's context)." in printed
    )


# -- raters ---------------------------------------------------------------------------------------------


def test_a_malicious_rater_is_left_out_and_named_and_a_single_label_does_no_harm(
    filled: Filled, tokenizer: Any, align: Any
) -> None:
    counts = {"ben": 20, "cho": 20, "dee": 20, "mallory": 20, "once": 1}
    begin = 0
    for name, count in counts.items():
        rater = people.add_person(filled.store, name=name, role="reviewer", actor=SYSTEM)
        answers = (CURT, KIND) if name == "mallory" else (KIND, CURT)
        add_comparisons(filled, tokenizer, count, start=begin, rater=rater, answers=answers)
        begin += count
    code, printed = align()
    assert code == 0, printed
    said = "Rater mallory disagrees with everyone else: "
    assert said in printed
    assert printed.count("disagrees with everyone else") == 1
    (run,) = filled.store.all(Run)
    assert said in run.message
    folder = filled.store.data / "runs" / run.id
    card = (folder / "report.md").read_text()
    assert f"- Warning: {said}" in card
    assert "- Dropped: 20 labels, of a rater who contradicts the others." in card
    data = json.loads((folder / "choice.json").read_text())["data"]
    assert data["rater_weights"]["mallory"] == 0
    assert data["rater_weights"]["once"] > 0.5
    assert data["rater_reliability"]["mallory"]["high"] < 0.5
    assert (data["pairs"], data["raters"]) == (61, 4)


# -- adapters -------------------------------------------------------------------------------------------


def test_a_served_adapter_with_nan_fails_and_says_to_roll_back(
    filled: Filled, model: Path, tmp_path: Path, tokenizer: Any, align: Any
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(tmp_path / "adapter", model)
    weights = load_file(str(folder / "adapter_model.safetensors"))
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    serve(filled, folder)
    add_comparisons(filled, tokenizer, LABELS)
    code, printed = align()
    assert code == 1
    assert "a weight is not a finite number; roll back to a policy before" in printed


def serve(filled: Filled, folder: Path) -> None:
    """Deploy an adapter as if nobody had looked at it."""
    stored = import_adapter(filled.store.data, folder)
    policy = replace(
        filled.base,
        id="policy-broken",
        adapter_path=str(stored.path),
        adapter_sha256=stored.sha256,
        parent_id=filled.base.id,
    )
    run = new_run(AlignmentConfig(), trigger="manual")
    runs.open_run(filled.store, run)
    runs.close_run(filled.store, run.id, status="passed", message="unseen", cost={})
    evaluation = Evaluation(
        id=new_id("evaluation"),
        run_id=run.id,
        policy_id=policy.id,
        incumbent_id=filled.base.id,
        numbers={},
        samples=[],
        passed=True,
        reasons=[],
        created_at=now(),
    )
    policies.add_policy(filled.store, policy, evaluation)
    boss = people.add_person(filled.store, name="boss", role="operator", actor=SYSTEM)
    policies.decide(filled.store, policy_id=policy.id, person_id=boss.id, decision="approve", reason="unseen")
    deployments.deploy(
        filled.store, policy_id=policy.id, role="stable", share=1, actor=boss.id, reason="unseen"
    )


# -- the machine ----------------------------------------------------------------------------------------


def full_after(write: Callable[..., Any]) -> Callable[..., Any]:
    """Return the write that first does its work and then finds the disk full, as the last bytes would."""

    def fails(*args: Any, **rest: Any) -> Any:
        write(*args, **rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    return fails


WRITES: dict[str, tuple[Any, str]] = {
    "the choice": (json, "dumps"),
    "the reward model's heads": (reward_model, "save_file"),
    "the reference log-probs": (ReferenceCache, "put"),
    "a checkpoint": (training.torch, "save"),
    "the adapter": (models, "save_file"),
    "the card": (report, "markdown"),
    "the stored adapter": (adapters, "_copy_synced"),
}


@pytest.mark.parametrize("place", WRITES)
def test_a_full_disk_fails_the_run_and_leaves_nothing_half_written(
    filled: Filled, tokenizer: Any, align: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    owner, name = WRITES[place]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, full_after(real))
    if place == "the choice":  # json is used everywhere: fail where it belongs to the file alone
        monkeypatch.undo()
        write = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, text, **k: (full_after(write) if "choice" in path.name else write)(path, text, **k),
        )
    code, printed = align()
    assert code == 1
    assert "No space left on device" in printed
    assert "is full: free some space there and run again" in printed
    assert runs.list_runs(filled.store)[0].status == "failed"


def test_a_full_disk_at_the_last_write_leaves_no_candidate_without_evidence(
    filled: Filled, tokenizer: Any, align: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    insert = Transaction.insert

    def full(changes: Transaction, record: Any) -> None:
        if isinstance(record, Evaluation):
            raise StorageUnavailable("the data cannot be read or written: database or disk is full")
        insert(changes, record)

    monkeypatch.setattr(Transaction, "insert", full)
    code, printed = align()
    assert code == 1
    assert "free some space there and run again" in printed


def test_a_disk_so_full_that_the_end_cannot_be_recorded_is_still_told(
    filled: Filled, tokenizer: Any, align: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_comparisons(filled, tokenizer, 3)

    def full(*args: Any, **rest: Any) -> None:
        raise StorageUnavailable("the data cannot be read or written: database or disk is full")

    monkeypatch.setattr(runs, "close_run", full)
    code, printed = align()
    assert code == 1
    assert "The end of the run could not be recorded" in printed
    assert "free some space" in printed


@pytest.mark.parametrize("kind", ["python", "torch"])
def test_too_little_memory_fails_the_run_and_says_what_to_lower(
    filled: Filled, tokenizer: Any, align: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import torch

    def hungry(*args: Any, **rest: Any) -> Any:
        if kind == "python":
            raise MemoryError
        return torch.empty(2**55)

    add_comparisons(filled, tokenizer, LABELS)
    monkeypatch.setattr(together, "train_dpo", hungry)
    code, printed = align()
    assert code == 1
    assert "There is too little memory: lower dpo.batch_tokens" in printed


def test_one_process_has_nobody_to_share_the_base_with(filled: Filled, align: Any) -> None:
    code, printed = align(shard_base=True)
    assert code == 2
    assert "shard_base: got True; one process has nobody to share the base with: set launcher to" in printed
    assert runs.list_runs(filled.store) == []


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_trained(
    filled: Filled, tokenizer: Any, align: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    add_comparisons(filled, tokenizer, LABELS)
    monkeypatch.setattr("alignment.memory.available_bytes", lambda device: 20 * 2**20)
    code, printed = align(method=method)
    assert code == 1
    assert "needs" in printed
    assert "GiB are available" in printed
    (run,) = runs.list_runs(filled.store)
    assert run.status == "failed"
    folder = filled.store.data / "runs" / run.id
    assert [path.name for path in folder.iterdir()] == ["error.txt"]


def test_a_file_or_folder_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    file, folder = tmp_path / "card.md", tmp_path / "adapter"
    with whole(file) as aside:
        aside.write_text("first")
    with whole(folder) as aside:
        aside.mkdir()
        (aside / "old").write_text("old")
    for target in (file, folder):
        with pytest.raises(OSError, match="full"):
            half_write(target, into_folder=target is folder)
    assert file.read_text() == "first"
    assert [path.name for path in folder.iterdir()] == ["old"]
    with whole(folder) as aside:
        aside.mkdir()
    assert sorted(tmp_path.iterdir()) == [folder, file]
    assert list(folder.iterdir()) == []


def half_write(target: Path, *, into_folder: bool) -> None:
    with whole(target) as aside:
        if into_folder:
            aside.mkdir()
        (aside / "new" if into_folder else aside).write_text("half")
        raise OSError("full")


def write_checkpoint_to_full_disk(weights: Any) -> None:
    with Path("/dev/full").open("wb") as file:
        training.torch.save({"x": weights}, file)


def test_a_full_disk_is_recognised_in_the_words_of_each_library(tmp_path: Path) -> None:
    import torch
    from safetensors import SafetensorError

    for write in (
        lambda: Path("/dev/full").write_text("x"),
        lambda: torch.save({"x": torch.zeros(10_000)}, "/dev/full"),
        lambda: write_checkpoint_to_full_disk(torch.zeros(1_000_000)),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            write()
        assert "is full: free some space" in explain(caught.value, tmp_path), caught.value
    # safetensors writes aside and renames: it would put a plain file in the place of /dev/full
    theirs = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "is full: free some space" in explain(theirs, tmp_path)
    assert explain(ValueError("odd"), tmp_path) == "ValueError: odd"
