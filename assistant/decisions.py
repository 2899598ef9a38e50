"""Decisions about what should answer, as rows in storage: approval, promotion, rollback, the end of a shadow.

They work without a server. A running one follows them (`assistant.release`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from assistant.alerts import Kind
from assistant.engine.adapter_gate import base_shape, check_adapter
from assistant.engine.errors import OtherBase
from assistant.in_effect import answering_rows
from assistant.quarantine import quarantine, quarantine_of, refusals_kept
from storage import adapters, deployments, policies
from storage.errors import Conflict, InvalidField, KotaeError
from storage.people import SYSTEM
from storage.records import Deployment, DeploymentRole, Person, Policy, Served
from storage.store import Store


def approve(
    store: Store,
    *,
    policy_id: str,
    person: Person,
    reason: str,
    canary_percent: float | None = None,
    shadow_percent: float | None = None,
) -> Deployment:
    """Approve a candidate and deploy it: to everybody, to a share of the conversations, or as the shadow of a share.

    One that is in the shadow, and a canary that gets another share, is approved already; it is only deployed. One that was
    taken back needs a new decision.

    Raises:
        NotAllowed, NotFound, Conflict: as `storage.policies.decide`, or another policy is the shadow.
        InvalidField: the share is not between 0 and 100, or two are given.
        AdapterRefused, CorruptData: the adapter's files are not what was evaluated, or not servable.
    """
    policy = store.get(Policy, policy_id)
    role, share = check_approval(
        store,
        policy_id=policy_id,
        person=person,
        reason=reason,
        canary_percent=canary_percent,
        shadow_percent=shadow_percent,
    )
    with refusals_kept(store, policy_id):
        check_files(store, policy)
    if _needs_decision(store, policy_id, role):
        policies.decide(store, policy_id=policy_id, person_id=person.id, decision="approve", reason=reason)
    return deployments.deploy(
        store, policy_id=policy_id, role=role, share=share, actor=person.id, reason=reason
    )


def check_approval(
    store: Store,
    *,
    policy_id: str,
    person: Person,
    reason: str,
    canary_percent: float | None = None,
    shadow_percent: float | None = None,
) -> tuple[DeploymentRole, float]:
    """Return the role and the share (0 to 1) that `approve` would give, without a look at the files and changing nothing.

    Raises:
        NotAllowed, NotFound, Conflict, InvalidField: as `approve`.
        OtherBase: another base is served.
    """
    role, share = _role_and_share(canary_percent, shadow_percent)
    policies.check_decider(store, person.id, reason)
    deployments.check_step(deployments.served(store), policy_id, role)  # nothing is decided that is not done
    if _needs_decision(store, policy_id, role):
        policies.check_decidable(store, policy_id, "approve")
    check_base(store, store.get(Policy, policy_id))  # another --model is no fault of the policy: no mark
    return role, share


def _needs_decision(store: Store, policy_id: str, role: DeploymentRole) -> bool:
    """Tell whether somebody has to decide before the policy gets this role: on its evidence, or to have it again."""
    if not policies.is_approved(store, policy_id):
        return True
    standing = policies.standing(store, policy_id)
    if standing == "canary" and role != "canary":
        raise Conflict(
            f"{policy_id} is the canary already: promote it, roll it back, or give it another share with --canary"
        )
    return standing not in ("approved", "shadow", "canary")


def _role_and_share(canary: float | None, shadow: float | None) -> tuple[DeploymentRole, float]:
    """Return how a policy is deployed for these percentages of the conversations."""
    if canary is not None and shadow is not None:
        raise InvalidField("shadow", shadow, "a policy answers a share (canary) or nobody (shadow), not both")
    if canary is not None and not 0 < canary < 100:
        raise InvalidField("canary", canary, "give a percentage above 0 and below 100")
    if shadow is not None and not 0 < shadow <= 100:
        raise InvalidField("shadow", shadow, "give a percentage above 0, at most 100")
    if canary is not None:
        return "canary", canary / 100
    return ("stable", 1.0) if shadow is None else ("shadow", shadow / 100)


def reject(store: Store, *, policy_id: str, person: Person, reason: str) -> None:
    """Reject a policy for good, with a reason; the canary or shadow is withdrawn first, so that nothing rejected answers.

    Raises:
        NotAllowed, NotFound, Conflict: as `storage.policies.decide`, so for the stable policy.
    """
    policies.check_decider(store, person.id, reason)
    policies.check_decidable(store, policy_id, "reject")
    now_served = deployments.served(store)
    beside = (now_served.canary, now_served.shadow) if now_served is not None else ()
    if policy_id in {row.policy_id for row in beside if row is not None}:
        with suppress(
            Conflict
        ):  # somebody else took it back meanwhile, or promoted it, which `decide` refuses
            retire(store, policy_id=policy_id, actor=person.id, reason=reason)
    policies.decide(store, policy_id=policy_id, person_id=person.id, decision="reject", reason=reason)


def promote(store: Store, *, policy_id: str, person: Person, reason: str) -> Deployment:
    """Give the canary all conversations.

    Raises:
        Conflict: `policy_id` is not the canary, or not any more.
    """
    served = serving(store)
    if served.canary is None or served.canary.policy_id != policy_id:
        running = served.canary.policy_id if served.canary else "none"
        raise Conflict(f"policy: {policy_id} is not the canary ({running} is); approve it with a share first")
    return deployments.deploy(
        store,
        policy_id=policy_id,
        role="stable",
        share=1.0,
        actor=person.id,
        reason=reason,
        expected=policy_id,
    )


def rollback(store: Store, *, actor: str, reason: str, expected: str | None = None) -> Deployment:
    """Withdraw the canary if there is one, else go back to the policy served before.

    Args:
        expected: the policy to take back. Who saw what is served gives it: somebody else may have taken that back
            meanwhile, and a second step would hit what came in its place. None: what answers now, unless that is what
            somebody went back to already.

    Raises:
        Conflict: another policy than `expected` answers by now, or there is nothing to go back to, or, without
            `expected`, only what was rolled back last.
    """
    if not reason.strip():
        raise InvalidField("reason", reason, "say why in a few words")
    served = serving(store)
    if expected is None:
        _check_not_undone(store, served)
        expected = (served.canary or served.stable).policy_id
    deployments.check_newest(served, expected)
    if served.canary is not None:
        return retire(store, policy_id=expected, actor=actor, reason=reason)
    if served.previous is None:
        raise Conflict("rollback: nothing was served before this policy; there is nothing to go back to")
    return deployments.deploy(
        store,
        policy_id=served.previous.policy_id,
        role="stable",
        share=1.0,
        actor=actor,
        reason=reason,
        expected=expected,
    )


def _check_not_undone(store: Store, served: Served) -> None:
    """Raise Conflict where one more step back would bring back what was rolled back last."""
    if served.canary is None and served.previous is not None and deployments.is_way_back(store, served):
        undone, stable = served.previous.policy_id, served.stable.policy_id
        raise Conflict(
            f"rollback: {undone} was rolled back last, and this would bring it back; if that is meant, name what to take "
            f"back: rollback {stable}"
        )


def withdraw(store: Store, *, actor: str, reason: str, expected: str | None = None) -> Deployment:
    """Ask the shadow no more.

    Args:
        expected: as for `rollback`.

    Raises:
        Conflict: no policy is the shadow, or another one than `expected`.
    """
    shadow = serving(store).shadow
    if shadow is None:
        raise Conflict("shadow: no policy is in the shadow; there is nothing to withdraw")
    if expected not in (None, shadow.policy_id):
        raise Conflict(
            f"policy: got {expected}, but {shadow.policy_id} is the shadow now; nothing was changed"
        )
    return retire(store, policy_id=shadow.policy_id, actor=actor, reason=reason)


def retire(store: Store, *, policy_id: str, actor: str, reason: str) -> Deployment:
    """Withdraw this policy, the canary or the shadow.

    Raises:
        Conflict: it is neither by now.
    """
    return deployments.deploy(
        store, policy_id=policy_id, role="retired", share=0.0, actor=actor, reason=reason
    )


def withdraw_refused(
    store: Store, policy_id: str, refused: Mapping[str, KotaeError], *, base_name: str
) -> tuple[Kind, str]:
    """Take a policy that cannot be served out of the desired state; return what the operators have to be told.

    It is quarantined, unless only the base is another: who goes back to its base may serve it again as it was.

    Args:
        refused: all that cannot be served now, and why: what stable goes back to must not be among them.
        base_name: what stable goes back to where the policy before cannot be served either.
    """
    served = serving(store)
    answers = policy_id in {row.policy_id for row in answering_rows(served)}
    # a way back is probed at every look, with other numbers each time: its first reason stays
    if not isinstance(refused[policy_id], OtherBase) and (answers or quarantine_of(store, policy_id) is None):
        quarantine(store, policy_id, str(refused[policy_id]))
    if not answers:
        return "no way back", f"{policy_id} is no way back: {refused[policy_id]}"
    why = f"{policy_id} was withdrawn: {refused[policy_id]}"
    if policy_id == served.stable.policy_id:
        back_to = base_name
        if served.previous is not None and served.previous.policy_id not in refused:
            back_to = served.previous.policy_id
        deployments.deploy(store, policy_id=back_to, role="stable", share=1.0, actor=SYSTEM, reason=why)
    else:
        retire(store, policy_id=policy_id, actor=SYSTEM, reason=why)
    return "withdrawn", why


def serving(store: Store) -> Served:
    """Return what should be served; raises Conflict before the first start."""
    served = deployments.served(store)
    if served is None:
        raise Conflict("served: nothing was ever served from this data folder; start it once with `serve`")
    return served


def check_files(store: Store, policy: Policy) -> None:
    """Raise unless the adapter is of the base that is served, its bytes are those evaluated, and an engine can serve it."""
    if policy.adapter_path is None or policy.adapter_sha256 is None:
        return
    check_base(store, policy)
    adapters.verify_adapter(Path(policy.adapter_path), policy.adapter_sha256)
    check_adapter(Path(policy.adapter_path), base=base_shape(policy.base_path, sha256=policy.base_sha256))


def check_base(store: Store, policy: Policy) -> None:
    """Raise OtherBase unless the policy is of the base that is served."""
    base = store.get(Policy, serving(store).stable.policy_id)
    if policy.base_sha256 != base.base_sha256:
        raise OtherBase(
            f"{policy.id}: base_sha256: got {policy.base_sha256[:12]}…; train on the base served, {base.base_path} "
            f"({base.base_sha256[:12]}…), or serve with --model {policy.base_path}"
        )
