"""What an operator has to know while it holds: one message for each policy and kind, until it is so no longer.

Kept in this process. All of it is in the log, and what was decided is in the audit log.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from storage.records import now

Kind = Literal["withdrawn", "no way back", "not in effect", "other"]
LATEST = 20
"""So many are kept."""


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
        """Add a message, as the latest.

        Args:
            about: the policy, or anything else that tells two things of one kind apart.
        """
        self._alerts.pop((kind, about), None)
        self._alerts[kind, about] = Alert(message=message, at=now())
        while len(self._alerts) > LATEST:
            del self._alerts[next(iter(self._alerts))]

    def drop(self, about: str) -> None:
        """Forget all that was told of this policy: it is put right."""
        self._alerts = {key: alert for key, alert in self._alerts.items() if key[1] != about}

    def keep(self, kind: Kind, about: Container[str]) -> None:
        """Forget what was told of this kind of others than these."""
        self._alerts = {key: one for key, one in self._alerts.items() if key[0] != kind or key[1] in about}

    def latest(self) -> list[Alert]:
        """Return what holds, oldest first."""
        return list(self._alerts.values())
