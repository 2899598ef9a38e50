"""What is served, derived from the deployment rows: reading only, so that policies can ask it too."""

from __future__ import annotations

from dataclasses import dataclass

from storage import settings
from storage.records import Deployment, DeploymentRole, Served
from storage.store import Store

ANSWERING = "canary_answering"
"""The setting that keeps since when a canary's deployments answer: deployment id → Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A share that the canary has or had during its present stay."""

    deployment: Deployment
    since: float | None
    """When the server began to draw conversations with it (Unix seconds); None where it has not."""

    @property
    def share(self) -> float:
        """Part of the conversations, 0 to 1."""
        return self.deployment.share


def served(store: Store) -> Served | None:
    """Return what should answer now; None before the first deployment.

    stable is the latest stable row; previous the latest earlier stable row of another policy of the same base that was not
    rejected since; canary and shadow the latest row of that role, if it came after stable and no row of the same policy
    followed.
    """
    with store.reading():
        latest = store.all(Deployment, "role = 'stable'", order="seq DESC", limit=1)
        return _around(store, latest[0]) if latest else None


def deployments_of(store: Store, policy_id: str) -> list[Deployment]:
    """Return the policy's rows, oldest first."""
    return store.all(Deployment, "policy_id = ?", [policy_id], order="seq")


def stages_of(store: Store, now_served: Served) -> list[Stage]:
    """Return the shares of the canary's present stay, oldest first; none without a canary.

    A stay begins anew after another stable policy and after another canary: that time was not this one's.
    """
    return _stages(store, now_served.stable, now_served.canary) if now_served.canary else []


def answering_since(store: Store) -> dict[str, float]:
    """Return since when a canary's deployments answer: deployment id → Unix seconds."""
    return dict(settings.get(store, ANSWERING, {}))


def _stages(store: Store, stable: Deployment, canary: Deployment) -> list[Stage]:
    stay: list[Deployment] = []
    for row in store.all(
        Deployment, "seq > (SELECT seq FROM deployments WHERE id = ?)", [stable.id], order="seq"
    ):
        if row.role == "canary" and row.policy_id == canary.policy_id:
            stay.append(row)
        elif row.role == "canary" or row.policy_id == canary.policy_id:
            stay.clear()
    since = answering_since(store)
    return [Stage(deployment=row, since=since.get(row.id)) for row in stay]


def _around(store: Store, stable: Deployment) -> Served:
    previous = store.all(
        Deployment,
        """role = 'stable' AND policy_id <> ? AND seq < (SELECT seq FROM deployments WHERE id = ?)
            AND (SELECT base_sha256 FROM policies WHERE id = deployments.policy_id)
                = (SELECT base_sha256 FROM policies WHERE id = ?)
            AND coalesce((SELECT decision FROM approvals WHERE approvals.policy_id = deployments.policy_id
                ORDER BY seq DESC LIMIT 1), '') <> 'reject'""",
        [stable.policy_id, stable.id, stable.policy_id],
        order="seq DESC",
        limit=1,
    )
    canary = _beside(store, stable, "canary")
    stages = _stages(store, stable, canary) if canary else []
    return Served(
        stable=stable,
        previous=previous[0] if previous else None,
        canary=canary,
        canary_since=min((stage.since for stage in stages if stage.since is not None), default=None),
        shadow=_beside(store, stable, "shadow"),
    )


def _beside(store: Store, stable: Deployment, role: DeploymentRole) -> Deployment | None:
    found = store.all(
        Deployment,
        """seq = (SELECT max(seq) FROM deployments WHERE role = ?)
            AND seq > (SELECT seq FROM deployments WHERE id = ?)
            AND NOT EXISTS (SELECT 1 FROM deployments AS later
                WHERE later.policy_id = deployments.policy_id AND later.seq > deployments.seq)""",
        [role, stable.id],
    )
    return found[0] if found else None
