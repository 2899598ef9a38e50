"""Training of one reward adapter and its heads: a convex fit of the heads, then gradient steps on everything.

The heads are first fitted to the base's own last states by penalised logistic regression: exact, a second of
work, and with a few hundred labels most of the accuracy. The adapter starts at B = 0, so it begins from there.
Letters: C answers, D hidden size, M members, I items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from alignment.batching import Batch, Tree, collate, micro_batches
from alignment.distributed import ALONE, Crew
from alignment.logprobs import shares, states_at
from alignment.models import Base, active, adapter_parameters
from alignment.progress import Progress, stop_if_asked
from alignment.reward_items import Items, item_losses
from alignment.reward_losses import thumb_penalty
from alignment.training import (
    adamw,
    all_finite,
    clip_gradients,
    copy_weights,
    epoch_batches,
    rate_factor,
    restore_weights,
    set_rate,
)
from alignment.training_config import RewardConfig

Parameters = dict[str, torch.nn.Parameter]
"""heads (M, D), slopes (M,) and biases (raters, M)"""
FIT_ITERATIONS = 200
"""Of L-BFGS; the fit of some hundred items is done in fewer."""


def new_parameters(
    base: Base, items: Items, config: RewardConfig, *, seed: int, former: torch.Tensor | None = None
) -> Parameters:
    """Return random heads or the `former` (M, D) ones, slopes of 1, biases of 0."""
    size = int(base.model.config.hidden_size)
    heads = random_heads(config.members, size, seed=seed) if former is None else former.clone()
    raters = int(items.raters.max()) + 1 if len(items.thumbs) else 0
    start = {
        "heads": heads,
        "slopes": torch.full((config.members,), math.log(math.e - 1)),
        "biases": torch.zeros(raters, config.members),
    }
    return {name: torch.nn.Parameter(value.to(base.device)) for name, value in start.items()}


def random_heads(members: int, size: int, *, seed: int) -> torch.Tensor:
    """Return (M, D) draws from N(0, 1 / (D + 1)) (arXiv 2403.17031, detail 8), centred; a single one is zero.

    A random start is what lets members differ where the labels say nothing. Their mean is to say nothing there either: it
    would be an opinion of nobody's, and where labels contradict each other much of it is left.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(members, size, generator=generator) / math.sqrt(size + 1)
    return (drawn - drawn.mean(dim=0)) * math.sqrt(members / max(1, members - 1))


def last_states(
    base: Base,
    name: str | None,
    trees: Sequence[Tree],
    *,
    batch_tokens: int,
    progress: Progress,
    crew: Crew = ALONE,
) -> torch.Tensor:
    """Return (C, D) float32 hidden states of each answer's last token, tree by tree."""

    def last(base: Base, batch: Batch) -> torch.Tensor:
        return states_at(base, batch, batch.lasts).float()

    return of_answers(
        base, name, trees, last, parts=1, batch_tokens=batch_tokens, progress=progress, crew=crew
    )


def of_answers(
    base: Base,
    name: str | None,
    trees: Sequence[Tree],
    read: Callable[[Base, Batch], torch.Tensor],
    *,
    parts: int,
    batch_tokens: int,
    progress: Progress,
    crew: Crew,
) -> torch.Tensor:
    """Return (C, parts * D) float32 what `read` makes of each answer in a micro-batch, tree by tree."""
    share = shares(base, trees)
    starts = [0]
    for tree in trees:
        starts.append(starts[-1] + len(tree.completions))
    width = parts * int(base.model.config.hidden_size)
    result = torch.zeros(starts[-1], width, device=base.device)
    plans = micro_batches(trees, budget_tokens=base.budget(batch_tokens), share=share)
    watch = crew.begin(progress, "scoring answers")
    with active(base, name), torch.no_grad():
        for plan in crew.share(plans):
            stop_if_asked(watch, "scoring answers")
            batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
            owners = [number for i in plan for number in range(starts[i], starts[i + 1])]
            result[owners] = read(base, batch)
    crew.sum(result)  # exact: every row is one process's, and zero in the others
    return result


