"""Turns dialogues into training examples and batches: what is learned where, and with what weight."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from alignment.starter.corpus import OFF_TOPIC
from alignment.starter.dialogues import Dialogue, Sources, Turn, dialogue
from alignment.starter.noise import NoiseRates
from alignment.starter.tokenizer import DialogueEncoder

if TYPE_CHECKING:
    import torch

IGNORED = -100  # no intent is asked for at this position


@dataclass(frozen=True, slots=True)
class Stage:
    """What a part of the training stresses."""

    short_share: (
        float  # of the dialogues, whose last answer is cut: its start alone shows what was understood
    )
    exact_weight: float  # loss weight of a token of an order number, product name or fact, against 1
    rates: NoiseRates = field(default_factory=NoiseRates)  # how questions are mistyped


@dataclass(frozen=True, slots=True)
class ExampleOptions:
    """How dialogues become examples; shares are probabilities."""

    question_weight: float = 0.15  # loss weight of a token the customer wrote, against 1 of the assistant's
    first_weight: float = 2.0  # loss weight of an answer's first tokens, where its subject is decided
    first_tokens: int = 8
    handover_weight: float = 1.0  # factor of that for an answer that hands over, see ``caution``
    bottleneck_share: float = 0.5  # of the answers that copy nothing: they do not see the question
    early: Stage = Stage(short_share=0.85, exact_weight=4.0)  # first understand ...
    later: Stage = Stage(0.25, 4.0, NoiseRates(typo=0.25, upper=0.03, name_noise=0.12))  # ... then recite
    """Names are misspelt and more questions are in capitals: nearly all names that were copied wrongly had been."""
    early_chunks: int = 16
    short_tokens: int = 8  # what a short answer is cut to
    varied_share: float = 0.3  # questions without a product name, some of whose words are cut
    batch_tokens: int = 8192  # padded
    chunk_dialogues: int = 3000  # assembled at a time


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, the loss weight of predicting each, the answer group to recognise at each, the first visible."""

    ids: list[int]
    weights: list[float]
    groups: list[int]
    visible_from: list[int]  # the position before which this one's attention sees nothing


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: ids, groups (or IGNORED) and visible_from (B, T) int64, weights (B, T) float32."""

    ids: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor
    visible_from: torch.Tensor


def example(
    talk: Dialogue,
    *,
    encoder: DialogueEncoder,
    group_numbers: Mapping[str, int],
    options: ExampleOptions,
    stage: Stage,
    copying: frozenset[str],
    rng: random.Random,
) -> Example:
    """Encodes a dialogue; answers and their end tokens weigh 1 or more, questions a little.

    Answers of the groups in ``copying`` are never cut, as the copied value may stand late in them. Of the others
    a share sees nothing before its own head, so that the head learns to hold all that was understood (gist
    tokens: Mu et al. 2023, arXiv 2304.08467): later tokens of an answer then stay with its subject.
    """
    built = Example(ids=[], weights=[], groups=[], visible_from=[])
    if talk.system:
        head, content = encoder.message("system", talk.system)
        _append(built, [*head, *content, *encoder.line], weight=0.0)
    for at, turn in enumerate(talk.turns):
        last = at == len(talk.turns) - 1
        _append_question(built, turn, encoder=encoder, options=options, rng=rng)
        _append(built, encoder.head("assistant"), weight=0.0)
        built.groups[-1] = group_numbers[turn.group]
        content, exact = encoder.answer(turn.answer, exact=turn.exact)
        start = 0
        if turn.group not in copying:
            if last and rng.random() < stage.short_share:
                content = content[: options.short_tokens]
            if rng.random() < options.bottleneck_share:
                start = len(built.ids) - len(encoder.head("assistant"))
        _append(built, content, weight=1.0, visible_from=start)
        first_weight = options.first_weight * (options.handover_weight if turn.group == OFF_TOPIC else 1.0)
        for at, is_exact in enumerate(exact[: len(content)], start=len(built.ids) - len(content)):
            first = at < len(built.ids) - len(content) + options.first_tokens
            built.weights[at] = stage.exact_weight if is_exact else first_weight if first else 1.0
        _append(built, [] if last else encoder.line, weight=0.0)
    return built


def _append_question(
    built: Example, turn: Turn, *, encoder: DialogueEncoder, options: ExampleOptions, rng: random.Random
) -> None:
    head, content = encoder.message("user", turn.question)
    if not turn.group.startswith(("product_", "unknown_")) and rng.random() < options.varied_share:
        content = encoder.varied(turn.question, rng)
    _append(built, head, weight=0.0)
    _append(built, content, weight=options.question_weight)
    _append(built, encoder.line, weight=0.0)


def _append(built: Example, ids: Sequence[int], *, weight: float, visible_from: int = 0) -> None:
    built.ids.extend(ids)
    built.weights.extend([weight] * len(ids))
    built.groups.extend([IGNORED] * len(ids))
    built.visible_from.extend([visible_from] * len(ids))


def batches(
    found: Sources,
    *,
    encoder: DialogueEncoder,
    group_numbers: Mapping[str, int],
    options: ExampleOptions,
    seed: int,
    chunk: int,
) -> list[Batch]:
    """The batches of one chunk of dialogues, in training order; equal arguments give equal batches."""
    copying = frozenset(key for key, group in found.corpus.groups.items() if group.has_slot())
    rng = random.Random(f"{seed}:chunk:{chunk}")
    numbers = range(chunk * options.chunk_dialogues, (chunk + 1) * options.chunk_dialogues)
    stage = options.early if chunk < options.early_chunks else options.later
    found = replace(found, rates=stage.rates)
    examples = [
        example(
            dialogue(found, seed=seed, number=number),
            encoder=encoder,
            group_numbers=group_numbers,
            options=options,
            stage=stage,
            copying=copying,
            rng=rng,
        )
        for number in numbers
    ]
    made = [_padded(rows) for rows in _by_length(examples, limit=options.batch_tokens)]
    rng.shuffle(made)
    return made


def _by_length(examples: Sequence[Example], *, limit: int) -> Iterator[list[Example]]:
    rows: list[Example] = []
    for row in sorted(examples, key=lambda item: len(item.ids)):
        if rows and (len(rows) + 1) * len(row.ids) > limit:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _padded(rows: Sequence[Example]) -> Batch:
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)  # 0 is the padding token
    weights = torch.zeros(len(rows), longest)
    groups = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    visible_from = torch.zeros(len(rows), longest, dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        weights[at, : len(row.ids)] = torch.tensor(row.weights)
        groups[at, : len(row.ids)] = torch.tensor(row.groups)
        visible_from[at, : len(row.ids)] = torch.tensor(row.visible_from)
    return Batch(ids=ids, weights=weights, groups=groups, visible_from=visible_from)
