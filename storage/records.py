"""The facts Kotae keeps: one frozen dataclass for each table, with no behaviour and no SQL.

Every record is written once. What may change later (a conversation's title, a run's progress) changes
through a named function of the topic modules, together with its audit event.

Times are Unix seconds (UTC) as float, durations end in ``_s``, ids are sortable strings such as
``turn_0199c0ffee00-3f9a2b7c4d``. JSON-valued fields hold plain ``dict``/``list``/``str``/number values.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["staff", "reviewer", "operator", "admin"]
Verdict = Literal["up", "down", "retracted"]
Choice = Literal["left", "right", "tie", "both_bad"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
FailureKind = Literal["error", "wrong_policy", "engine_died"]
"""A request that the engine did not begin to answer, an answer by another policy than was asked, the engine's end."""
TurnSource = Literal["chat", "compare", "api"]
RunStatus = Literal["running", "passed", "refused", "not_enough_data", "failed", "cancelled"]
RunTrigger = Literal["manual", "cron", "labels"]
ShadowFinish = Literal["stop", "length", "error", "wrong_policy"]
DeploymentRole = Literal["stable", "canary", "shadow", "retired"]
Decision = Literal["approve", "reject"]
Json = dict[str, Any]

ROLES: tuple[Role, ...] = ("staff", "reviewer", "operator", "admin")
"""In ascending order of rights: each role may do what the ones before it may."""


def new_id(kind: str) -> str:
    """Return a fresh id: `kind`, milliseconds in hex (so that ids sort by time), 40 random bits."""
    return f"{kind}_{int(time.time() * 1000):012x}-{os.urandom(5).hex()}"


def now() -> float:
    """Return the time in Unix seconds."""
    return time.time()


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody who may sign in. Password hash and tokens are kept beside it, never in it."""

    id: str
    name: str
    role: Role
    created_at: float
    disabled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A tree of turns; `head_turn_id` is the leaf that is shown."""

    id: str
    person_id: str
    title: str
    created_at: float
    head_turn_id: str | None = None
    external_id: str | None = None
    """The caller's own name of this conversation (`user` or X-Conversation-Id of the API)."""
    deleted_at: float | None = None
    active_at: float = 0.0
    """When its last turn was recorded (when it was created, before the first)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answer of one policy: exactly what was asked, what was served and by whom."""

    id: str
    conversation_id: str
    parent_turn_id: str | None
    """The turn before it in the conversation; turns of one parent are alternatives."""
    person_id: str
    source: TurnSource
    messages: list[Json]
    """What was sent to the policy: `[{"role": ..., "content": ...}, ...]`, the last one the question."""
    answer: str
    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    """As the engine produced them, end-of-sequence included. Training never retokenises."""
    policy_id: str
    deployment_id: str
    sampling: Json
    finish_reason: FinishReason
    first_token_s: float | None
    total_s: float
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A thumb. The last one of a person on a turn counts; `retracted` means none."""

    id: str
    turn_id: str
    person_id: str
    verdict: Verdict
    reasons: list[str]
    comment: str
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A choice between two answers, in the order in which they were shown."""

    id: str
    left_turn_id: str
    right_turn_id: str
    person_id: str
    choice: Choice
    strength: int | None
    """1 slightly, 2 clearly, 3 much better; None when not asked or without a winner."""
    propensity: float
    """Probability with which this order of the two sides was drawn."""
    reasons: list[str]
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """An answer as a person would have written it."""

    id: str
    turn_id: str
    person_id: str
    original: str
    edited: str
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A choice between two answers by an AI judge under a rubric."""

    id: str
    left_turn_id: str
    right_turn_id: str
    judge: str
    rubric_id: str
    choice: Choice
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """A version of an evaluation template: criteria, scale, examples."""

    id: str
    name: str
    version: int
    template: Json
    person_id: str
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The labels a run learns from, by id; `sha256` is over their canonical JSON."""

    id: str
    run_id: str
    sha256: str
    cut_off: float
    item_ids: Json
    """`{"comparisons": [...], "ratings": [...], "corrections": [...]}`"""
    counts: Json
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """A trained scorer: its files and how well it predicts people."""

    id: str
    run_id: str
    sha256: str
    path: str
    metrics: Json
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One immutable version of what can be served. Its id is also the engine's name for it."""

    id: str
    base_path: str
    """Absolute folder, or hub id, of the base model."""
    base_sha256: str
    """Digest of the base's weights, config and tokenizer."""
    adapter_path: str | None
    adapter_sha256: str | None
    parent_id: str | None
    run_id: str | None
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One alignment run. `progress` and `status` are the only parts that change."""

    id: str
    method: str
    trigger: RunTrigger
    config: Json
    seed: int
    code_version: str
    pid: int
    pid_started_at: float
    """Unix seconds, by the clock when the run was opened."""
    started_at: float
    status: RunStatus = "running"
    progress: Json = field(default_factory=dict)
    """`{"stage", "step", "steps", "message", "fraction", "eta_s"}`"""
    cost: Json = field(default_factory=dict)
    """`{"wall_s", "cpu_s", "peak_memory_bytes", "device"}`"""
    snapshot_id: str | None = None
    finished_at: float | None = None
    message: str = ""
    """Why it ended as it did, for a person."""
    process: str | None = None
    """What names the process for good, as `storage.processes` says it; None in runs of before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetric:
    """One point of a run's curves, such as `objective/kl` at step 30."""

    run_id: str
    name: str
    step: int
    value: float | None
    """None when it was not finite, which neither SQLite nor JSON can hold."""
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The evidence about a candidate and the gate's verdict on it."""

    id: str
    run_id: str
    policy_id: str
    incumbent_id: str
    numbers: Json
    """`{name: {"value", "low", "high", "threshold", "passed", "n"}}`"""
    samples: list[Json]
    """`[{"question", "incumbent", "candidate"}]`, side by side for the operator."""
    passed: bool
    reasons: list[str]
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person's decision, bound by hash to the bytes that were decided on."""

    id: str
    policy_id: str
    person_id: str
    decision: Decision
    reason: str
    sha256: str
    """Over adapter, snapshot, config and evaluation (`storage.policies.evidence_sha256`)."""
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A change of what is served. The served state is derived from the latest rows."""

    id: str
    policy_id: str
    role: DeploymentRole
    share: float
    """Part of the conversations, 0 to 1: 1 for stable, the canary's or shadow's share, 0 for retired."""
    actor: str
    reason: str
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowAnswer:
    """What the shadow answered to the question of a turn. Nobody is shown it, and it goes with its conversation."""

    id: str
    turn_id: str
    """The turn whose messages and sampling it was asked with."""
    deployment_id: str
    answer: str
    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    finish_reason: ShadowFinish
    first_token_s: float | None
    total_s: float
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong with a policy without leaving a turn."""

    id: str
    policy_id: str
    kind: FailureKind
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One link of the hash chain over everything that changed."""

    seq: int
    at: float
    actor: str
    action: str
    subject: str
    detail: Json
    previous_sha256: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What should answer now, derived from the deployment rows."""

    stable: Deployment
    previous: Deployment | None = None
    canary: Deployment | None = None
    canary_since: float | None = None
    """Since when conversations are drawn for the canary, at whatever share (Unix seconds); None before the server did."""
    shadow: Deployment | None = None
    """What is asked the same questions as stable, for nobody to see."""
