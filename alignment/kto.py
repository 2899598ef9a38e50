"""Kahneman-Tversky optimisation: trains the adapter "policy" on single thumbs, against the adapter "reference".

Equal to TRL 1.16's KTOTrainer on the same ids, weights and order, as long as an optimiser step is one of its batches
(`per_device_train_batch_size`, no accumulation) and every thumb has weight 1. What differs, on purpose:

- the mismatched rows and z0 are the whole optimiser batch's; TRL's are each micro-batch's own, so that there
  accumulation changes the result;
- every thumb has a weight, and sums divide by the batch's weight; z0, which no label enters, is a plain mean;
- lambda_D and lambda_U are balanced from the data unless both are given; TRL uses 1 and warns;
- an answer to somebody else's prompt is cut where the model's context ends; TRL cuts every row at `max_length`;
- batches mix both classes and come in another order each epoch; TRL takes the data set's order every time;
- the loss may have an NLL term on liked answers, which the displacement watch raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from alignment.batching import Batch, collate, group_by_prompt, make_tree, micro_batches
from alignment.displacement import Change
from alignment.distributed import ALONE, Crew
from alignment.kl_budget import where_measured
from alignment.kto_losses import balanced_weights, reference_point, thumb_losses
from alignment.labels import Thumb
from alignment.logprobs import (
    Row,
    completion_logprobs,
    completion_sums,
    logprobs_beside,
    shares,
    token_logprobs,
)
from alignment.models import Base, active, has_adapter
from alignment.packed import packs
from alignment.policy_training import Method, PolicyResult, train_policy
from alignment.progress import Progress
from alignment.reference_cache import ReferenceCache, reference_logprobs
from alignment.training_config import KtoConfig, deciding
from storage.digests import sha256_of
from storage.errors import InvalidField

__all__ = ["KtoConfig", "KtoResult", "thumb_batches", "train_kto"]

KtoResult = PolicyResult
Scored = tuple[list[int], torch.Tensor]
"""Places among a step's thumbs, and the policy's log-probs of their answers in nats."""
EQUAL_NATS = 1e-4
"""What float32 may leave between the sums of one answer in two passes: before the first step a policy is on neither side."""
CPU_SHARE = 0.25
"""Of what fits into memory, what a step's activations may take on a CPU, whose memory others need too."""
FEWEST_IN_A_BATCH = 3
"""On average: so that rounding leaves no batch of one, whose only mismatched row would be its own answer."""


@dataclass(frozen=True, slots=True)
class _Data:
    """The thumbs in their order: I thumbs."""

    rows: list[Row]
    mismatched: list[Row]
    """Each prompt with the answer of the thumb before it in its batch; empty when the loss has no z0."""
    reference: torch.Tensor  # (I,) nats
    mismatched_reference: torch.Tensor  # (I,) nats, or (0,)
    weights: torch.Tensor  # (I,)
    ups: torch.Tensor  # (I,) bool
    class_weights: tuple[float, float]
    """lambda_D, lambda_U"""


def train_kto(
    base: Base,
    thumbs: Sequence[Thumb],
    config: KtoConfig,
    *,
    seed: int,
    progress: Progress,
    unseen: Sequence[Sequence[int]] = (),
    cache: ReferenceCache | None = None,
    checkpoint: Path | None = None,
    crew: Crew = ALONE,
) -> KtoResult:
    """Train the adapter "policy" (`models.add_policy`) on the thumbs.

    The order of thumbs inside an optimiser batch decides which answer follows which prompt in z0, and nothing else.
    It stops itself, with a reason, on numbers that are not finite and on displacement of the liked answers that a
    raised NLL term does not cure. With `checkpoint`, a file, an interrupted run resumes to the same weights.

    Args:
        unseen: prompts that the policy does not learn from: its KL is measured there.

    Raises:
        InvalidField: too few thumbs of a class, one that cannot be used, no adapter "policy", or a setting out
            of range.
        Interrupted: `progress` asked to stop; the checkpoint is written.
        CorruptData: the checkpoint belongs to another run.
    """
    _check_settings(base, config)
    _check_thumbs(base, thumbs, config)
    ups = [thumb.up for thumb in thumbs]
    batches = thumb_batches(ups, size=config.batch_thumbs, epochs=config.epochs, seed=seed)
    data = _prepare(base, thumbs, batches, config, cache=cache, progress=progress, crew=crew)
    kl_prompts = where_measured(unseen, [thumb.prompt_ids for thumb in thumbs], count=config.kl_prompts)
    method = Method(
        name="kto",
        gradients=lambda numbers, nll_weight: _gradients(
            base, data, numbers, config, nll_weight=nll_weight, crew=crew
        ),
        batches=batches,
        kl_prompts=kl_prompts,
        accuracy_says="of answers on their thumb's side",
        fingerprint=sha256_of(
            ["kto", deciding(config), seed, [asdict(thumb) for thumb in thumbs], kl_prompts]
        ),
    )
    return train_policy(base, method, config, progress=progress, checkpoint=checkpoint, crew=crew)


