"""Reconciling: whatever an engine has, afterwards it has what is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Set
from pathlib import Path

import pytest

from assistant.engine.errors import AdapterRefused, EngineUnavailable
from assistant.engine.protocol import Health, Piece, ProbeResult, Sampling
from assistant.engine.reconcile import LoadResult, load_missing, unload_unused
from storage.errors import KotaeError
from storage.records import Json

BASE = "policy-base-00000000"


class Recorder:
    """An engine that only keeps a list of adapters, in the order in which things happened."""

    base_name = BASE

    def __init__(self, *present: str, refuses: str = "", stuck: str = "", down: bool = False) -> None:
        self.present = {BASE, *present}
        self.refuses, self.stuck, self.down = refuses, stuck, down
        self.calls: list[str] = []

    async def load(self, *, policy_id: str, adapter: Path) -> None:
        self.calls.append(f"load {policy_id} {adapter}")
        if policy_id == self.refuses:
            raise AdapterRefused("NaN")
        self.present.add(policy_id)

    async def unload(self, policy_id: str) -> None:
        self.calls.append(f"unload {policy_id}")
        if policy_id == self.stuck:
            raise EngineUnavailable("gone")
        self.present.discard(policy_id)

    async def loaded(self) -> frozenset[str]:
        if self.down:
            raise EngineUnavailable("gone")
        return frozenset(self.present)

    async def held(self) -> frozenset[str]:
        return await self.loaded()

    async def stream(
        self, *, policy_id: str, messages: list[Json], sampling: Sampling, request_id: str
    ) -> AsyncGenerator[Piece, None]:
        raise NotImplementedError
        yield Piece(served_by="")

    async def probe(self, *, policy_id: str, messages: list[Json], max_tokens: int) -> ProbeResult:
        raise NotImplementedError

    async def health(self) -> Health:
        return Health(ready=True, detail="")

    async def close(self) -> None:
        pass


def load(engine: Recorder, *wanted: str) -> LoadResult:
    return asyncio.run(
        load_missing(engine, {policy_id: Path("/adapters") / policy_id for policy_id in wanted})
    )


def unload(engine: Recorder, *in_use: str) -> dict[str, KotaeError]:
    return asyncio.run(unload_unused(engine, lambda: set(in_use)))


def test_what_is_missing_is_loaded_and_nothing_is_unloaded_by_that() -> None:
    engine = Recorder("old", "kept")
    result = load(engine, "kept", "new")
    assert engine.calls == ["load new /adapters/new"]
    assert result == LoadResult(loaded=frozenset({"new"}), failed={})
    assert unload(engine, "kept", "new") == {}
    assert engine.calls[1:] == ["unload old"]
    assert engine.present == {BASE, "kept", "new"}


def test_a_second_run_changes_nothing() -> None:
    engine = Recorder()
    load(engine, "a")
    engine.calls.clear()
    result = load(engine, "a")
    assert unload(engine, "a") == {}
    assert engine.calls == []
    assert result == LoadResult(loaded=frozenset(), failed={})


def test_an_engine_that_restarted_gets_everything_back() -> None:
    engine = Recorder("a", "b")
    engine.present = {BASE}
    assert load(engine, "a", "b").loaded == {"a", "b"}


def test_the_base_is_never_unloaded() -> None:
    engine = Recorder()
    unload(engine)
    assert engine.calls == []


def test_a_policy_that_still_answers_somebody_stays_until_it_is_free() -> None:
    engine = Recorder("old")
    unload(engine, "old")
    assert engine.present == {BASE, "old"}
    unload(engine)
    assert engine.present == {BASE}


def test_what_comes_into_use_while_another_is_unloaded_stays() -> None:
    engine = Recorder("a", "b")

    def in_use() -> Set[str]:
        return {"b"} if "unload a" in engine.calls else set()

    asyncio.run(unload_unused(engine, in_use))
    assert engine.present == {BASE, "b"}


def test_one_failure_does_not_stop_the_others_and_is_reported() -> None:
    engine = Recorder("x-stuck", "y-old", refuses="a-bad", stuck="x-stuck")
    result = load(engine, "a-bad", "b-good")
    assert result.loaded == {"b-good"}
    assert {name: type(error) for name, error in result.failed.items()} == {"a-bad": AdapterRefused}
    failed = unload(engine, "b-good")
    assert {name: type(error) for name, error in failed.items()} == {"x-stuck": EngineUnavailable}
    assert engine.present == {BASE, "b-good", "x-stuck"}


def test_an_engine_that_does_not_answer_is_the_callers_business() -> None:
    with pytest.raises(EngineUnavailable):
        load(Recorder(down=True), "a")
    with pytest.raises(EngineUnavailable):
        unload(Recorder(down=True))
