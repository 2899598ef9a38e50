"""What is decided and does not answer yet is told as that, with the reason; what was put right is told no more."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

import app
from assistant import release
from assistant.alerts import FAILED_SYNCS
from assistant.engine.errors import AdapterRefused, EngineBusy, EngineStarting, EngineUnavailable, LoadFailed
from assistant.engine.protocol import ProbeResult
from assistant.in_effect import NOTED
from assistant.web.pages.candidates_page import CandidatesPage
from assistant.web.pages.frame import Frame
from assistant.web.pages.served_page import ServedPage
from assistant.web.services import Services
from assistant.web.words import Words
from chat_fixtures import Desk, make_desk, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage import settings
from storage.records import Policy
from storage.runs import NextRun

AWAY = "no memory for it"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def page_of(desk: Desk, kind: type[Any]) -> Any:
    """Return a built page of the operators over this desk."""
    services = Services(
        store=desk.world.store,
        engine=desk.engine,
        release=desk.release,
        chat=desk.chat,
        launch_run=lambda trigger, person: None,
        next_run=lambda: NextRun(kind="never"),
        model_name="fake",
    )
    page = kind(Frame(services=services, words=Words("en"), app="operator", role="operator"))

    async def build() -> None:
        with gr.Blocks() as blocks, gr.Tab() as tab:
            page.build(blocks, tab)

    asyncio.run(build())  # outside a running loop Gradio makes one that it never closes
    return page


def asked_by(desk: Desk) -> Any:
    return SimpleNamespace(username=desk.world.admin.id)


def cut_off(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Let the engine load nothing from now on."""

    async def refuses(**_: object) -> None:
        raise error or EngineUnavailable(AWAY)

    monkeypatch.setattr(desk.engine, "load", refuses)


def follow(desk: Desk, times: int = 1) -> None:
    """Let the server try to follow what was decided, as it does each second until it succeeds."""
    for _ in range(times):
        asyncio.run(desk.release.try_sync())


