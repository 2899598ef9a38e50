"""Which faults of vLLM are booked on a policy: from the wire to the table that a canary's hard stops read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.canary_watch import CanaryWatch
from assistant.chat import Chat
from assistant.engine.errors import EngineAbsent, EngineError, EngineStarting, EngineUnavailable, WrongPolicy
from assistant.engine.vllm import VllmEngine
from assistant.release import Release
from storage import deployments
from storage.failures import failures_since
from storage.records import Conversation, Deployment
from storage_fixtures import World, add_candidate, approve, deploy, make_world, start_conversation
from vllm_fixtures import BASE, ONE, TWO, Server, chunk, problem


class Trial:
    """A canary on a fake vLLM server, and a conversation that it answers."""

    def __init__(self, data: Path) -> None:
        self.starting: EngineStarting | None = None
        self.world: World = make_world(data)
        policy = add_candidate(self.world)
        approve(self.world, policy)
        self.canary: Deployment = deploy(self.world, policy, "canary", share=0.5)
        deployments.note_answering(self.world.store, self.canary)  # an earlier server checked it
        self.server = Server()
        transport = httpx.MockTransport(self.server)
        engine = VllmEngine([ONE, TWO], base_name=BASE, transport=transport, explain=lambda: self.starting)
        self.release = Release(self.world.store, engine)
        self.chat = Chat(self.world.store, engine, self.release)
        self.conversation = self._drawn()

    def ask(self, answer: Any, other: Any = httpx.ConnectError("refused")) -> None:  # noqa: B008 (is not changed)
        """Ask the canary, which fails: `answer` on the first server, `other` on the second."""
        self.server.chat("one", answer)
        self.server.chat("two", other)
        ask = self.chat.ask(self.world.staff, self.conversation, "Hello?")
        with pytest.raises(EngineError) as failed:
            asyncio.run(self.chat.complete(ask))
        self.error = failed.value

    def booked(self) -> list[str]:
        """Return what was booked on the canary."""
        return [one.kind for one in failures_since(self.world.store, (self.canary.policy_id, ""), since=0)]

    def _drawn(self) -> Conversation:
        while True:
            conversation = start_conversation(self.world)
            with self.release.lease(conversation.id) as deployment:
                if deployment.policy_id == self.canary.policy_id:
                    return conversation


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path / "data")


@pytest.mark.parametrize("words_before", [0, 1])
def test_one_answer_of_another_policy_takes_the_canary_back(trial: Trial, words_before: int) -> None:
    mine = [chunk("Hi", [5], model=trial.canary.policy_id)] * words_before
    trial.ask((*mine, chunk("there", [6], model="someone-else")))
    assert isinstance(trial.error, WrongPolicy)
    assert trial.booked() == ["wrong_policy"]
    verdict = CanaryWatch(trial.world.store).look()
    assert verdict is not None
    assert verdict.status == "Failed"
    assert "another policy answered 1 questions" in verdict.reasons[0]


@pytest.mark.parametrize("refusal", [httpx.ConnectError("refused"), httpx.ConnectTimeout("silent")])
def test_that_nobody_is_there_is_no_fault_of_the_policy(trial: Trial, refusal: Exception) -> None:
    """Else one client that tries again while the engine restarts would take a good canary back."""
    for _ in range(5):
        trial.ask(refusal, refusal)
        assert isinstance(trial.error, EngineAbsent)
    assert trial.booked() == []


def test_that_the_engine_is_starting_is_no_fault_of_the_policy(trial: Trial) -> None:
    trial.starting = EngineStarting("the model is starting; ask again in a moment")
    trial.ask(httpx.ConnectError("refused"))
    assert trial.error is trial.starting
    assert trial.booked() == []


@pytest.mark.parametrize(
    "answer", [problem(500, "died"), (httpx.ReadError("reset"),), httpx.ReadTimeout("silent")]
)
def test_a_server_that_took_the_question_and_failed_is_booked_though_another_is_gone(
    trial: Trial, answer: Any
) -> None:
    trial.ask(answer)
    assert isinstance(trial.error, EngineUnavailable)
    assert not isinstance(trial.error, EngineAbsent)
    assert trial.booked() == ["error"]
