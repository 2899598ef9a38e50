"""The loop around the gradients of a method that trains the adapter "policy" on fixed answers: DPO and KTO.

The method brings its batches and the gradients of one; here are the steps, the watch over displacement, the KL
budgets, the last good weights, and a checkpoint that resumes exactly. PPO, which samples its answers, is another module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from alignment.displacement import Change, displacement, raised_nll_weight
from alignment.distributed import Crew
from alignment.kl_budget import Kl, Limits, kl_per_response, told_of_base
from alignment.models import Base, adapter_parameters, has_adapter
from alignment.progress import Interrupted, Progress
from alignment.training import (
    Weights,
    adamw,
    all_finite,
    clip_gradients,
    copy_weights,
    rate_factor,
    read_checkpoint,
    restore_weights,
    set_rate,
    write_checkpoint,
)
from alignment.training_config import DpoConfig, KtoConfig

HALVINGS = 4
"""How often the way back from over a KL budget is halved: to a sixteenth of the last steps."""
PolicyConfig = DpoConfig | KtoConfig
Gradients = Callable[[Sequence[int], float], tuple[dict[str, float], Change | None]]
"""Adds the gradients of a batch's loss, given its items and the weight of the NLL term; returns the step's curves and
how the answers that people preferred have moved (None: the batch has none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """How the training ended. The adapter "policy" holds the last good weights in any case."""

    metrics: dict[str, float]
    """Means over the last window of steps, by the curves' names."""
    steps: int
    """Optimiser steps done."""
    stopped_because: str | None
    """None when it ran to its end."""
    moved: bool
    """Whether the policy is another than it began with."""
    held: str
    """For people: what the KL budget from the base did to the training; "" where it did not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What tells one method from another."""

    name: str
    """Of the stage; the curves' names begin with it, and `name/accuracy` is among them."""
    gradients: Gradients
    batches: list[list[int]]
    """The items of each optimiser step."""
    kl_prompts: list[tuple[int, ...]]
    """Where the KL is measured."""
    accuracy_says: str
    """What `name/accuracy` is a share of, for people."""
    fingerprint: str
    """Of everything the training depends on: a checkpoint of another is refused."""


@dataclass(slots=True)
class _State:
    """Everything besides weights and optimiser that a resumed run must know."""

    nll_weight: float
    began_from_base: float | None = None
    """KL from the base of the policy it began with, in nats; None: not measured, for it is the base or has no limit."""
    step: int = 0
    raises: int = 0
    window: list[Change] = field(default_factory=list)
    """Since the last raise."""
    curves: list[dict[str, float]] = field(default_factory=list)
    """The latest steps', for the result."""


@dataclass(slots=True)
class _Training:
    """One training under way."""

    parameters: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    good: Weights
    """The last weights that were neither displaced nor broken."""
    within: Weights
    """The last weights whose KL was measured within the budgets."""
    state: _State
    checkpoint: Path | None
    fingerprint: str
    held_by_base: bool = False
    """Whether it ended at the limit from the base."""


def train_policy(
    base: Base,
    method: Method,
    config: PolicyConfig,
    *,
    progress: Progress,
    checkpoint: Path | None,
    crew: Crew,
) -> PolicyResult:
    """Train the adapter "policy" to the end of the batches or of a KL budget.

    A policy that begins beyond the budget from the base may change but not move farther away: labels that lead back, or
    elsewhere, are still learnt.

    It stops itself, with a reason, on numbers that are not finite and on displacement that a raised NLL
    term does not cure. With `checkpoint`, a file, an interrupted run resumes to the same weights.

    Raises:
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    began = copy_weights(adapter_parameters(base, "policy"))
    training = _start(base, method, config, checkpoint=checkpoint, crew=crew)
    progress.stage(method.name, len(method.batches))
    stopped_because = _train(base, method, config, training, progress, crew)
    if stopped_because is None and not all_finite(training.parameters):
        stopped_because = "a weight of the adapter is not finite"
    if stopped_because is not None:
        restore_weights(training.parameters, training.good)
    return _result(method, config, training, began, stopped_because)


def _result(
    method: Method, config: PolicyConfig, training: _Training, began: Weights, stopped_because: str | None
) -> PolicyResult:
    """Tell how it ended, given the weights it began with."""
    state = training.state
    moved = any(not torch.equal(weight, began[name]) for name, weight in training.parameters.items())
    held = told_of_base(
        budget=config.kl_base_budget_nats,
        began=state.began_from_base or 0.0,
        passed=training.held_by_base,
        moved=moved,
        setting=f"{method.name}.kl_base_budget_nats",
    )
    return PolicyResult(
        metrics=_means(state.curves),
        steps=state.step,
        stopped_because=stopped_because,
        moved=moved,
        held=held,
    )


def _start(
    base: Base, method: Method, config: PolicyConfig, *, checkpoint: Path | None, crew: Crew
) -> _Training:
    """Set up the optimiser, and go on from the checkpoint if there is one."""
    parameters = adapter_parameters(base, "policy")
    training = _Training(
        parameters=parameters,
        optimiser=adamw(
            [(list(parameters.values()), config.learning_rate)], weight_decay=config.weight_decay
        ),
        good=copy_weights(parameters),
        within=copy_weights(parameters),
        state=_State(nll_weight=config.nll_weight),
        checkpoint=checkpoint,
        fingerprint=method.fingerprint,
    )
    saved = crew.told(read_checkpoint(checkpoint, fingerprint=method.fingerprint) if checkpoint else None)
    if saved is not None:
        restore_weights(parameters, saved["weights"])
        training.optimiser.load_state_dict(saved["optimiser"])
        training.good, training.within = (
            {name: weight.to(base.device) for name, weight in saved[kept].items()}
            for kept in ("good", "within")
        )
        window = [Change(**change) for change in saved["state"].pop("window")]
        training.state = _State(**saved["state"], window=window)
    elif config.kl_base_budget_nats > 0 and has_adapter(base, "reference"):
        training.state.began_from_base = _kl(base, method, training.state, crew).from_base
    return training


def _save(training: _Training) -> None:
    if training.checkpoint is not None:
        content = {
            "fingerprint": training.fingerprint,
            "weights": copy_weights(training.parameters),
            "good": training.good,
            "within": training.within,
            "optimiser": training.optimiser.state_dict(),
            "state": asdict(training.state),
        }
        write_checkpoint(training.checkpoint, content)


def _train(
    base: Base,
    method: Method,
    config: PolicyConfig,
    training: _Training,
    progress: Progress,
    crew: Crew,
) -> str | None:
    """Take the optimiser steps that are left; return why it stopped early."""
    state, name, steps = training.state, method.name, len(method.batches)
    while state.step < steps:
        stop = crew.any(progress.should_stop())
        if crew.rank == 0 and (stop or (state.step and state.step % config.checkpoint_every == 0)):
            _save(training)
        if stop:
            raise Interrupted(f"training was stopped on request after {state.step} of {steps} steps")
        # 1. gradients of the whole batch, summed over its micro-batches
        training.optimiser.zero_grad(set_to_none=True)
        curves, change = method.gradients(method.batches[state.step], state.nll_weight)
        crew.sum_gradients(list(training.parameters.values()))
        norm = clip_gradients(list(training.parameters.values()), config.gradient_clip)
        curves[f"{name}/gradient_norm"] = norm
        # 2. is it still learning what it should?
        reason = _watch(curves, change, training, config)
        if reason is not None:
            return reason
        # 3. one step
        factor = rate_factor(state.step, steps, warmup_share=config.warmup_share)
        set_rate(training.optimiser, factor)
        training.optimiser.step()
        state.step += 1
        state.curves = [*state.curves, curves][-config.displacement_window :]
        # 4. has it gone as far as it may?
        over = False
        if _limits(config, state) and state.step % config.kl_every == 0:
            kl, over = _held(base, method, config, training, crew)
            curves[f"{name}/kl_per_response_nats"] = kl.from_reference
            curves[f"{name}/kl_from_base_nats"] = kl.from_base
        progress.step(state.step, f"{curves[f'{name}/accuracy']:.0%} {method.accuracy_says}", **curves)
        if over:
            break
    return None


def _limits(config: PolicyConfig, state: _State) -> Limits:
    """Return how far the policy may go; one that began beyond the budget from the base, no farther than there."""
    from_base = config.kl_base_budget_nats
    if state.began_from_base is not None:
        from_base = max(from_base, state.began_from_base)
    return Limits(from_reference=config.kl_budget_nats, from_base=from_base)


def _kl(base: Base, method: Method, state: _State, crew: Crew) -> Kl:
    """Return the KL of an answer.

    Where it is compared with that of the beginning, all measurements draw as the first did: what differs is the policy.
    """
    seed = state.step if state.began_from_base is None else 0
    with torch.no_grad():
        return kl_per_response(base, method.kl_prompts, seed=seed, crew=crew)


def _held(
    base: Base, method: Method, config: PolicyConfig, training: _Training, crew: Crew
) -> tuple[Kl, bool]:
    """Bring the policy back if it is beyond a limit; return its KL and whether it was."""
    state = training.state
    limits, kl = _limits(config, state), _kl(base, method, state, crew)
    if not limits.passed_by(kl):
        training.within = copy_weights(training.parameters)
        return kl, False
    back = _step_back(base, method, limits, training, crew)
    training.held_by_base = limits.held_by_base(kl, back)
    return back, True


def _step_back(base: Base, method: Method, limits: Limits, training: _Training, crew: Crew) -> Kl:
    """Go back from weights beyond a limit towards the last ones within both; return the KL there.

    In the steep part of a training two steps can more than double the KL, so the end is looked for on the line between
    both by halving: as far as it may, and no farther.
    """
    there, within, found, share = copy_weights(training.parameters), 0.0, None, 1.0
    beyond = True
    for halving in range(1, HALVINGS + 1):
        share += (-1 if beyond else 1) * 0.5**halving
        _put_between(training, there, share)
        kl = _kl(base, method, training.state, crew)
        beyond = limits.passed_by(kl)
        if not beyond:
            within, found = share, kl
    _put_between(training, there, within)
    return found or _kl(base, method, training.state, crew)


def _put_between(training: _Training, there: Weights, share: float) -> None:
    """Set the weights to the last ones within the budgets plus `share` of the way from them."""
    between = {name: torch.lerp(training.within[name], weight, share) for name, weight in there.items()}
    restore_weights(training.parameters, between)


def _watch(
    curves: dict[str, float], change: Change | None, training: _Training, config: PolicyConfig
) -> str | None:
    """Keep good weights; raise the NLL term on displacement; return why training must stop."""
    broken = [name for name, value in curves.items() if not math.isfinite(value)]
    if broken:
        return f"{broken[0]} is not finite at step {training.state.step + 1}"
    state = training.state
    if change is not None:
        state.window.append(change)
    reason = displacement(state.window, config)
    if reason is None:
        if state.raises == 0 or len(state.window) >= config.displacement_window:
            training.good = copy_weights(training.parameters)
        return None
    if state.raises == config.displacement_raises:
        return f"{reason}, also with an NLL term of {state.nll_weight:g}"
    state.nll_weight = raised_nll_weight(state.nll_weight, config)
    state.raises += 1
    state.window = []
    return None


def _means(curves: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for step in curves for name in step)
    seen = {name: [step[name] for step in curves if name in step] for name in names}
    return {name: sum(values) / len(values) for name, values in seen.items()}
