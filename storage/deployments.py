"""Changing what is served: one more row, never an edit. A rollback is one more row too.

Moving the engine to the served state is the business of `assistant.release`.
"""

from __future__ import annotations

from dataclasses import replace

from storage.deployments_read import ANSWERING, Stage, answering_since, deployments_of, served, stages_of
from storage.errors import Conflict, InvalidField, NotAllowed
from storage.people import SYSTEM, require_actor
from storage.policies import approval_of, get_policy, is_approved
from storage.records import Deployment, DeploymentRole, Served, new_id, now
from storage.store import Store
from storage.tables import Setting

__all__ = [
    "Stage",
    "answered_before",
    "check_newest",
    "check_step",
    "deploy",
    "deployments_of",
    "history",
    "is_way_back",
    "note_answering",
    "served",
    "stages_of",
]


def deploy(
    store: Store,
    *,
    policy_id: str,
    role: DeploymentRole,
    share: float,
    actor: str,
    reason: str,
    expected: str | None = None,
) -> Deployment:
    """Make the policy stable, a canary or the shadow with a share of the conversations (0 to 1), or retire it.

    Args:
        expected: the policy that the decision is about, see `check_newest`; None: whatever is served.

    Raises:
        NotAllowed: no valid approval of exactly this policy, or `actor` is neither "system" nor an operator.
        InvalidField: the share does not fit the role, or there is no reason.
        Conflict: the step makes no sense from what is served now, or another policy than `expected` answers by now.
    """
    require_actor(store, actor, "operator")
    _check_share(role, share)
    if not reason.strip():
        raise InvalidField("reason", reason, "say why, for those who read it later")
    deployment = Deployment(
        id=new_id("deployment"),
        policy_id=policy_id,
        role=role,
        share=share,
        actor=actor,
        reason=reason.strip(),
        created_at=now(),
    )
    with store.transaction(actor) as changes:
        _check_approved(store, policy_id, role)
        now_served = served(store)
        check_step(now_served, policy_id, role)
        if now_served is not None and expected is not None:
            check_newest(now_served, expected)
        changes.insert(deployment)
        changes.audit("policy.deployed", policy_id, deployment_id=deployment.id, role=role, share=share)
    return deployment


def history(store: Store, limit: int = 100) -> list[Deployment]:
    """Return the latest deployment rows, newest first."""
    return store.all(Deployment, order="seq DESC", limit=limit)


def note_answering(store: Store, canary: Deployment) -> float:
    """Keep that conversations are drawn for this canary from now on, unless it is known, and return since when.

    Its evidence begins here and not with its row: until the server has loaded it, checked it and flipped to it, all
    conversations are stable's and none was drawn.
    """
    with store.transaction(SYSTEM, audited=False, durable=False) as changes:
        its_rows = {row.id for row in deployments_of(store, canary.policy_id)}
        known = {id: since for id, since in answering_since(store).items() if id in its_rows}
        if canary.id not in known:
            known[canary.id] = now()
            changes.replace_key(Setting(key=ANSWERING, value=known, changed_at=now()), "key")
    return known[canary.id]


def answered_before(store: Store, decided: Served) -> Served:
    """Return what a server that starts may serve before it has checked anything: what answered people already.

    The rest of what was decided was never loaded and checked. The policy before answers in the place of stable, or the base
    where that never answered either, and a canary is drawn with the share that an earlier server drew with.
    """
    with store.reading():
        if decided.canary_since is not None or _has_answered(store, decided.stable):
            drawn = [stage.deployment for stage in stages_of(store, decided) if stage.since is not None]
            return replace(decided, canary=drawn[-1] if drawn else None)
        if decided.previous is not None and _has_answered(store, decided.previous):
            return Served(stable=decided.previous)
        of_the_base = """role = 'stable' AND policy_id IN (SELECT id FROM policies
            WHERE adapter_sha256 IS NULL AND base_sha256 = (SELECT base_sha256 FROM policies WHERE id = ?))"""
        (base,) = store.all(
            Deployment, of_the_base, [decided.stable.policy_id], order="seq DESC", limit=1
        )  # an adapter is approved where its base was served
        return Served(stable=base)


def _has_answered(store: Store, row: Deployment) -> bool:
    """Tell whether the row's policy passed its checks once: it gave an answer, or is a base, which needs none."""
    if get_policy(store, row.policy_id).adapter_sha256 is None:
        return True
    return bool(store.rows("SELECT 1 FROM turns WHERE policy_id = ? LIMIT 1", [row.policy_id]))


def is_way_back(store: Store, now_served: Served) -> bool:
    """Tell whether stable is what somebody went back to from `previous`: it answered before that, no approval came since."""
    stable, previous = now_served.stable, now_served.previous
    if previous is None:
        return False
    earlier = """policy_id = ? AND role = 'stable' AND seq < (SELECT seq FROM deployments WHERE id = ?)"""
    if not store.all(Deployment, earlier, [stable.policy_id, previous.id], order="seq", limit=1):
        return False
    approval = approval_of(store, stable.policy_id)
    return approval is None or approval.created_at < previous.created_at


def _check_share(role: DeploymentRole, share: float) -> None:
    part = 0 < share <= 1
    fits = {"stable": share == 1, "canary": part, "shadow": part, "retired": share == 0}
    if role not in fits:
        raise InvalidField("role", role, "use stable, canary, shadow or retired")
    if not fits[role]:
        raise InvalidField(
            "share", share, "use 1 for stable, above 0 up to 1 for canary and shadow, 0 for retired"
        )


def _check_approved(store: Store, policy_id: str, role: DeploymentRole) -> None:
    policy = get_policy(store, policy_id)
    if role == "retired" or policy.adapter_sha256 is None or is_approved(store, policy_id):
        return
    raise NotAllowed(f"{policy_id} has no approval of exactly its present evidence; approve it first")


def check_step(now_served: Served | None, policy_id: str, role: DeploymentRole) -> None:
    """Raise Conflict when the step makes no sense from what is served now."""
    if now_served is None and role != "stable":
        raise Conflict(f"nothing is served yet: deploy {policy_id} as stable first")
    if now_served is not None and role != "stable" and now_served.stable.policy_id == policy_id:
        raise Conflict(f"{policy_id} is the stable policy: make another one stable first")
    if now_served is not None and role == "retired":
        beside = [row.policy_id for row in (now_served.canary, now_served.shadow) if row is not None]
        if policy_id not in beside:
            raise Conflict(f"{policy_id} is neither the canary nor the shadow: there is nothing to withdraw")
    shadow = now_served.shadow if now_served is not None and role == "shadow" else None
    if shadow is not None and shadow.policy_id != policy_id:
        raise Conflict(f"{shadow.policy_id} is in the shadow already: withdraw it first")
    canary = now_served.canary if now_served is not None and role == "canary" else None
    if canary is not None and canary.policy_id != policy_id:
        raise Conflict(f"{canary.policy_id} is the canary already: roll it back or promote it first")


def check_newest(now_served: Served, expected: str) -> None:
    """Raise Conflict unless the newest policy that answers, the canary or else the stable one, is `expected`."""
    newest = now_served.canary or now_served.stable
    if newest.policy_id != expected:
        role = "stable" if now_served.canary is None else "the canary"
        raise Conflict(
            f"policy: got {expected}, but {newest.policy_id} is {role} now; nothing was changed, look again and name that"
        )
