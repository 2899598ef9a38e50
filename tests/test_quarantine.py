"""A policy that a gate refused, or that was withdrawn by itself, is marked with the reason until both gates pass it."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import app
from assistant import release
from assistant.canary_watch import CanaryWatch
from assistant.engine.errors import AdapterRefused, LoadFailed
from assistant.engine.protocol import ProbeResult
from assistant.quarantine import quarantine, quarantine_of
from assistant.shadow_watch import ShadowWatch
from assistant.web.pages.candidate_view import quarantined
from assistant.web.words import Words
from chat_fixtures import Desk, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage import audit, deployments, policies
from storage.errors import CorruptData, NotAllowed, StorageUnavailable
from storage.failures import record_failure
from storage.people import SYSTEM
from storage.records import AuditEvent, Policy
from storage_fixtures import deploy

WRONG_RANK = "rank: got 999; use at most 64"
WORSE = "canary failed: worse than stable"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def reason_of(desk: Desk, policy: Policy) -> str:
    """Return why it is quarantined; "" where it is not."""
    found = quarantine_of(desk.world.store, policy.id)
    return found.reason if found else ""


def events_of(desk: Desk, policy: Policy) -> list[tuple[str, str | None]]:
    """Return marks and their ends, oldest first."""
    found = desk.world.store.all(
        AuditEvent, "subject = ? AND action IN ('policy.quarantined', 'policy.released')", [policy.id], "seq"
    )
    return [(event.action, event.detail.get("reason")) for event in found]


def refusing(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: AdapterRefused | None = None) -> None:
    """Let the engine refuse every adapter."""

    async def refuses(**_: object) -> None:
        raise error or AdapterRefused(WRONG_RANK)

    monkeypatch.setattr(desk.engine, "load", refuses)


def decide(desk: Desk, policy: Policy, **share: float) -> None:
    """Approve on the command line: rows, which a running server follows."""
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better", **share)


def listed(desk: Desk, capsys: pytest.CaptureFixture[str], policy: Policy) -> Any:
    """Return the policy as `kotae policies --json` prints it."""
    capsys.readouterr()
    assert app.main(["policies", "--json", "--data", str(desk.world.store.data)]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["id"] == policy.id]
    return row


def test_a_refusal_by_the_files_gate_is_kept_and_shown(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = candidate(desk, tmp_path)
    assert listed(desk, capsys, policy)["quarantined"] is None
    (Path(str(policy.adapter_path)) / "adapter_model.safetensors").write_bytes(b"something else")
    with pytest.raises(CorruptData) as refusal:
        decide(desk, policy)
    reason = reason_of(desk, policy)
    assert str(refusal.value).startswith(reason.rstrip("…"))  # texts in the audit log are short
    assert listed(desk, capsys, policy)["quarantined"] == reason
    shown = quarantined(Words("en"), quarantine_of(desk.world.store, policy.id))
    assert "Quarantined" in shown
    assert "adapter_model.safetensors" in shown
    assert audit.verify(desk.world.store).ok


def test_a_refusal_by_the_behaviour_gate_is_kept(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)

    async def not_finite(**_: object) -> ProbeResult:
        return ProbeResult(text="!", token_ids=(1,), logprobs=(float("nan"),))

    monkeypatch.setattr(desk.engine, "probe", not_finite)
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            approve(desk, policy)
    assert "non-finite" in reason_of(desk, policy)
    assert len(events_of(desk, policy)) == 1  # the same reason is told once


def test_a_quarantined_policy_that_passes_its_next_approval_is_released(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    with monkeypatch.context() as patch:
        refusing(desk, patch)
        with pytest.raises(AdapterRefused):
            approve(desk, policy)
    approve(desk, policy)
    assert reason_of(desk, policy) == ""
    assert events_of(desk, policy) == [("policy.quarantined", WRONG_RANK), ("policy.released", None)]


def test_an_approval_that_somebody_may_not_give_releases_nothing(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    with monkeypatch.context() as patch:
        refusing(desk, patch)
        with pytest.raises(AdapterRefused):
            approve(desk, policy)
    with pytest.raises(NotAllowed):
        asyncio.run(desk.release.approve(policy_id=policy.id, person=desk.world.staff, reason="please"))
    assert reason_of(desk, policy) == WRONG_RANK


def test_a_withdrawn_policy_is_quarantined_until_the_server_passes_it(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy, canary_percent=10)
    with monkeypatch.context() as patch:
        refusing(desk, patch)
        asyncio.run(desk.release.sync())
    assert reason_of(desk, policy) == WRONG_RANK
    decide(desk, policy, canary_percent=10)
    assert reason_of(desk, policy) == WRONG_RANK  # the command line has no engine to ask
    asyncio.run(desk.release.sync())
    assert reason_of(desk, policy) == ""


@pytest.mark.parametrize(("role", "watch"), [("canary", CanaryWatch), ("shadow", ShadowWatch)])
def test_a_canary_or_shadow_that_a_watch_withdrew_is_quarantined(
    desk: Desk, tmp_path: Path, role: str, watch: type[Any]
) -> None:
    policy = candidate(desk, tmp_path)
    decide(desk, policy, **{f"{role}_percent": 10})
    asyncio.run(desk.release.sync())
    record_failure(desk.world.store, policy_id=policy.id, kind="wrong_policy")
    watch(desk.world.store).look()
    assert f"another policy answered 1 questions in the {role}'s place" in reason_of(desk, policy)


def test_a_way_back_that_keeps_failing_with_other_numbers_is_marked_and_told_once(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is probed at every look, and a refusal names what it measured: a mark each time would fill the audit log."""
    policy, newer = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, policy)
    approve(desk, newer)
    desk.engine.adapters.pop(policy.id)
    logprobs = itertools.count(-9.0, -0.001)

    async def drifts(policy_id: str, _: Path) -> None:
        if policy_id == policy.id:
            raise AdapterRefused(f"position 0: the engine gives token 5 the log-prob {next(logprobs):.4f}")

    monkeypatch.setattr(desk.release.behaviour, "check", drifts)
    for _ in range(4):
        asyncio.run(desk.release.sync())
    assert [action for action, _ in events_of(desk, policy)] == ["policy.quarantined"]
    assert sum("is no way back" in record.message for record in caplog.records) == 1


