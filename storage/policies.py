"""Versions of what can be served, the evidence about them and people's decisions on that evidence.

A decision is bound by digest to the bytes that were decided on; `storage.deployments` asks for the same
digest again.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal

from storage import settings
from storage.adapters import adapter_folder
from storage.deployments_read import deployments_of, served
from storage.digests import sha256_of
from storage.errors import Conflict, InvalidField
from storage.people import SYSTEM, get_person, require
from storage.records import Approval, Decision, Evaluation, Policy, Run, Snapshot, new_id, now
from storage.store import Store, Transaction
from storage.tables import Setting

Standing = Literal[
    "base",
    "candidate",
    "refused",
    "approved",
    "rejected",
    "shadow",
    "canary",
    "stable",
    "previous",
    "retired",
]
_NUMBER_KEY = "policies.last_number"


def register_base(store: Store, *, base_path: str, base_sha256: str) -> Policy:
    """Return the policy that is the base model itself, adding it the first time.

    The same bytes in another folder are the same policy; it then moves there, with every policy built on it.
    """
    known = store.all(Policy, "base_sha256 = ? AND adapter_sha256 IS NULL", [base_sha256])
    if known and known[0].base_path == base_path:
        return known[0]
    with store.transaction(SYSTEM) as changes:
        known = store.all(Policy, "base_sha256 = ? AND adapter_sha256 IS NULL", [base_sha256])
        if known:
            for policy in store.all(Policy, "base_sha256 = ?", [base_sha256]):
                changes.update(Policy, policy.id, base_path=base_path)
            changes.audit("policy.moved", known[0].id)
        else:
            policy = _base(base_path, base_sha256)
            changes.insert(policy)
            changes.audit("policy.registered", policy.id, base_sha256=base_sha256)
    return store.all(Policy, "base_sha256 = ? AND adapter_sha256 IS NULL", [base_sha256])[0]


def new_policy_id(store: Store) -> str:
    """Return an id that no policy had or will have: engines remember a name with its weights."""
    with store.transaction(SYSTEM) as changes:
        number = int(settings.get(store, _NUMBER_KEY, 0)) + 1
        policy_id = f"policy-{number:04d}-{secrets.token_hex(3)}"
        changes.replace_key(Setting(key=_NUMBER_KEY, value=number, changed_at=now()), "key")
        changes.audit("policy.named", policy_id)
    return policy_id


def add_policy(store: Store, policy: Policy, evaluation: Evaluation | None = None) -> None:
    """Keep a trained policy, together with the evidence about it.

    Raises:
        InvalidField: no adapter, another base than its parent's, or an unknown parent or run.
        Conflict: the id exists; ids are never reused.
    """
    if policy.adapter_sha256 is None or policy.adapter_path is None:
        raise InvalidField(
            "adapter_sha256", None, "add policies with an adapter; use register_base for a base model"
        )
    if store.all(Policy, "id = ?", [policy.id]):
        raise Conflict(f"id: got {policy.id!r}, which exists; ids are never reused, take a new one")
    if not Path(policy.adapter_path).is_absolute():
        raise InvalidField("adapter_path", policy.adapter_path, "use an absolute path")
    if policy.parent_id is not None:
        parents = store.all(Policy, "id = ?", [policy.parent_id])
        if parents and parents[0].base_sha256 != policy.base_sha256:
            raise InvalidField("base_sha256", policy.base_sha256, f"use the base of {policy.parent_id}")
    with store.transaction(SYSTEM) as changes:
        changes.insert(policy)
        changes.audit("policy.added", policy.id, adapter_sha256=policy.adapter_sha256, run_id=policy.run_id)
        if evaluation is not None:
            _add_evaluation(changes, evaluation)


def get_policy(store: Store, policy_id: str) -> Policy:
    """Return the policy.

    Raises:
        NotFound: there is none.
    """
    return store.get(Policy, policy_id)


def list_policies(store: Store) -> list[Policy]:
    """Return all policies, oldest first."""
    return store.all(Policy, order="seq")


def relocate_adapters(store: Store) -> list[Policy]:
    """Point policies to their adapters in this data folder after it was restored; return those that moved."""
    moved = []
    for policy in store.all(Policy, "adapter_sha256 IS NOT NULL", order="seq"):
        folder = adapter_folder(store.data, str(policy.adapter_sha256))
        if str(folder) != policy.adapter_path and folder.is_dir():
            with store.transaction(SYSTEM) as changes:
                changes.update(Policy, policy.id, adapter_path=str(folder))
                changes.audit("policy.moved", policy.id)
            moved.append(get_policy(store, policy.id))
    return moved


def add_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Keep the evidence about a candidate. A later one replaces an earlier one and voids an approval."""
    with store.transaction(SYSTEM) as changes:
        _add_evaluation(changes, evaluation)


def _add_evaluation(changes: Transaction, evaluation: Evaluation) -> None:
    changes.insert(evaluation)
    changes.audit(
        "policy.evaluated", evaluation.policy_id, evaluation_id=evaluation.id, passed=evaluation.passed
    )


def evaluation_of(store: Store, policy_id: str) -> Evaluation | None:
    """Return the latest evaluation of the policy."""
    found = store.all(Evaluation, "policy_id = ?", [policy_id], order="seq DESC", limit=1)
    return found[0] if found else None


