"""Bad adapters and lost engines: what is never served, what is withdrawn, and what comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from assistant import release
from assistant.engine.errors import AdapterRefused, EngineStarting, EngineUnavailable, PolicyNotLoaded
from assistant.engine.protocol import ProbeResult
from chat_fixtures import Desk, add_servable_candidate, make_real_desk
from release_fixtures import answered_by, approve, candidate
from storage import deployments, policies
from storage.probes import ProbeRecord, RecordedProbe, write_probes
from tiny_models import make_adapter


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_real_desk(tmp_path)


def test_a_policy_with_infinite_log_probs_never_gets_a_row(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)

    async def broken(**_: object) -> ProbeResult:
        return ProbeResult(text="!", token_ids=(1,), logprobs=(float("nan"),))

    monkeypatch.setattr(desk.engine, "probe", broken)
    with pytest.raises(AdapterRefused, match="non-finite"):
        approve(desk, policy)
    assert policies.standing(desk.world.store, policy.id) == "candidate"
    assert policy.id not in asyncio.run(desk.engine.loaded())


def test_an_adapter_that_the_engine_ignores_is_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)

    async def same_as_base(**_: object) -> ProbeResult:
        return ProbeResult(text="hi", token_ids=(1, 2), logprobs=(-0.5, -0.25))

    monkeypatch.setattr(desk.engine, "probe", same_as_base)
    with pytest.raises(AdapterRefused, match="not applied"):
        approve(desk, policy)


def test_a_policy_that_the_engine_answers_otherwise_than_its_trainer_is_refused_or_withdrawn(
    desk: Desk, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", Path(desk.world.base.base_path))
    probe = RecordedProbe(ask="Hello", token_ids=(1,), logprobs=(-0.5,), margins=(9.0,))
    write_probes(adapter, ProbeRecord(dtype="float32", probes=(probe,)))
    policy = add_servable_candidate(desk.world, adapter)
    with pytest.raises(AdapterRefused, match="probe 'Hello', position 0"):
        approve(desk, policy)
    assert policies.standing(desk.world.store, policy.id) == "candidate"
    assert policy.id not in asyncio.run(desk.engine.loaded())
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="without a server")
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == desk.world.base.id
    assert "the trainer recorded token 1 with -0.5000" in desk.release.alerts[0]


def test_an_engine_that_restarted_does_not_get_files_that_changed_meanwhile(
    desk: Desk, tmp_path: Path
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()
    path = Path(str(policy.adapter_path)) / "adapter_model.safetensors"
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    asyncio.run(desk.release.sync())
    assert desk.engine.adapters == {}
    assert answered_by(desk) == desk.world.base.id
    assert "adapter_model.safetensors is not as it was stored" in desk.release.alerts[0]


def test_approving_on_the_command_line_reaches_a_running_server(desk: Desk, tmp_path: Path) -> None:
    policy = candidate(desk, tmp_path)

    async def watch_until_it_answers() -> None:
        watching = asyncio.create_task(desk.release.watch())
        await asyncio.sleep(0.1)
        release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")
        for _ in range(100):
            if desk.release.served.stable.policy_id == policy.id:
                break
            await asyncio.sleep(0.05)
        watching.cancel()

    asyncio.run(watch_until_it_answers())
    assert answered_by(desk) == policy.id


def test_a_deployed_policy_that_turns_out_bad_is_withdrawn_with_the_reason(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")

    async def refuses(**_: object) -> None:
        raise AdapterRefused("rank: got 999; use at most 64")

    monkeypatch.setattr(desk.engine, "load", refuses)
    asyncio.run(desk.release.sync())
    assert answered_by(desk) == desk.world.base.id
    assert "rank: got 999" in desk.release.alerts[0]
    assert deployments.history(desk.world.store)[0].actor == "system"


def test_an_engine_that_cannot_be_reached_withdraws_nothing(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    release.approve(desk.world.store, policy_id=policy.id, person=desk.world.admin, reason="better")

    async def down(**_: object) -> None:
        raise EngineUnavailable("nobody answers")

    monkeypatch.setattr(desk.engine, "load", down)
    with pytest.raises(EngineUnavailable):
        asyncio.run(desk.release.sync())
    assert deployments.served(desk.world.store).stable.policy_id == policy.id  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (EngineStarting("the model is starting (weights, 3 s)"), logging.INFO, "waiting for the engine"),
        (EngineUnavailable("nobody answers"), logging.WARNING, "not yet at what should be served"),
    ],
)
def test_an_engine_that_boots_is_progress_and_one_that_is_gone_a_warning(
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: EngineUnavailable,
    level: int,
    words: str,
) -> None:
    async def silent() -> set[str]:
        raise error

    async def watch_a_moment() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.release.watch(), timeout=0.1)

    monkeypatch.setattr(desk.engine, "loaded", silent)
    with caplog.at_level(logging.INFO):
        asyncio.run(watch_a_moment())
    assert [(record.levelno, words in record.message) for record in caplog.records] == [(level, True)]


def test_an_engine_that_restarted_gets_its_adapters_back_on_the_next_question(
    desk: Desk, tmp_path: Path
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()
    assert answered_by(desk) == policy.id


def test_a_policy_that_cannot_be_put_back_is_reported(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = candidate(desk, tmp_path)
    approve(desk, policy)
    desk.engine.adapters.clear()

    async def forgets(**_: object) -> None:
        return None

    monkeypatch.setattr(desk.engine, "load", forgets)
    with pytest.raises((PolicyNotLoaded, AdapterRefused)):
        answered_by(desk)