def status(desk: Desk, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what `kotae status --json` prints."""
    capsys.readouterr()
    assert app.main(["status", "--json", "--data", str(desk.world.store.data)]) == 0
    return json.loads(capsys.readouterr().out)["not_answering_yet"]


# -- what is decided is not what answers ----------------------------------------------------------------------


def test_an_approval_whose_load_keeps_failing_is_shown_as_decided_and_not_answering(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(desk)
    assert status(desk, capsys) == []
    policy = candidate(desk, tmp_path)
    cut_off(desk, monkeypatch)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
    follow(desk)
    assert answered_by(desk) == desk.world.base.id
    page = page_of(desk, ServedPage)
    shown = page.refresh(asked_by(desk))[page.now]
    assert f"{policy.id} is decided as stable and does not answer yet: {AWAY}" in shown
    assert f"Until then {desk.world.base.id} answers" in shown
    assert "100%" not in shown
    assert status(desk, capsys) == [{"policy": policy.id, "role": "stable", "reason": AWAY}]


def test_what_answers_is_shown_without_a_note(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=10)
    page = page_of(desk, ServedPage)
    shown = page.refresh(asked_by(desk))[page.now]
    assert "does not answer yet" not in shown
    assert "90%" in shown
    assert status(desk, capsys) == []


def test_before_any_server_followed_the_status_claims_nothing(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(desk, capsys) == []


def test_a_decision_that_no_server_follows_is_not_said_to_answer(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(desk)
    policy = candidate(desk, tmp_path)
    release.approve(
        desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better", canary_percent=10
    )
    (waiting,) = status(desk, capsys)
    assert (waiting["policy"], waiting["role"]) == (policy.id, "canary")


def test_a_shadow_that_is_not_loaded_is_told_too(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = candidate(desk, tmp_path)
    cut_off(desk, monkeypatch)
    release.approve(
        desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="a look", shadow_percent=10
    )
    follow(desk)  # it answers nobody, so the rest is in effect
    assert status(desk, capsys) == [{"policy": policy.id, "role": "shadow", "reason": AWAY}]


def test_a_canary_that_a_restarted_engine_cannot_load_for_now_is_told(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=50)
    desk.engine.adapters.clear()
    cut_off(desk, monkeypatch, LoadFailed(AWAY))
    follow(desk)
    assert status(desk, capsys) == [{"policy": policy.id, "role": "canary", "reason": AWAY}]


def started_again(desk: Desk, tmp_path: Path) -> tuple[Desk, Policy]:
    """Return the desk of a server that starts after one whose stable policy has answered, and that policy."""
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    assert answered_by(desk) == policy.id
    return make_desk(desk.world.store.data, world=desk.world), policy


def test_what_answered_before_a_start_is_not_said_to_wait_for_its_probes(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again, policy = started_again(desk, tmp_path)

    async def busy(**_: object) -> ProbeResult:
        raise EngineBusy("full")

    monkeypatch.setattr(again.engine, "probe", busy)
    follow(again)
    assert answered_by(again) == policy.id
    assert status(again, capsys) == []


def test_before_an_engine_that_is_away_a_start_claims_no_answer(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, policy = started_again(desk, tmp_path)
    again.engine.closed = True
    follow(again)
    assert [row["policy"] for row in status(again, capsys)] == [policy.id]


# -- trouble that lasts is an alert -----------------------------------------------------------------------------


def test_trouble_that_lasts_becomes_an_alert_and_ends_with_it(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    with monkeypatch.context() as patch:
        cut_off(desk, patch)
        release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
        follow(desk, FAILED_SYNCS - 1)
        assert desk.release.alerts == []
        follow(desk, 2)
        (alert,) = desk.release.alerts
        assert AWAY in alert
    follow(desk)
    assert desk.release.alerts == []
    assert answered_by(desk) == policy.id


def test_another_cause_of_the_same_kind_is_logged(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
    with caplog.at_level(logging.INFO):
        for cause in (AWAY, AWAY, "the disk is full", "the disk is full"):
            cut_off(desk, monkeypatch, EngineUnavailable(cause))
            follow(desk)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [AWAY, "the disk is full"]


def boots_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine say that it is being started, each time a second later."""
    seconds = itertools.count(1)

    async def starting() -> frozenset[str]:
        raise EngineStarting(f"the model is starting (weights, {next(seconds)} s); ask again in a moment")

    monkeypatch.setattr(desk.engine, "loaded", starting)


def test_an_engine_that_starts_for_long_becomes_an_alert_that_is_told_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A boot that times out is tried again, which is a boot again: without this nobody would ever hear of it."""
    with monkeypatch.context() as patch:
        boots_for_ever(desk, patch)
        follow(desk, 2 * FAILED_SYNCS)
        assert desk.release.alerts == []
        patch.setattr("assistant.alerts.LONG_START_S", 0.0)
        follow(desk, 3)
    assert ["being started" in alert for alert in desk.release.alerts] == [True]
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 1
    follow(desk)
    assert desk.release.alerts == []


def test_an_engine_that_starts_is_noted_once_and_not_each_second(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    boots_for_ever(desk, monkeypatch)
    follow(desk)
    noted = settings.get(desk.world.store, NOTED)
    follow(desk, 3)
    assert settings.get(desk.world.store, NOTED) == noted
    assert "4 s" in desk.release.trouble.why  # the page, which asks the server, has the latest


# -- a step that happened is no error -----------------------------------------------------------------------------


def test_a_step_on_the_page_that_the_engine_cannot_follow_yet_is_told_as_done(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=10)
    page, request = page_of(desk, ServedPage), asked_by(desk)

    async def silent() -> set[str]:
        raise EngineUnavailable(AWAY)

    for step, told in (
        (page.on_promote, f"{policy.id} now answers everybody"),
        (page.on_rollback, f"Rolled back: {desk.world.base.id} answers everybody"),
    ):
        seen = page.refresh(request)[page.seen]
        with monkeypatch.context() as patch:
            patch.setattr(desk.engine, "loaded", silent)
            message = asyncio.run(step("why not", seen, request))[page.message]
        assert told in message
        assert AWAY in message


def test_an_approval_on_the_page_that_the_engine_cannot_follow_yet_is_told_as_done(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    page, request = page_of(desk, CandidatesPage), asked_by(desk)

    async def silent() -> set[str]:
        raise EngineUnavailable(AWAY)

    monkeypatch.setattr(desk.engine, "loaded", silent)
    message = asyncio.run(page.on_approve(policy.id, "better", "canary", 10, request))[page.message]
    assert policy.id in message
    assert AWAY in message
    assert release.serving(desk.world.store).canary is not None


# -- alerts end ---------------------------------------------------------------------------------------------------


def test_a_policy_that_was_put_right_is_no_alert_any_more(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    with monkeypatch.context() as patch:
        cut_off(desk, patch, AdapterRefused("rank: got 999; use at most 64"))
        release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
        follow(desk, 3)
        assert len(desk.release.alerts) == 2  # withdrawn, and no way back
        page = page_of(desk, ServedPage)
        assert page.refresh(asked_by(desk))[page.alerts].count("<time") == 2
    follow(desk)  # it is the policy before, and can be loaded again; nobody has decided on it since
    assert ["was withdrawn" in alert for alert in desk.release.alerts] == [True]
    approve(desk, policy)
    assert desk.release.alerts == []


def test_what_is_no_way_back_any_more_is_no_alert(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = candidate(desk, tmp_path, 1), candidate(desk, tmp_path, 2)
    load = desk.engine.load

    async def refuses(*, policy_id: str, adapter: Path) -> None:
        if policy_id == bad.id:
            raise AdapterRefused("rank: got 999; use at most 64")
        await load(policy_id=policy_id, adapter=adapter)

    monkeypatch.setattr(desk.engine, "load", refuses)
    release.approve(desk.world.store, policy_id=bad.id, person=desk.world.admin, reason="better")
    follow(desk, 2)
    assert any("no way back" in alert for alert in desk.release.alerts)
    approve(desk, good)  # the way back is the base now
    assert [("withdrawn" in alert, "no way back" in alert) for alert in desk.release.alerts] == [
        (True, False)
    ]


def test_a_canary_that_waits_is_no_alert_after_it_was_rolled_back(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy, canary_percent=50)
    desk.engine.adapters.clear()
    cut_off(desk, monkeypatch, LoadFailed(AWAY))
    follow(desk)
    (alert,) = desk.release.alerts
    assert AWAY in alert
    release.rollback(desk.world.store, actor=desk.world.admin.id, reason="enough")
    follow(desk)
    assert desk.release.alerts == []
