"""The loop around the gradients of a method that trains the adapter "policy" on fixed answers: DPO and KTO.

The method brings its batches and the gradients of one; here are the steps, the watch over displacement, the KL
budgets, the last good weights, and a checkpoint that resumes exactly. PPO, which samples its answers, is another module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from alignment.displacement import Change, displacement, raised_nll_weight
from alignment.distributed import Crew
from alignment.kl_hold import Hold
from alignment.models import Base
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
from alignment.training_config import FixedAnswersConfig

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
    learnt_from: str = ""
    """For people: which answers it learnt from, where that could have been others."""


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
    before_step: Callable[[int], None] = lambda step: None
    """Called with the number of steps done before the next one; one that is interrupted changes nothing."""
    changing: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What `before_step` changes in place: a checkpoint holds it."""


@dataclass(slots=True)
class _State:
    """Everything besides weights and optimiser that a resumed run must know."""

    nll_weight: float
    step: int = 0
    raises: int = 0
    window: list[Change] = field(default_factory=list)
    """Since the last raise."""
    curves: list[dict[str, float]] = field(default_factory=list)
    """The latest steps', for the result."""


@dataclass(slots=True)
class _Training:
    """One training under way."""

    hold: Hold
    parameters: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    good: Weights
    """The last weights that were neither displaced nor broken."""
    state: _State
    checkpoint: Path | None
    method: Method


def train_policy(
    base: Base,
    method: Method,
    config: FixedAnswersConfig,
    *,
    progress: Progress,
    checkpoint: Path | None,
    crew: Crew,
) -> PolicyResult:
    """Train the adapter "policy" to the end of the batches or of a KL budget.

    It stops itself, with a reason, on numbers that are not finite and on displacement that a raised NLL
    term does not cure. With `checkpoint`, a file, an interrupted run resumes to the same weights.

    Raises:
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    training = _start(base, method, config, checkpoint=checkpoint, crew=crew)
    progress.stage(method.name, len(method.batches))
    stopped_because = _train(method, config, training, progress, crew)
    if stopped_because is None and not all_finite(training.parameters):
        stopped_because = "a weight of the adapter is not finite"
    if stopped_because is not None:
        restore_weights(training.parameters, training.good)
    if training.hold.limits() and (stopped_because or training.state.step % config.kl_every):
        training.hold.hold(training.state.step)  # not measured since these weights were reached
    return PolicyResult(
        metrics=_means(training.state.curves),
        steps=training.state.step,
        stopped_because=stopped_because,
        moved=training.hold.moved(),
        held=training.hold.told(method.name),
    )


def _start(
    base: Base, method: Method, config: FixedAnswersConfig, *, checkpoint: Path | None, crew: Crew
) -> _Training:
    """Set up the optimiser, and go on from the checkpoint if there is one."""
    hold = Hold(
        base=base, budget=config, own_nats=config.kl_budget_nats, prompts=method.kl_prompts, crew=crew
    )
    parameters = hold.parameters
    training = _Training(
        hold=hold,
        parameters=parameters,
        optimiser=adamw(
            [(list(parameters.values()), config.learning_rate)], weight_decay=config.weight_decay
        ),
        good=copy_weights(parameters),
        state=_State(nll_weight=config.nll_weight),
        checkpoint=checkpoint,
        method=method,
    )
    saved = crew.told(read_checkpoint(checkpoint, fingerprint=method.fingerprint) if checkpoint else None)
    if saved is not None:
        restore_weights(parameters, saved["weights"])
        training.optimiser.load_state_dict(saved["optimiser"])
        training.good = {name: weight.to(base.device) for name, weight in saved["good"].items()}
        hold.restore(saved["hold"])
        for name, tensor in method.changing.items():
            tensor.copy_(saved["changing"][name])
        window = [Change(**change) for change in saved["state"].pop("window")]
        training.state = _State(**saved["state"], window=window)
    else:
        hold.begin()
    return training


def _save(training: _Training) -> None:
    if training.checkpoint is not None:
        content = {
            "fingerprint": training.method.fingerprint,
            "weights": copy_weights(training.parameters),
            "good": training.good,
            "hold": training.hold.saved(),
            "changing": {name: tensor.cpu() for name, tensor in training.method.changing.items()},
            "optimiser": training.optimiser.state_dict(),
            "state": asdict(training.state),
        }
        write_checkpoint(training.checkpoint, content)


def _train(
    method: Method,
    config: FixedAnswersConfig,
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
        try:
            method.before_step(state.step)
        except Interrupted:  # nothing of this step has changed yet
            if crew.rank == 0:
                _save(training)
            raise
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
        if training.hold.limits() and state.step % config.kl_every == 0:
            kl, over = training.hold.hold(state.step)
            curves[f"{name}/kl_per_response_nats"] = kl.from_reference
            curves[f"{name}/kl_from_base_nats"] = kl.from_base
        progress.step(state.step, f"{curves[f'{name}/accuracy']:.0%} {method.accuracy_says}", **curves)
        if over:
            break
    return None


def _watch(
    curves: dict[str, float], change: Change | None, training: _Training, config: FixedAnswersConfig
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
