"""Direct preference optimisation: trains the adapter "policy" on pairs, against the adapter "reference".

The reference is fixed, or follows the policy in hard steps (`DpoConfig.reference_every`). PPO and KTO are other modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from alignment.batching import Tree, collate, make_tree, micro_batches, sent
from alignment.displacement import Change
from alignment.distributed import ALONE, Crew
from alignment.dpo_losses import pair_losses
from alignment.kl_budget import where_measured
from alignment.logprobs import Row, completion_logprobs, completion_sums, shares, token_logprobs
from alignment.models import Base, active, has_adapter
from alignment.policy_training import Method, PolicyResult, train_policy
from alignment.preferences import Pair
from alignment.progress import Progress
from alignment.reference_cache import ReferenceCache, reference_logprobs
from alignment.training import epoch_batches
from alignment.training_config import DpoConfig, deciding
from storage.digests import sha256_of
from storage.errors import InvalidField

__all__ = ["DpoConfig", "DpoResult", "train_dpo"]

DpoResult = PolicyResult


@dataclass(frozen=True, slots=True)
class _Data:
    """The pairs as tensors, in their order: P pairs."""

    trees: list[Tree]
    rows: Sequence[Row]  # (2 P,) chosen and rejected in turn
    start: torch.Tensor  # (P, 2) nats under the adapter "reference"
    reference: torch.Tensor  # (P, 2) nats that the loss measures from
    weights: torch.Tensor  # (P,)
    margins: torch.Tensor  # (P,)
    dpop_weights: torch.Tensor  # (P,)


def train_dpo(
    base: Base,
    pairs: Sequence[Pair],
    config: DpoConfig,
    *,
    seed: int,
    progress: Progress,
    unseen: Sequence[Sequence[int]] = (),
    cache: ReferenceCache | None = None,
    checkpoint: Path | None = None,
    crew: Crew = ALONE,
) -> DpoResult:
    """Train the adapter "policy" (`models.add_policy`) on the pairs; ties teach it nothing and are left out.

    It stops itself, with a reason, on numbers that are not finite and on displacement that a raised NLL
    term does not cure. With `checkpoint`, a file, an interrupted run resumes to the same weights.

    Args:
        unseen: prompts that the policy does not learn from: its KL is measured there.

    Raises:
        InvalidField: no pairs, no adapter "policy", or a setting out of range.
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    pairs = [pair for pair in pairs if not pair.tie]
    _check(base, pairs, config)
    data = _prepare(base, pairs, config, cache=cache, progress=progress, crew=crew)
    kl_prompts = where_measured(unseen, [pair.prompt_ids for pair in pairs], count=config.kl_prompts)
    method = Method(
        name="dpo",
        gradients=lambda numbers, nll_weight: _gradients(
            base, data, numbers, config, nll_weight=nll_weight, crew=crew
        ),
        batches=epoch_batches(len(pairs), size=config.batch_pairs, epochs=config.epochs, seed=seed),
        kl_prompts=kl_prompts,
        accuracy_says="of pairs ranked as people did",
        fingerprint=sha256_of([deciding(config), seed, [asdict(pair) for pair in pairs], kl_prompts]),
        before_step=lambda step: _refresh(base, data, config, step, progress=progress, crew=crew),
        changing={"reference": data.reference},
    )
    return train_policy(base, method, config, progress=progress, checkpoint=checkpoint, crew=crew)


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
    base: Base,
    pairs: Sequence[Pair],
    config: DpoConfig,
    *,
    cache: ReferenceCache | None,
    progress: Progress,
    crew: Crew,
) -> _Data:
    """Lay out the pairs and score them under the reference."""
    rows = [(p.prompt_ids, answer) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)]
    progress.stage("reference", 1)
    scored = reference_logprobs(
        base, rows, cache=cache, batch_tokens=config.batch_tokens, progress=progress, crew=crew
    )
    progress.step(1)
    start = torch.tensor([float(values.sum(dtype="float64")) for values in scored]).view(-1, 2)
    dpop = [config.correction_dpop_weight if p.source == "correction" else 0.0 for p in pairs]
    return _Data(
        trees=[make_tree(p.prompt_ids, (p.chosen_ids, p.rejected_ids)) for p in pairs],
        rows=rows,
        start=start.to(base.device),
        reference=start.to(base.device, copy=True),
        weights=torch.tensor([p.weight for p in pairs], device=base.device),
        margins=torch.tensor([p.margin for p in pairs], device=base.device),
        dpop_weights=torch.tensor(dpop, device=base.device),
    )


def _refresh(
    base: Base, data: _Data, config: DpoConfig, step: int, *, progress: Progress, crew: Crew
) -> None:
    """Let the loss measure from the policy as it is now, if it is time to."""
    if not config.reference_every or not step or step % config.reference_every:
        return
    scored = completion_logprobs(
        base, data.rows, adapter="policy", batch_tokens=config.batch_tokens, progress=progress, crew=crew
    )
    data.reference.copy_(torch.tensor([math.fsum(values) for values in scored]).view(-1, 2))


def _gradients(
    base: Base, data: _Data, numbers: Sequence[int], config: DpoConfig, *, nll_weight: float, crew: Crew
) -> tuple[dict[str, float], Change]:
    """Add the gradients of the pairs' weighted mean loss; return the step's curves and how the chosen answers moved.

    Every micro-batch divides by the whole batch's weight, so the split changes nothing.
    """
    trees = [data.trees[number] for number in numbers]
    share = shares(base, trees)
    total = data.weights[list(numbers)].sum()
    sums = torch.zeros(5, device=base.device)
    plans = micro_batches(trees, budget_tokens=base.budget(config.batch_tokens), share=share)
    with active(base, "policy", trainable=True):
        for plan in crew.share(plans):
            batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
            (own,) = sent([torch.tensor([numbers[i] for i in plan])], base.device)
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
            moved = _step_sums(policy.detach() - data.start[own], lengths, config)
            sums += torch.cat([loss.detach().view(1), moved])
    crew.sum(sums)
    means = (sums / torch.tensor([1.0, *[len(numbers)] * 4], device=base.device)).tolist()
    names = ("loss", "accuracy", "h_nats", "chosen_change_nats_per_token", "chosen_falling_share")
    curves = {f"dpo/{name}": value for name, value in zip(names, means, strict=True)}
    return {**curves, "dpo/nll_weight": nll_weight}, Change(nats_per_token=means[3], falling_share=means[4])


def _step_sums(ratios: torch.Tensor, lengths: torch.Tensor, config: DpoConfig) -> torch.Tensor:
    """Return (4,): over pairs, how many are ranked right, h, the chosen's change, how many fell."""
    h = ratios[:, 0] - ratios[:, 1]
    change = ratios[:, 0] / lengths[:, 0]
    falling = change < -config.falling_floor_nats_per_token
    right = (h > 0).to(h.dtype) + 0.5 * (h == 0).to(h.dtype)
    return torch.stack([right.sum(), h.sum(), change.sum(), falling.to(h.dtype).sum()])