def thumb_batches(ups: Sequence[bool], *, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the thumbs of each optimiser step: batches of about `size`, drawn once, in a fresh order each epoch.

    Every batch has thumbs of both classes when there are at least as many of each as batches. The batches stay
    the same so that the reference scores one mismatched row a thumb, not one a thumb and epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, min(round(len(ups) / size), len(ups) // FEWEST_IN_A_BATCH))
    drawn: list[list[int]] = [[] for _ in range(steps)]
    for up in (True, False):
        members = [number for number, other in enumerate(ups) if other == up]
        order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
        bounds = [step * len(members) // steps for step in range(steps + 1)]
        for batch, (start, end) in zip(drawn, pairwise(bounds), strict=True):
            batch += order[start:end]
    batches = [
        [batch[i] for i in torch.randperm(len(batch), generator=generator).tolist()] for batch in drawn
    ]
    orders = [torch.randperm(steps, generator=generator).tolist() for _ in range(epochs)]
    return [batches[step] for order in orders for step in order]


def _check_settings(base: Base, config: KtoConfig) -> None:
    if not has_adapter(base, "policy"):
        raise InvalidField("adapter", "policy", "call add_policy first")
    if not 0 < config.beta < math.inf:
        raise InvalidField("kto.beta", config.beta, "use a number above 0")
    weights = {"desirable": config.desirable_weight, "undesirable": config.undesirable_weight}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise InvalidField(f"kto.{name}_weight", weight, "use a number above 0, or 0 for automatic")
    if config.batch_thumbs < 2:
        raise InvalidField("kto.batch_thumbs", config.batch_thumbs, "use 2 or more: z0 needs other answers")
    if config.epochs < 1:
        raise InvalidField("kto.epochs", config.epochs, "use 1 or more")
    if config.min_class_thumbs < 1:
        raise InvalidField("kto.min_class_thumbs", config.min_class_thumbs, "use 1 or more")


def _check_thumbs(base: Base, thumbs: Sequence[Thumb], config: KtoConfig) -> None:
    if not thumbs:
        raise InvalidField("thumbs", 0, "collect thumbs up and thumbs down first")
    for up, name in ((True, "up"), (False, "down")):
        count = sum(thumb.up == up for thumb in thumbs)
        if count < config.min_class_thumbs:
            fix = f"collect {config.min_class_thumbs - count} more (kto.min_class_thumbs is {config.min_class_thumbs})"
            raise InvalidField(f"thumbs {name}", count, fix)
    for thumb in thumbs:
        if not thumb.prompt_ids or not thumb.answer_ids:
            fix = "leave it out: its prompt or its answer has no tokens"
            raise InvalidField("thumb", thumb.id, fix)
        if len(thumb.prompt_ids) + len(thumb.answer_ids) > base.max_positions:
            fix = f"leave it out: it has more than the model's {base.max_positions} tokens"
            raise InvalidField("thumb", thumb.id, fix)
        if not 0 < thumb.weight < math.inf:
            raise InvalidField(f"weight of thumb {thumb.id}", thumb.weight, "use a number above 0")


def _prepare(
    base: Base,
    thumbs: Sequence[Thumb],
    batches: Sequence[Sequence[int]],
    config: KtoConfig,
    *,
    cache: ReferenceCache | None,
    progress: Progress,
    crew: Crew,
) -> _Data:
    """Make the mismatched rows and score everything under the reference; rows of one prompt share it there."""
    rows: list[Row] = [(thumb.prompt_ids, thumb.answer_ids) for thumb in thumbs]
    mismatched = _mismatched(rows, batches, longest=base.max_positions) if config.loss == "kto" else []
    progress.stage("reference", 1)
    scored = reference_logprobs(
        base, rows + mismatched, cache=cache, batch_tokens=config.batch_tokens, progress=progress, crew=crew
    )
    progress.step(1)
    wide = torch.promote_types(base.dtype, torch.float32)
    weights = torch.tensor([thumb.weight for thumb in thumbs], dtype=wide, device=base.device)
    sums = weights.new_tensor([float(values.sum(dtype="float64")) for values in scored])
    ups = torch.tensor([thumb.up for thumb in thumbs], device=base.device)
    return _Data(
        rows=rows,
        mismatched=mismatched,
        reference=sums[: len(rows)],
        mismatched_reference=sums[len(rows) :],
        weights=weights,
        ups=ups,
        class_weights=balanced_weights(
            math.fsum(thumb.weight for thumb in thumbs if thumb.up),
            math.fsum(thumb.weight for thumb in thumbs if not thumb.up),
            desirable=config.desirable_weight,
            undesirable=config.undesirable_weight,
        ),
    )


def _mismatched(rows: Sequence[Row], batches: Sequence[Sequence[int]], *, longest: int) -> list[Row]:
    """Return each prompt with the answer before it in its batch (the first with the last), as TRL shifts them."""
    before = {number: batch[place - 1] for batch in batches for place, number in enumerate(batch)}
    return [
        (prompt, rows[before[number]][1][: longest - len(prompt)]) for number, (prompt, _) in enumerate(rows)
    ]


def _gradients(
    base: Base, data: _Data, numbers: Sequence[int], config: KtoConfig, *, nll_weight: float, crew: Crew
) -> tuple[dict[str, float], Change | None]:
    """Add the gradients of the thumbs' weighted mean loss; return the step's curves and how the liked answers moved.

    z0 comes first, from all mismatched rows, because every answer's gradient depends on it. Every micro-batch
    divides by the whole batch's weight, so the split changes nothing.
    """
    joined = _fits_at_once(base, data, numbers, config)
    point = None if joined else _point(base, data, numbers, config, crew)
    everyone = torch.tensor(numbers, device=base.device)  # (I,)
    lengths = torch.tensor([len(data.rows[number][1]) for number in numbers], device=base.device)
    ratios = data.weights.new_zeros(len(numbers))
    total_loss = data.weights.new_zeros(())
    total = data.weights[everyone].sum()
    with active(base, "policy", trainable=True):
        passes: Iterable[Scored]
        if point is None:
            point, passes = _joined(base, data, numbers, config, crew)
        else:
            passes = _answers(base, data, numbers, config, crew)
        for places, policy in passes:
            own = everyone[places]
            losses = thumb_losses(
                policy,
                data.reference[own],
                lengths[places],
                ups=data.ups[own],
                point=point,
                class_weights=data.class_weights,
                nll_weight=nll_weight,
                beta=config.beta,
            )
            loss = (data.weights[own] * losses).sum() / total
            loss.backward()  # type: ignore[no-untyped-call]
            total_loss += loss.detach()
            ratios[places] = policy.detach() - data.reference[own]
    crew.sum(total_loss, ratios)
    point, ratios, lengths, ups = point.cpu(), ratios.cpu(), lengths.cpu(), data.ups[everyone].cpu()
    curves = {"kto/loss": float(total_loss), "kto/nll_weight": nll_weight}
    if config.loss == "kto":
        curves["kto/kl_nats"] = float(point)
    moved, change = _moved(ratios, lengths, ups, point=point, config=config)
    return curves | moved, change


def _point(base: Base, data: _Data, numbers: Sequence[int], config: KtoConfig, crew: Crew) -> torch.Tensor:
    """Return z0 of the batch, in nats."""
    if config.loss != "kto":
        return data.weights.new_zeros(())
    rows = [data.mismatched[number] for number in numbers]
    scored = completion_logprobs(base, rows, adapter="policy", batch_tokens=config.batch_tokens, crew=crew)
    policy = data.weights.new_tensor([math.fsum(values) for values in scored])
    return reference_point(policy, data.mismatched_reference[list(numbers)])


def _answers(
    base: Base, data: _Data, numbers: Sequence[int], config: KtoConfig, crew: Crew
) -> Iterator[Scored]:
    """Score this process's answers, a micro-batch at a time."""
    layouts = list(_layouts(base, [data.rows[number] for number in numbers], config))
    for places, batch in crew.share(layouts):
        yield places, completion_sums(token_logprobs(base, batch), batch)


def _fits_at_once(base: Base, data: _Data, numbers: Sequence[int], config: KtoConfig) -> bool:
    """Return whether z0 can come from the answers' own pass: one that knows how, and keeps a whole step's activations."""
    if config.loss != "kto" or not packs(base):
        return False
    tokens = sum(
        len(prompt) + len(answer)
        for number in numbers
        for prompt, answer in (data.rows[number], ((), data.mismatched[number][1]))
    )
    return tokens <= base.most_tokens * (1 if base.device.type == "cuda" else CPU_SHARE)


def _joined(
    base: Base, data: _Data, numbers: Sequence[int], config: KtoConfig, crew: Crew
) -> tuple[torch.Tensor, list[Scored]]:
    """Return z0 and this process's answers scored, each prompt read once for its answer and the mismatched one.

    No gradient can be formed before z0 is known, so the activations of the whole step are kept until then.
    """
    trees, groups = group_by_prompt([data.rows[number] for number in numbers])
    strangers = [[data.mismatched[numbers[place]][1] for place in places] for places in groups]
    both = [
        make_tree(tree.prompt, (*tree.completions, *more))
        for tree, more in zip(trees, strangers, strict=True)
    ]
    plans = micro_batches(both, budget_tokens=base.budget(config.batch_tokens), share=True)
    policy = data.weights.new_zeros(len(numbers))
    passes: list[Scored] = []
    for plan in crew.share(plans):
        batch = collate([both[i] for i in plan], share=True, pad_id=base.pad_id, device=base.device)
        sums = completion_sums(logprobs_beside(base, batch, [len(groups[i]) for i in plan]), batch)
        halves = [part.chunk(2) for part in torch.split(sums, [2 * len(groups[i]) for i in plan])]
        places = [place for i in plan for place in groups[i]]
        passes.append((places, torch.cat([own for own, _ in halves])))
        policy[places] = torch.cat([stranger for _, stranger in halves]).detach()
    crew.sum(policy)
    return reference_point(policy, data.mismatched_reference[list(numbers)]), passes


def _layouts(base: Base, rows: Sequence[Row], config: KtoConfig) -> Iterator[tuple[list[int], Batch]]:
    """Yield micro-batches and which rows each holds; rows of one prompt share it where that pays."""
    trees, groups = group_by_prompt(rows)
    share = shares(base, trees)
    if not share:
        trees, groups = (
            [make_tree(prompt, (answer,)) for prompt, answer in rows],
            [[i] for i in range(len(rows))],
        )
    budget = base.budget(config.batch_tokens)
    for plan in micro_batches(trees, budget_tokens=budget, share=share):
        batch = collate([trees[i] for i in plan], share=share, pad_id=base.pad_id, device=base.device)
        yield [place for i in plan for place in groups[i]], batch


def _moved(
    ratios: torch.Tensor, lengths: torch.Tensor, ups: torch.Tensor, *, point: torch.Tensor, config: KtoConfig
) -> tuple[dict[str, float], Change | None]:
    """Return the curves of (I,) log-ratios in nats, those of a class only when the batch has it."""
    above = torch.where(ups, ratios - point, point - ratios)
    right = (above > EQUAL_NATS).float() + 0.5 * (above.abs() <= EQUAL_NATS).float()
    curves = {"kto/accuracy": float(right.mean())}
    if bool((~ups).any()):
        curves["kto/down_nats"] = float(ratios[~ups].mean())
    if not bool(ups.any()):
        return curves, None
    changes = ratios[ups] / lengths[ups]
    falling = (changes < -config.falling_floor_nats_per_token).float()
    change = Change(nats_per_token=float(changes.mean()), falling_share=float(falling.mean()))
    curves["kto/up_nats"] = float(ratios[ups].mean())
    curves["kto/up_change_nats_per_token"] = change.nats_per_token
    curves["kto/up_falling_share"] = change.falling_share
    return curves, change
