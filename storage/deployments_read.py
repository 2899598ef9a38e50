"""What is served, derived from the deployment rows: reading only, so that policies can ask it too."""

from __future__ import annotations

from storage.records import Deployment, DeploymentRole, Served
from storage.store import Store


def served(store: Store) -> Served | None:
    """Return what should answer now; None before the first deployment.

    stable is the latest stable row; previous the latest earlier stable row of another policy of the same base; canary
    and shadow the latest row after stable of that role that was not followed by a row of the same policy.
    """
    with store.reading():
        latest = store.all(Deployment, "role = 'stable'", order="seq DESC", limit=1)
        return _around(store, latest[0]) if latest else None


def deployments_of(store: Store, policy_id: str) -> list[Deployment]:
    """Return the policy's rows, oldest first."""
    return store.all(Deployment, "policy_id = ?", [policy_id], order="seq")


def stages_of(rows: list[Deployment]) -> list[Deployment]:
    """Return the rows of the policy's present stay as a canary, oldest first, from all its rows."""
    stages: list[Deployment] = []
    for row in rows:
        stages = [*stages, row] if row.role == "canary" else []
    return stages


def _around(store: Store, stable: Deployment) -> Served:
    previous = store.all(
        Deployment,
        """role = 'stable' AND policy_id <> ? AND seq < (SELECT seq FROM deployments WHERE id = ?)
            AND (SELECT base_sha256 FROM policies WHERE id = deployments.policy_id)
                = (SELECT base_sha256 FROM policies WHERE id = ?)""",
        [stable.policy_id, stable.id, stable.policy_id],
        order="seq DESC",
        limit=1,
    )
    canary = _beside(store, stable, "canary")
    return Served(
        stable=stable,
        previous=previous[0] if previous else None,
        canary=canary,
        canary_since=stages_of(deployments_of(store, canary.policy_id))[0].created_at if canary else None,
        shadow=_beside(store, stable, "shadow"),
    )


def _beside(store: Store, stable: Deployment, role: DeploymentRole) -> Deployment | None:
    found = store.all(
        Deployment,
        """role = ? AND seq > (SELECT seq FROM deployments WHERE id = ?)
            AND NOT EXISTS (SELECT 1 FROM deployments AS later
                WHERE later.policy_id = deployments.policy_id AND later.seq > deployments.seq)""",
        [role, stable.id],
        order="seq DESC",
        limit=1,
    )
    return found[0] if found else None
