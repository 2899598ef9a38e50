"""What an operator has to know while it holds: one message for each policy and kind, until it is so no longer.

Kept in this process. All of it is in the log, and what was decided is in the audit log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from assistant.engine.errors import EngineStarting
from assistant.in_effect import answering_rows
from storage.errors import KotaeError
from storage.records import Served, now

log = logging.getLogger("kotae.release")

Kind = Literal["withdrawn", "no way back", "not loaded", "replica", "replica's answers", "not in effect"]
LATEST = 20
"""So many are kept."""
FAILED_SYNCS = 10
"""After so many in a row, a second apart, an operator has to know: a full queue or a lost connection is over by then."""
LONG_START_S = 900.0
"""An engine that is being started for so long may never come: a boot that times out is tried again. A large model takes
some minutes."""
_STARTING = "the engine is being started"
_ENGINE = "engine"
"""What an alert is about that is about no policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A message to the operators."""

    message: str
    at: float
    """When it was told, in Unix seconds."""


class Alerts:
    """The messages that hold now. A newer one about the same thing takes the place of the older."""

    def __init__(self) -> None:
        self._alerts: dict[tuple[Kind, str], Alert] = {}

    def tell(self, kind: Kind, about: str, message: str) -> None:
        """Log a message and add it, as the latest.

        Args:
            about: the policy, or anything else that tells two things of one kind apart.
        """
        log.error(message)
        self._alerts.pop((kind, about), None)
        self._alerts[kind, about] = Alert(message=message, at=now())
        while len(self._alerts) > LATEST:
            del self._alerts[next(iter(self._alerts))]

    def tell_once(self, kind: Kind, about: str, message: str) -> None:
        """As `tell`, for what is looked at again and again in case it is well after all, each time with other numbers."""
        if (kind, about) not in self._alerts:
            self.tell(kind, about, message)

    def drop(self, about: str, *kinds: Kind) -> None:
        """Forget what was told of this policy of these kinds: it is put right."""
        for kind in kinds:
            self._alerts.pop((kind, about), None)

    def keep(self, kind: Kind, about: Container[str]) -> None:
        """Forget what was told of this kind of others than these."""
        self._alerts = {key: one for key, one in self._alerts.items() if key[0] != kind or key[1] in about}

    def settle(self, served: Served) -> None:
        """Forget what holds no longer now that this is served: of what is not wanted, or that what answers was withdrawn."""
        answering = {row.policy_id for row in answering_rows(served)}
        previous = {served.previous.policy_id} if served.previous is not None else set()
        self.keep("no way back", previous)
        self.keep("not loaded", answering | previous)
        self.keep("replica's answers", answering | previous)
        for policy_id in answering:
            self.drop(policy_id, "withdrawn")

    def latest(self) -> list[Alert]:
        """Return what holds, oldest first."""
        return list(self._alerts.values())


class Trouble:
    """What keeps the engine from what was decided. Each new cause is logged once, and told when it lasts."""

    def __init__(self, alerts: Alerts) -> None:
        self.why = ""
        """Of the last sync; "" where it went well."""
        self._alerts = alerts
        self.lasting = ""
        """As `why`, without what is another each second: for who keeps it."""
        self._failed_syncs = 0
        self._starting_since: float | None = None
        """When it was first seen starting since the last sync that went well (`time.monotonic`)."""

    def note(self, error: KotaeError) -> None:
        """Take in that a sync failed. An engine that boots is progress, for a while."""
        if isinstance(error, EngineStarting):
            self._note_start(error)
            return
        before, self.why, self.lasting = self.why, str(error), str(error)
        self._failed_syncs += 1
        message = f"the engine is not yet at what should be served: {error}"
        if self._failed_syncs >= FAILED_SYNCS and message not in {
            one.message for one in self._alerts.latest()
        }:
            self._alerts.tell("not in effect", _ENGINE, message)
        elif self.why != before:
            log.warning(message)

    def _note_start(self, error: EngineStarting) -> None:
        if self.lasting != _STARTING:
            log.info("waiting for the engine: %s", error)
        self.why, self.lasting = str(error), _STARTING
        self._failed_syncs = 0
        if self._starting_since is None:
            self._starting_since = time.monotonic()
        if time.monotonic() - self._starting_since >= LONG_START_S:
            minutes = LONG_START_S / 60
            self._alerts.tell_once(
                "not in effect", _ENGINE, f"{_STARTING} for over {minutes:.0f} minutes; see its log"
            )

    def end(self) -> None:
        """Take in that a sync went well."""
        self.why = self.lasting = ""
        self._failed_syncs, self._starting_since = 0, None
        self._alerts.drop(_ENGINE, "not in effect")