def test_an_approval_that_the_engine_has_no_memory_for_leaves_no_mark(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    refusing(desk, monkeypatch, LoadFailed("CUDA out of memory"))
    with pytest.raises(LoadFailed):
        approve(desk, policy)
    assert reason_of(desk, policy) == ""


@pytest.mark.parametrize("by", ["the server", "the command line"])
def test_an_approval_before_another_base_leaves_no_mark(desk: Desk, tmp_path: Path, by: str) -> None:
    """Whoever served with another --model erred, not the policy."""
    policy = candidate(desk, tmp_path)
    deploy(
        desk.world, policies.register_base(desk.world.store, base_path="/models/other", base_sha256="0" * 64)
    )
    with pytest.raises(AdapterRefused, match="train on the base served"):
        approve(desk, policy) if by == "the server" else decide(desk, policy)
    assert reason_of(desk, policy) == ""


def test_a_canary_of_another_base_than_is_served_is_taken_back_without_a_mark(
    desk: Desk, tmp_path: Path
) -> None:
    """Its row may have been decided just before the server was started with another --model."""
    policy = candidate(desk, tmp_path)
    policies.decide(
        desk.world.store, policy_id=policy.id, person_id=desk.world.admin.id, decision="approve", reason="ok"
    )
    deploy(
        desk.world, policies.register_base(desk.world.store, base_path="/models/other", base_sha256="0" * 64)
    )
    deployments.deploy(
        desk.world.store, policy_id=policy.id, role="canary", share=0.5, actor=SYSTEM, reason="better"
    )
    asyncio.run(desk.release.sync())
    assert release.serving(desk.world.store).canary is None
    assert "train on the base served" in desk.release.alerts[0]
    assert reason_of(desk, policy) == ""


# -- only a person's decision ends a mark, and the gates after it -------------------------------------------------


def taken_back(desk: Desk, tmp_path: Path) -> Policy:
    """Return a policy that people's verdict took back as the canary, and that is still the way back."""
    policy, newer = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    approve(desk, policy)
    approve(desk, newer)
    decide(desk, policy, canary_percent=50)
    asyncio.run(desk.release.sync())
    release.retire(desk.world.store, policy_id=policy.id, actor=SYSTEM, reason=WORSE)
    quarantine(desk.world.store, policy.id, WORSE)
    asyncio.run(desk.release.sync())
    assert release.serving(desk.world.store).previous is not None
    return policy


def test_an_engine_that_restarted_releases_no_policy(desk: Desk, tmp_path: Path) -> None:
    """The way back is loaded and probed again then: it answers as trained, which is what people judged."""
    policy = taken_back(desk, tmp_path)
    desk.engine.adapters.clear()
    asyncio.run(desk.release.sync())
    assert policy.id in desk.engine.adapters
    assert reason_of(desk, policy) == WORSE


def test_an_approval_on_the_command_line_releases_what_the_server_has_checked_already(
    desk: Desk, tmp_path: Path
) -> None:
    policy = taken_back(desk, tmp_path)
    decide(desk, policy, canary_percent=50)
    asyncio.run(desk.release.sync())
    assert reason_of(desk, policy) == ""
    asyncio.run(desk.release.sync())
    assert [action for action, _ in events_of(desk, policy)] == ["policy.quarantined", "policy.released"]


def test_a_way_back_that_the_server_takes_by_itself_releases_nothing(desk: Desk, tmp_path: Path) -> None:
    policy = taken_back(desk, tmp_path)
    deployments.deploy(
        desk.world.store, policy_id=policy.id, role="stable", share=1.0, actor=SYSTEM, reason="a way back"
    )
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == policy.id
    assert reason_of(desk, policy) == WORSE


def test_an_approval_whose_release_cannot_be_written_is_no_failed_step(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    quarantine(desk.world.store, policy.id, WORSE)

    def full(*_: object) -> None:
        raise StorageUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("assistant.release.lift", full)
        approve(desk, policy)
    assert answered_by(desk) == policy.id
    assert "the disk is full" in desk.release.trouble.why
    asyncio.run(desk.release.sync())
    assert reason_of(desk, policy) == ""
