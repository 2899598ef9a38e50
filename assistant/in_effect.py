"""What of the decided is in effect. The rows say what should answer; whether it does is known to the server that runs.

The server's page asks it directly. The command line, another process, reads what the server noted last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from storage import deployments, settings
from storage.people import SYSTEM
from storage.records import Deployment, DeploymentRole, Json, Served, now
from storage.store import Store
from storage.tables import Setting

NOTED = "in_effect"
"""The setting that keeps what the server noted: the fields of `InEffect`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A decided deployment that is not in effect."""

    policy: str
    role: DeploymentRole
    reason: str
    """Why not; "" where nothing is known to be wrong: it is being loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InEffect:
    """Which deployments answer, or are asked as the shadow, and what keeps others from it."""

    deployments: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Policy → why it cannot be used yet."""
    trouble: str = ""
    """What keeps the engine from any change."""

    def waiting(self, wanted: Served) -> list[Waiting]:
        """Return what is decided and not in effect."""
        return [
            Waiting(
                policy=row.policy_id,
                role=row.role,
                reason=self.reasons.get(row.policy_id) or self.trouble,
            )
            for row in answering_rows(wanted)
            if row.id not in self.deployments
        ]


def answering_rows(served: Served) -> list[Deployment]:
    """Return the deployments that answer people, or are asked as the shadow."""
    return [row for row in (served.stable, served.canary, served.shadow) if row is not None]


def note(store: Store, in_effect: InEffect) -> None:
    """Keep it for the other processes."""
    value: Json = {**asdict(in_effect), "deployments": list(in_effect.deployments)}
    if settings.get(store, NOTED) == value:
        return
    with store.transaction(SYSTEM, audited=False, durable=False) as changes:
        changes.replace_key(Setting(key=NOTED, value=value, changed_at=now()), "key")


def noted_waiting(store: Store) -> list[Waiting]:
    """Return what is decided and not in effect as far as a server noted; nothing where none ever did."""
    noted, wanted = settings.get(store, NOTED), deployments.served(store)
    if noted is None or wanted is None:
        return []
    return InEffect(**{**noted, "deployments": tuple(noted["deployments"])}).waiting(wanted)
