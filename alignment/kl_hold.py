"""Holds the adapter "policy" within its KL budgets while DPO, KTO or PPO trains it, and tells people what that did.

A training that ends when a budget is spent holds the policy equally near to its origin whatever the number of labels: a
count of steps does not (the same recipe moved a small snapshot by 0.05 nats an answer and a large one by 2.3). A budget
from the base, which all rounds share, holds in rounds too: each later round may spend a part of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from alignment.distributed import Crew
from alignment.kl_budget import Kl, Limits, kl_per_response
from alignment.models import Base, adapter_parameters, has_adapter
from alignment.training import Weights, copy_weights, restore_weights
from alignment.training_config import BaseBudget

HALVINGS = 4
"""How often the way back from over a KL budget is halved: to a sixteenth of the way."""


@dataclass(slots=True, kw_only=True)
class Hold:
    """What holds one training. A policy that begins beyond the budget from the base may change but not move farther away:
    labels that lead back, or elsewhere, are still learnt."""

    base: Base
    budget: BaseBudget
    own_nats: float
    """Budget from the reference; 0 for none."""
    prompts: Sequence[tuple[int, ...]]
    """Where the KL is measured."""
    crew: Crew
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    began: Weights = field(init=False)
    within: Weights = field(init=False)
    """The last weights whose KL was measured within the limits."""
    began_from_base: float | None = None
    """KL from the base of the policy it began with, in nats; None: not measured, for it is the base or has no limit."""
    reached_base: bool = False
    """Whether it ended at the limit from the base."""

    def __post_init__(self) -> None:
        """Remember the weights that the training begins with."""
        self.parameters = adapter_parameters(self.base, "policy")
        self.began = self.within = copy_weights(self.parameters)

    def begin(self) -> None:
        """Measure where a later round begins."""
        if self.budget.kl_base_budget_nats > 0 and has_adapter(self.base, "reference"):
            self.began_from_base = self.measured(0).from_base

    def limits(self) -> Limits:
        """Return how far the policy may go: in a later round, so far that a part of the budget from the base is left."""
        from_base, began = self.budget.kl_base_budget_nats, self.began_from_base
        if began is not None:
            from_base = began + self.budget.kl_base_share * max(0.0, from_base - began)
        return Limits(from_reference=self.own_nats, from_base=from_base)

    def measured(self, step: int) -> Kl:
        """Return the KL of an answer.

        Where it is compared with that of the beginning, all measurements draw as the first did: what differs is the
        policy.
        """
        seed = step if self.began_from_base is None else 0
        with torch.no_grad():
            return kl_per_response(self.base, self.prompts, seed=seed, crew=self.crew)

    def hold(self, step: int) -> tuple[Kl, bool]:
        """Bring the policy back if it is beyond a limit; return its KL and whether it was."""
        limits, kl = self.limits(), self.measured(step)
        if not limits.passed_by(kl):
            self.within = copy_weights(self.parameters)
            return kl, False
        back = self._step_back(limits, step)
        self.reached_base = limits.held_by_base(kl, back)
        return back, True

    def _step_back(self, limits: Limits, step: int) -> Kl:
        """Go back from weights beyond a limit towards the last ones within both; return the KL there.

        In the steep part of a training two steps can more than double the KL, so the end is looked for on the line
        between both by halving: as far as it may, and no farther.
        """
        there, within, found, share = copy_weights(self.parameters), 0.0, None, 1.0
        beyond = True
        for halving in range(1, HALVINGS + 1):
            share += (-1 if beyond else 1) * 0.5**halving
            self._put_between(there, share)
            kl = self.measured(step)
            beyond = limits.passed_by(kl)
            if not beyond:
                within, found = share, kl
        self._put_between(there, within)
        return found or self.measured(step)

    def _put_between(self, there: Weights, share: float) -> None:
        """Set the weights to the last ones within the limits plus `share` of the way from them."""
        between = {name: torch.lerp(self.within[name], weight, share) for name, weight in there.items()}
        restore_weights(self.parameters, between)

    def moved(self) -> bool:
        """Return whether the policy is another than it began with."""
        return any(not torch.equal(weight, self.began[name]) for name, weight in self.parameters.items())

    def saved(self) -> dict[str, Any]:
        """Return what a resumed training must know, for its checkpoint."""
        return {"within": self.within, "began_from_base": self.began_from_base}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what was saved."""
        self.within = {name: weight.to(self.base.device) for name, weight in saved["within"].items()}
        self.began_from_base = saved["began_from_base"]

    def told(self, method: str) -> str:
        """Return, for people, what the budget from the base did to the training; "" where it did not matter."""
        began, most, limit = (
            self.began_from_base or 0.0,
            self.budget.kl_base_budget_nats,
            self.limits().from_base,
        )
        budget = f"{most:.3g} ({method}.kl_base_budget_nats)"
        if self.reached_base and not self.moved():
            return (
                "No candidate was made, and the served policy stays: what these labels ask for leads farther away from "
                f"the base model than training may go. The served policy's answers are {began:.3g} nats from the base's; "
                f"this run might take them to {limit:.3g}, all runs together to {budget}. If its answers are good, raise "
                "that setting; if they have become worse, roll back to an earlier policy. Labels that ask for something "
                "else can still be learnt."
            )
        if began > most > 0:
            return (
                f"The served policy's answers are already {began:.3g} nats from the base model's, and training may take "
                f"them to {budget}: the candidate was allowed to change, but not to move farther away."
            )
        if self.reached_base:
            return (
                "Training ended early: the candidate's answers are as far from the base model's as this run may take "
                f"them, {limit:.3g} nats, so that later runs have room; all together may take them to {budget}."
            )
        return ""
