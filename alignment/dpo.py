"""Direct preference optimisation: trains the adapter "policy" on pairs, against the adapter "reference".

The reference is fixed for the whole run (no refresh). PPO and KTO are other modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from alignment.batching import Tree, collate, make_tree, micro_batches, pays_to_share
from alignment.displacement import Change, displacement, raised_nll_weight
from alignment.dpo_losses import pair_losses
from alignment.kl_budget import kl_per_response
from alignment.logprobs import completion_sums, token_logprobs
from alignment.models import Base, active, adapter_parameters, has_adapter
from alignment.preferences import Pair
from alignment.progress import Interrupted, Progress
from alignment.reference_cache import ReferenceCache, reference_logprobs
from alignment.training import (
    Weights,
    adamw,
    all_finite,
    clip_gradients,
    copy_weights,
    epoch_batches,
    rate_factor,
    read_checkpoint,
    restore_weights,
    set_rate,
    write_checkpoint,
)
from alignment.training_config import DpoConfig
from storage.digests import sha256_of
from storage.errors import InvalidField

__all__ = ["DpoConfig", "DpoResult", "train_dpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoResult:
    """How the training ended. The adapter "policy" holds the last good weights in any case."""

    metrics: dict[str, float]
    """Means over the last window of steps, by the curves' names."""
    steps: int
    """Optimiser steps done."""
    stopped_because: str | None
    """None when it ran to its end."""


@dataclass(frozen=True, slots=True)
class _Data:
    """The pairs as tensors, in their order: P pairs."""

    trees: list[Tree]
    reference: torch.Tensor  # (P, 2) nats
    weights: torch.Tensor  # (P,)
    margins: torch.Tensor  # (P,)
    dpop_weights: torch.Tensor  # (P,)
    kl_prompts: list[tuple[int, ...]]
    """Where the KL is measured: different prompts of the pairs."""


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

    parameters: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    batches: list[list[int]]
    good: Weights
    """The last weights that were neither displaced nor broken."""
    state: _State
    checkpoint: Path | None
    fingerprint: str


