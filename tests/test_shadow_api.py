"""The whole of a shadow over HTTP: people notice nothing, operators see everything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from assistant.engine.protocol import Piece
from assistant.shadow_watch import ShadowWatch
from storage import audit
from storage.records import ShadowAnswer, Turn
from web_fixtures import QUESTION, Site, make_site, running, start_canary, wait_until


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Site]:
    site = make_site(tmp_path)
    with running(site):
        yield site


def ask(site: Site, **body: Any) -> httpx.Response:
    reply = httpx.post(
        f"{site.url}/v1/chat/completions",
        json={"messages": QUESTION, "user": "customer 7", **body},
        headers=site.bearer(),
        timeout=10,
    )
    assert reply.status_code == 200, reply.text
    return reply


def answers(site: Site) -> list[ShadowAnswer]:
    return site.store.all(ShadowAnswer)


def slow_shadow(site: Site, policy_id: str, *, pause_s: float) -> None:
    """Let the shadow's answers begin only after so long."""
    stream = site.engine.stream

    async def slow(**asked: Any) -> Any:
        if asked["policy_id"] == policy_id:
            await asyncio.sleep(pause_s)
        async for piece in stream(**asked):
            yield piece

    site.engine.stream = slow  # type: ignore[method-assign]


def test_people_get_the_same_answers_and_operators_the_evidence(live: Site) -> None:
    without = ask(live, seed=3).json()["choices"]
    policy_id = start_canary(live, share=1.0, role="shadow")
    whole = ask(live, seed=3)
    assert whole.json()["choices"] == without
    assert whole.json()["system_fingerprint"] == live.engine.base_name
    wait_until(lambda: len(answers(live)) == 1)
    streamed = ask(live, seed=3, stream=True)
    assert policy_id not in whole.text + streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    wait_until(lambda: len(answers(live)) == 2)
    assert {turn.policy_id for turn in live.store.all(Turn)} == {live.engine.base_name}
    ShadowWatch(live.store).look()
    told = httpx.get(f"{live.url}/metrics", headers=live.bearer("operator")).text
    assert f'kotae_served{{policy="{policy_id}",role="shadow"}} 1' in told
    assert f'kotae_served_share{{policy="{policy_id}",role="shadow"}} 0.0' in told
    assert f'kotae_shadow_questions{{policy="{policy_id}",outcome="answered"}} 2' in told
    assert f'kotae_shadow_measure{{policy="{policy_id}",measure="failed",bound="value"}} 0.0' in told
    assert not [line for line in told.splitlines() if "kotae_turns_total" in line and policy_id in line]
    assert audit.verify(live.store).ok


def test_a_shadow_that_hangs_holds_nobody_up(live: Site) -> None:
    slow_shadow(live, start_canary(live, share=1.0, role="shadow"), pause_s=30)
    started = time.monotonic()
    for _ in range(5):
        ask(live)
    assert time.monotonic() - started < 10  # one of its pauses would be 30 s
    assert len(live.store.all(Turn)) == 5
    assert answers(live) == []
    assert live.services.chat.admission.under_way == 0


def test_a_shadow_whose_answers_are_empty_is_withdrawn(live: Site) -> None:
    policy_id = start_canary(live, share=1.0, role="shadow")
    for number in range(1, 4):
        live.engine.enqueue(["It is on its way.", ""])  # the person's, then the shadow's
        assert ask(live).json()["choices"][0]["message"]["content"] == "It is on its way."
        wait_until(lambda expected=number: len(answers(live)) == expected)
    ShadowWatch(live.store).look()
    wait_until(lambda: live.services.release.served.shadow is None)  # the running server follows
    wait_until(lambda: policy_id not in live.engine.adapters)
    ask(live)
    assert len(answers(live)) == 3


def test_an_answer_of_another_policy_withdraws_the_shadow_and_not_the_canary(live: Site) -> None:
    policy_id = start_canary(live, share=1.0, role="shadow")
    stream = live.engine.stream

    async def mixed_up(**asked: Any) -> Any:
        async for piece in stream(**asked):
            another = asked["policy_id"] == policy_id
            yield (
                Piece(text=piece.text, token_ids=piece.token_ids, served_by="policy-x") if another else piece
            )

    live.engine.stream = mixed_up  # type: ignore[method-assign]
    ask(live)
    wait_until(lambda: len(answers(live)) == 1)
    found = ShadowWatch(live.store).look()
    assert found is not None
    assert "another policy answered 1 questions" in found.stops[0]
    assert live.store.rows("SELECT * FROM failures") == []