def fit_heads(states: torch.Tensor, own: Parameters, items: Items, config: RewardConfig) -> None:
    """Fit heads, slopes and biases to `states` (C, D) by L-BFGS, in place.

    The penalty pulls each head to its random start, measured in standard deviations of the states' features:
    where the labels say nothing the members keep differing (anchored ensembles, arXiv 1810.05546).
    """
    # wide, so that the optimum, which is unique without a flip rate, does not depend on the batches
    scaled = states.to(torch.float64, copy=True)
    scale = scaled.std(dim=0, correction=0) + 1e-4
    scaled /= scale
    anchor = own["heads"].detach() * scale
    fitted = {name: value.detach().double().requires_grad_() for name, value in own.items()}
    fitted["heads"] = anchor.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        list(fitted.values()),
        max_iter=FIT_ITERATIONS,
        history_size=50,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    everything = range(len(items.trees))

    def loss() -> torch.Tensor:
        """Return the penalised loss of all items, with its gradients formed."""
        optimiser.zero_grad()
        losses = item_losses(scaled @ fitted["heads"].T, fitted, items, everything, centring=config.centring)
        fit = (items.weights * losses).sum() / items.plain_weights.sum()
        away = config.head_penalty * (fitted["heads"] - anchor).square().sum()
        penalty = thumb_penalty(slopes=fitted["slopes"], biases=fitted["biases"])
        result = fit + away + config.rater_bias_penalty * penalty
        result.backward()  # type: ignore[no-untyped-call]
        return result

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    fitted["heads"] = fitted["heads"].detach() / scale
    if all_finite(fitted):
        restore_weights(own, fitted)


def train_member_heads(
    base: Base,
    name: str,
    items: Items,
    config: RewardConfig,
    *,
    seed: int,
    progress: Progress,
    former: torch.Tensor | None = None,
    crew: Crew = ALONE,
) -> tuple[torch.Tensor, str | None]:
    """Train one adapter and its heads; return the heads (M, D) and why it stopped early.

    With `former`, the heads of a warm start, the fit is pulled to them instead of to random ones.
    """
    adapter = adapter_parameters(base, name)
    own = new_parameters(base, items, config, seed=seed, former=former)
    progress.stage("reward heads", 1)
    states = last_states(
        base, name, items.trees, batch_tokens=config.batch_tokens, progress=progress, crew=crew
    )
    fit_heads(states, own, items, config)
    progress.step(1)
    parameters = {**adapter, **own}
    groups = [(list(adapter.values()), config.learning_rate), (list(own.values()), config.head_learning_rate)]
    optimiser = adamw(groups, weight_decay=config.weight_decay)
    batches = epoch_batches(len(items.trees), size=config.batch_pairs, epochs=config.epochs, seed=seed)
    good = copy_weights(parameters)
    progress.stage("reward model", len(batches))
    with active(base, name, trainable=True):
        for step, numbers in enumerate(batches):
            crew.begin(progress, "the reward model")
            set_rate(optimiser, rate_factor(step, len(batches), warmup_share=config.warmup_share))
            optimiser.zero_grad(set_to_none=True)
            loss = add_gradients(base, own, items, numbers, config, crew=crew)
            crew.sum_gradients(list(parameters.values()))
            norm = clip_gradients(list(parameters.values()), config.gradient_clip)
            if not math.isfinite(loss + norm):
                restore_weights(parameters, good)
                return own["heads"].detach(), f"reward/loss is not finite at step {step + 1}"
            good = copy_weights(parameters)
            optimiser.step()
            progress.step(step + 1, f"loss {loss:.3f}", **{"reward/loss": loss, "reward/gradient_norm": norm})
    return own["heads"].detach(), None


def add_gradients(
    base: Base,
    own: Parameters,
    items: Items,
    numbers: Sequence[int],
    config: RewardConfig,
    *,
    crew: Crew = ALONE,
) -> float:
    """Add the gradients of the items' weighted mean loss, over the members' mean; return that loss."""
    trees = [items.trees[number] for number in numbers]
    share = shares(base, trees)
    total = items.plain_weights[list(numbers)].sum()
    value = torch.zeros((), dtype=torch.float64)
    plans = micro_batches(trees, budget_tokens=base.budget(config.batch_tokens), share=share)
    for plan in crew.share(plans):
        ordered = sorted(plan, key=lambda i: numbers[i])  # pairs first, then thumbs
        batch = collate([trees[i] for i in ordered], share=share, pad_id=base.pad_id, device=base.device)
        scores = states_at(base, batch, batch.lasts).float() @ own["heads"].T  # (C, M)
        chosen = [numbers[i] for i in ordered]
        losses = item_losses(scores, own, items, chosen, centring=config.centring)  # (I, M)
        loss = (items.weights[chosen] * losses).sum() / (total * config.members)
        loss.backward()  # type: ignore[no-untyped-call]
        value += float(loss.detach())
    if crew.rank == 0:  # once, not once a process
        penalty = thumb_penalty(slopes=own["slopes"], biases=own["biases"])
        (config.rater_bias_penalty / config.members * penalty).backward()  # type: ignore[no-untyped-call]
    crew.sum(value)
    return float(value)