def train_dpo(
    base: Base,
    pairs: Sequence[Pair],
    config: DpoConfig,
    *,
    seed: int,
    progress: Progress,
    cache: ReferenceCache | None = None,
    checkpoint: Path | None = None,
) -> DpoResult:
    """Train the adapter "policy" (`models.add_policy`) on the pairs; ties teach it nothing and are left out.

    It stops itself, with a reason, on numbers that are not finite and on displacement that a raised NLL
    term does not cure. With `checkpoint`, a file, an interrupted run resumes to the same weights.

    Raises:
        InvalidField: no pairs, no adapter "policy", or a setting out of range.
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    pairs = [pair for pair in pairs if not pair.tie]
    _check(base, pairs, config)
    data = _prepare(base, pairs, config, cache=cache, progress=progress)
    training = _start(base, pairs, config, seed=seed, checkpoint=checkpoint)
    progress.stage("dpo", len(training.batches))
    stopped_because = _train(base, data, config, training, progress)
    if stopped_because is None and not all_finite(training.parameters):
        stopped_because = "a weight of the adapter is not finite"
    if stopped_because is not None:
        restore_weights(training.parameters, training.good)
    state = training.state
    return DpoResult(metrics=_means(state.curves), steps=state.step, stopped_because=stopped_because)


def _check(base: Base, pairs: Sequence[Pair], config: DpoConfig) -> None:
    if not pairs:
        raise InvalidField("pairs", 0, "collect comparisons with a winner first")
    if not has_adapter(base, "policy"):
        raise InvalidField("adapter", "policy", "call add_policy first")
    if not 0 <= config.flip_rate <= 0.45:
        raise InvalidField("dpo.flip_rate", config.flip_rate, "use 0 to 0.45")
    if config.beta <= 0:
        raise InvalidField("dpo.beta", config.beta, "use a number above 0")


def _prepare(
    base: Base, pairs: Sequence[Pair], config: DpoConfig, *, cache: ReferenceCache | None, progress: Progress
) -> _Data:
    """Lay out the pairs and score them under the reference."""
    rows = [(p.prompt_ids, answer) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)]
    progress.stage("reference", 1)
    scored = reference_logprobs(base, rows, cache=cache, batch_tokens=config.batch_tokens, progress=progress)
    progress.step(1)
    sums = torch.tensor([float(values.sum(dtype="float64")) for values in scored])
    dpop = [config.correction_dpop_weight if p.source == "correction" else 0.0 for p in pairs]
    return _Data(
        trees=[make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in pairs],
        reference=sums.view(-1, 2).to(base.device),
        weights=torch.tensor([p.weight for p in pairs], device=base.device),
        margins=torch.tensor([p.margin for p in pairs], device=base.device),
        dpop_weights=torch.tensor(dpop, device=base.device),
        kl_prompts=list(dict.fromkeys(tuple(pair.prompt_ids) for pair in pairs))[: config.kl_prompts],
    )


def _start(
    base: Base, pairs: Sequence[Pair], config: DpoConfig, *, seed: int, checkpoint: Path | None
) -> _Training:
    """Set up the optimiser and the order of pairs, and go on from the checkpoint if there is one."""
    parameters = adapter_parameters(base, "policy")
    training = _Training(
        parameters=parameters,
        optimiser=adamw(
            [(list(parameters.values()), config.learning_rate)], weight_decay=config.weight_decay
        ),
        batches=epoch_batches(len(pairs), size=config.batch_pairs, epochs=config.epochs, seed=seed),
        good=copy_weights(parameters),
        state=_State(nll_weight=config.nll_weight),
        checkpoint=checkpoint,
        fingerprint=sha256_of([asdict(config), seed, [asdict(pair) for pair in pairs]]),
    )
    saved = read_checkpoint(checkpoint, fingerprint=training.fingerprint) if checkpoint else None
    if saved is not None:
        restore_weights(parameters, saved["weights"])
        training.optimiser.load_state_dict(saved["optimiser"])
        training.good = {name: weight.to(base.device) for name, weight in saved["good"].items()}
        window = [Change(**change) for change in saved["state"].pop("window")]
        training.state = _State(**saved["state"], window=window)
    return training


def _save(training: _Training) -> None:
    if training.checkpoint is not None:
        content = {
            "fingerprint": training.fingerprint,
            "weights": copy_weights(training.parameters),
            "good": training.good,
            "optimiser": training.optimiser.state_dict(),
            "state": asdict(training.state),
        }
        write_checkpoint(training.checkpoint, content)


def _train(base: Base, data: _Data, config: DpoConfig, training: _Training, progress: Progress) -> str | None:
    """Take the optimiser steps that are left; return why it stopped early."""
    state, steps = training.state, len(training.batches)
    while state.step < steps:
        stop = progress.should_stop()
        if stop or (state.step and state.step % config.checkpoint_every == 0):
            _save(training)
        if stop:
            raise Interrupted(f"training was stopped on request after {state.step} of {steps} steps")
        # 1. gradients of the whole batch, summed over its micro-batches
        training.optimiser.zero_grad(set_to_none=True)
        numbers = training.batches[state.step]
        with active(base, "policy", trainable=True):
            curves = _gradients(base, data, numbers, config, nll_weight=state.nll_weight)
        curves["dpo/gradient_norm"] = clip_gradients(list(training.parameters.values()), config.gradient_clip)
        # 2. is it still learning what it should?
        reason = _watch(curves, training, config)
        if reason is not None:
            return reason
        # 3. one step
        factor = rate_factor(state.step, steps, warmup_share=config.warmup_share)
        set_rate(training.optimiser, factor)
        training.optimiser.step()
        state.step += 1
        state.curves = [*state.curves, curves][-config.displacement_window :]
        # 4. has it gone as far as it may?
        spent = _kl(base, data, state, config)
        curves |= spent
        progress.step(state.step, f"{curves['dpo/accuracy']:.0%} of pairs ranked as people did", **curves)
        if spent.get("dpo/kl_per_response_nats", 0.0) >= config.kl_budget_nats > 0:
            break
    return None


def _kl(base: Base, data: _Data, state: _State, config: DpoConfig) -> dict[str, float]:
    """Return the KL of an answer from the reference, every few steps."""
    if config.kl_budget_nats == 0 or state.step % config.kl_every:
        return {}
    with torch.no_grad():
        return {"dpo/kl_per_response_nats": kl_per_response(base, data.kl_prompts, seed=state.step)}


def _gradients(
    base: Base, data: _Data, numbers: Sequence[int], config: DpoConfig, *, nll_weight: float
) -> dict[str, float]:
    """Add the gradients of the pairs' weighted mean loss and return the step's curves.

    Every micro-batch divides by the whole batch's weight, so the split changes nothing.
    """
    trees = [data.trees[number] for number in numbers]
    share = base.share_prefixes and pays_to_share(trees)
    total = data.weights[list(numbers)].sum()
    sums = torch.zeros(5, device=base.device)
    for plan in micro_batches(trees, budget_tokens=config.batch_tokens or base.batch_tokens, share=share):
        batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
        own = torch.tensor([numbers[i] for i in plan], device=base.device)
        policy = completion_sums(token_logprobs(base, batch), batch).view(-1, 2)  # (P, 2)
        lengths = batch.lengths.view(-1, 2).to(policy.dtype)
        losses = pair_losses(
            policy,
            data.reference[own],
            lengths,
            margins=data.margins[own],
            dpop_weights=data.dpop_weights[own],
            nll_weight=nll_weight,
            config=config,
        )
        loss = (data.weights[own] * losses).sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        sums += _step_sums(policy.detach() - data.reference[own], lengths, loss.detach(), config)
    means = (sums / torch.tensor([1.0, *[len(numbers)] * 4], device=base.device)).tolist()
    names = ("loss", "accuracy", "h_nats", "chosen_change_nats_per_token", "chosen_falling_share")
    return {
        **{f"dpo/{name}": value for name, value in zip(names, means, strict=True)},
        "dpo/nll_weight": nll_weight,
    }


def _step_sums(
    ratios: torch.Tensor, lengths: torch.Tensor, loss: torch.Tensor, config: DpoConfig
) -> torch.Tensor:
    """Return (5,): the loss and, over pairs, how many are ranked right, h, the chosen's change, how many fell."""
    h = ratios[:, 0] - ratios[:, 1]
    change = ratios[:, 0] / lengths[:, 0]
    falling = change < -config.falling_floor_nats_per_token
    right = (h > 0).to(h.dtype) + 0.5 * (h == 0).to(h.dtype)
    return torch.stack([loss, right.sum(), h.sum(), change.sum(), falling.to(h.dtype).sum()])


def _watch(curves: dict[str, float], training: _Training, config: DpoConfig) -> str | None:
    """Keep good weights; raise the NLL term on displacement; return why training must stop."""
    broken = [name for name, value in curves.items() if not math.isfinite(value)]
    if broken:
        return f"{broken[0]} is not finite at step {training.state.step + 1}"
    state = training.state
    state.window.append(
        Change(
            nats_per_token=curves["dpo/chosen_change_nats_per_token"],
            falling_share=curves["dpo/chosen_falling_share"],
        )
    )
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
