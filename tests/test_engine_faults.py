"""Which faults of vLLM are booked on a policy: from the wire to the table that a canary's hard stops read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from assistant.canary_watch import CanaryWatch
from assistant.chat import Chat
from assistant.engine.errors import EngineError, WrongPolicy
from assistant.release import Release
from storage.failures import failures_since
from storage.records import Conversation, Deployment
from storage_fixtures import World, add_candidate, approve, deploy, make_world, start_conversation
from vllm_fixtures import Server, chunk, engine_of


class Trial:
    """A canary on a fake vLLM server, and a conversation that it answers."""

    def __init__(self, data: Path) -> None:
        self.world: World = make_world(data)
        policy = add_candidate(self.world)
        approve(self.world, policy)
        self.canary: Deployment = deploy(self.world, policy, "canary", share=0.5)
        self.server = Server()
        engine = engine_of(self.server)
        self.release = Release(self.world.store, engine)
        self.chat = Chat(self.world.store, engine, self.release)
        self.conversation = self._drawn()

    def ask(self, answer: Any) -> None:
        """Ask the canary, which fails."""
        self.server.chat("one", answer)
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