def evidence_sha256(store: Store, policy_id: str) -> str:
    """Return the digest of what a decision is about: base, adapter, snapshot, config and evaluation."""
    policy, evaluation = get_policy(store, policy_id), evaluation_of(store, policy_id)
    runs = store.all(Run, "id = ?", [policy.run_id], order="seq")
    snapshots = store.all(Snapshot, "run_id = ?", [policy.run_id])
    return sha256_of(
        {
            "policy": policy.id,
            "base": policy.base_sha256,
            "adapter": policy.adapter_sha256,
            "snapshot": snapshots[0].sha256 if snapshots else None,
            "config": [runs[0].method, runs[0].seed, runs[0].code_version, runs[0].config] if runs else None,
            "evaluation": _evidence(evaluation) if evaluation else None,
        }
    )


def decide(store: Store, *, policy_id: str, person_id: str, decision: Decision, reason: str) -> Approval:
    """Keep a person's decision on a candidate, bound to what they decided on.

    Raises:
        NotAllowed: the person is no operator.
        InvalidField: no reason, or no such decision.
        Conflict: the gate did not pass it, it is a base, it was decided so already on the same evidence and not taken back
            since, or it is to be rejected and answers everybody.
    """
    check_decider(store, person_id, reason)
    with store.transaction(person_id) as changes:
        check_decidable(store, policy_id, decision)
        approval = Approval(
            id=new_id("approval"),
            policy_id=policy_id,
            person_id=person_id,
            decision=decision,
            reason=reason.strip(),
            sha256=evidence_sha256(store, policy_id),
            created_at=now(),
        )
        changes.insert(approval)
        changes.audit("policy.decided", policy_id, approval_id=approval.id, decision=decision)
    return approval


def check_decider(store: Store, person_id: str, reason: str) -> None:
    """Raise unless the person may decide on candidates and says why.

    Raises:
        NotAllowed: the person is no operator.
        InvalidField: no reason.
    """
    require(get_person(store, person_id), "operator")
    if not reason.strip():
        raise InvalidField("reason", reason, "say why, for those who read it later")


def check_decidable(store: Store, policy_id: str, decision: Decision) -> None:
    """Raise Conflict as `decide` does."""
    if get_policy(store, policy_id).adapter_sha256 is None:
        raise Conflict(f"{policy_id} is a base model: it may be served without a decision")
    evaluation = evaluation_of(store, policy_id)
    if decision == "approve" and (evaluation is None or not evaluation.passed):
        why = "was never evaluated" if evaluation is None else "was refused by its gate"
        raise Conflict(f"{policy_id} {why}: only a candidate that passed may be approved")
    now_served = served(store)
    if decision == "reject" and now_served is not None and now_served.stable.policy_id == policy_id:
        raise Conflict(f"{policy_id} answers everybody: roll it back first, then reject it")
    latest, decided_on = approval_of(store, policy_id), evidence_sha256(store, policy_id)
    is_same = latest is not None and (latest.decision, latest.sha256) == (decision, decided_on)
    if is_same and standing(store, policy_id) not in ("previous", "retired"):
        raise Conflict(f"{policy_id}: the decision to {decision} it is already recorded")


def approval_of(store: Store, policy_id: str) -> Approval | None:
    """Return the latest decision on the policy."""
    found = store.all(Approval, "policy_id = ?", [policy_id], order="seq DESC", limit=1)
    return found[0] if found else None


def is_approved(store: Store, policy_id: str) -> bool:
    """Tell whether the latest decision is an approval of exactly what the policy is now."""
    approval = approval_of(store, policy_id)
    if approval is None or approval.decision != "approve":
        return False
    return approval.sha256 == evidence_sha256(store, policy_id)


def standing(store: Store, policy_id: str) -> Standing:
    """Return where the policy is on its way from candidate to retired. What is served comes first."""
    policy, now_served = get_policy(store, policy_id), served(store)
    if now_served is not None:
        roles: list[tuple[Standing, str | None]] = [
            ("stable", now_served.stable.policy_id),
            ("canary", now_served.canary.policy_id if now_served.canary else None),
            ("previous", now_served.previous.policy_id if now_served.previous else None),
            ("shadow", now_served.shadow.policy_id if now_served.shadow else None),
        ]
        for role, role_policy_id in roles:
            if role_policy_id == policy_id:
                return role
    if policy.adapter_sha256 is None:
        return "base"
    return _standing_unserved(store, policy_id)


def _standing_unserved(store: Store, policy_id: str) -> Standing:
    approval, evaluation = approval_of(store, policy_id), evaluation_of(store, policy_id)
    if approval is not None and approval.decision == "reject":
        return "rejected"
    if deployments_of(store, policy_id):
        return "retired"
    if is_approved(store, policy_id):
        return "approved"
    return "refused" if evaluation is not None and not evaluation.passed else "candidate"


def _base(base_path: str, base_sha256: str) -> Policy:
    return Policy(
        id=f"policy-base-{base_sha256[:8]}",
        base_path=base_path,
        base_sha256=base_sha256,
        adapter_path=None,
        adapter_sha256=None,
        parent_id=None,
        run_id=None,
        created_at=now(),
    )


def _evidence(evaluation: Evaluation) -> list[object]:
    return [
        evaluation.id,
        evaluation.incumbent_id,
        evaluation.numbers,
        evaluation.samples,
        evaluation.passed,
        evaluation.reasons,
    ]
