"""Bringing an engine to the adapters it should have, from whatever it has now.

Level-triggered: it compares what is wanted with what is loaded and knows of no events, so it may be called at
any time and after any crash. An engine that restarted lists only the base and gets everything back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from assistant.engine.protocol import Engine
from storage.errors import KotaeError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileResult:
    """What was changed, and what could not be (policy id → error)."""

    loaded: frozenset[str]
    unloaded: frozenset[str]
    failed: Mapping[str, KotaeError]


async def reconcile(
    engine: Engine,
    wanted: Mapping[str, Path],
    *,
    in_use: Set[str] = frozenset(),
    check: Callable[[str], None] = lambda policy_id: None,
) -> ReconcileResult:
    """Load what is wanted and missing, then unload what is neither wanted nor in use.

    Loading comes first, so that nothing is taken away before its successor is there; one failure does not
    stop the others.

    Args:
        engine: the engine to change.
        wanted: policy id → adapter folder, without the base.
        in_use: policies that answers are still being streamed from.
        check: called in a thread before a policy is loaded; raises a KotaeError when the engine must not get it.

    Raises:
        EngineUnavailable: the engine does not say what it has.
    """
    present = await engine.loaded()
    failed: dict[str, KotaeError] = {}
    loaded, unloaded = set(), set()
    for policy_id in sorted(wanted.keys() - present):
        try:
            await asyncio.to_thread(check, policy_id)
            await engine.load(policy_id=policy_id, adapter=wanted[policy_id])
            loaded.add(policy_id)
        except KotaeError as error:
            failed[policy_id] = error
    for policy_id in sorted(present - wanted.keys() - in_use - {engine.base_name}):
        try:
            await engine.unload(policy_id)
            unloaded.add(policy_id)
        except KotaeError as error:
            failed[policy_id] = error
    return ReconcileResult(loaded=frozenset(loaded), unloaded=frozenset(unloaded), failed=failed)
