"""Bringing an engine to the adapters it should have, from whatever it has now.

Level-triggered: it compares what is wanted with what is loaded and knows of no events, so it may be called at
any time and after any crash. An engine that restarted lists only the base and gets everything back. Loading and unloading
are two steps: what is loaded is checked, and people are moved to it, before what they leave is taken away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from assistant.engine.errors import ReplicaAtFault
from assistant.engine.protocol import Engine
from storage.errors import KotaeError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What was loaded, and what could not be (policy id → error)."""

    loaded: frozenset[str]
    failed: Mapping[str, KotaeError]
    at_fault: Mapping[str, ReplicaAtFault] = field(default_factory=dict)
    """What one server refused and another has, and so can answer."""


async def load_missing(
    engine: Engine, wanted: Mapping[str, Path], *, check: Callable[[str], None] = lambda policy_id: None
) -> LoadResult:
    """Load what is wanted and missing; one failure does not stop the others.

    Args:
        engine: the engine to change.
        wanted: policy id → adapter folder, without the base.
        check: called in a thread before a policy is loaded; raises a KotaeError when the engine must not get it.

    Raises:
        EngineUnavailable: the engine does not say what it has.
    """
    present = await engine.loaded()
    failed: dict[str, KotaeError] = {}
    at_fault: dict[str, ReplicaAtFault] = {}
    loaded = set()
    for policy_id in sorted(wanted.keys() - present):
        try:
            await asyncio.to_thread(check, policy_id)
            await engine.load(policy_id=policy_id, adapter=wanted[policy_id])
            loaded.add(policy_id)
        except ReplicaAtFault as error:
            at_fault[policy_id] = error
        except KotaeError as error:
            failed[policy_id] = error
    return LoadResult(loaded=frozenset(loaded), failed=failed, at_fault=at_fault)


async def unload_unused(engine: Engine, in_use: Callable[[], Set[str]]) -> dict[str, KotaeError]:
    """Unload all but the base and what is in use, and return what could not be (policy id → error).

    Args:
        engine: the engine to change.
        in_use: returns the policies that must stay; asked before each is unloaded, because questions come meanwhile.

    Raises:
        EngineUnavailable: the engine does not say what it has.
    """
    failed: dict[str, KotaeError] = {}
    for policy_id in sorted(await engine.held() - {engine.base_name}):
        if policy_id in in_use():
            continue
        try:
            await engine.unload(policy_id)
        except KotaeError as error:
            failed[policy_id] = error
    return failed
