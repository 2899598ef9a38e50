"""How a run ended, for whoever started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage import policies
from storage.records import Policy, Run, RunStatus
from storage.store import Store

OUTCOME_EXIT_CODES: Mapping[RunStatus, int] = {
    "passed": 0,
    "failed": 1,
    "refused": 3,
    "not_enough_data": 4,
    "cancelled": 130,
}
"""What the command line returns; 2 is bad input, 130 what shells use for an interrupted program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    status: RunStatus
    message: str
    run_id: str
    policy_id: str | None = None
    reasons: tuple[str, ...] = ()
    """Why the gate refused."""

    @property
    def exit_code(self) -> int:
        """Return what the command line returns."""
        return OUTCOME_EXIT_CODES[self.status]


def recorded_outcome(store: Store, run: Run) -> Outcome:
    """Return the outcome of a run that another process did."""
    made = store.all(Policy, "run_id = ?", [run.id])
    evaluation = policies.evaluation_of(store, made[0].id) if made else None
    refused = evaluation is not None and run.status == "refused"
    return Outcome(
        status=run.status,
        message=run.message,
        run_id=run.id,
        policy_id=made[0].id if made else None,
        reasons=tuple(evaluation.reasons) if evaluation is not None and refused else (),
    )
