"""Token ids become tensors: token-budget micro-batches of padded rows, or of prefix-shared (tree) rows.

A tree row holds one prompt and all its completions, positions restarted after the prompt, under a mask that
hides the completions from each other; its numbers equal those of padded rows, with the prompt paid once.
Letters: B rows, T tokens a row, C completions in the batch, N completion tokens in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from storage.errors import InvalidField

Tokens = tuple[int, ...]

SHARED_PART_THAT_PAYS = 0.2
"""Share of tokens saved from which tree rows are used: on 2 CPU cores 1.04 times quicker at 12.5% saved (64-token
prompts, 192-token answers), 1.47 times at 37.5% (192 and 64)."""
MOST_COMPLETIONS_A_TREE = 8
"""A mask costs T^2: more completions than this are spread over several rows."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its completions; a pair is (chosen, rejected)."""

    prompt: Tokens
    completions: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one forward pass. Completions are numbered tree by tree, in order."""

    input_ids: torch.Tensor
    """(B, T) int64, padded on the right."""
    positions: torch.Tensor | None
    """(B, T) int64 for tree rows; None: 0 to T-1 in every row."""
    segments: torch.Tensor
    """(B, T) int64: 0 prompt, 1.. completions, -1 padding."""
    bounds: tuple[tuple[int, ...], ...]
    """Of each row: where its prompt ends and where each completion ends."""
    predictors: torch.Tensor
    """(N,) int64 into B*T: the position whose hidden state predicts the target. On the CPU, which plans with it."""
    targets: torch.Tensor
    """(N,) int64 token ids."""
    owners: torch.Tensor
    """(N,) int64 in 0..C-1."""
    lasts: torch.Tensor
    """(C,) int64 into B*T: each completion's last token. On the CPU, as above."""
    lengths: torch.Tensor
    """(C,) int64: tokens of each completion."""

    @property
    def places(self) -> torch.Tensor:
        """(N,) int64 into B*T: the completions' own tokens, on the CPU, in the order of `targets`."""
        width = self.input_ids.shape[1]
        spans = [
            torch.arange(row * width + start, row * width + stop)
            for row, ends in enumerate(self.bounds)
            for start, stop in pairwise(ends)
        ]
        return torch.cat(spans)

    @property
    def mask(self) -> torch.Tensor | None:
        """(B, 1, T, T) bool, True = may attend, for tree rows; None: causal. Padding on the right is never seen."""
        return None if self.positions is None else _tree_mask(self.segments)


def make_tree(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Tree:
    """Return a checked Tree.

    Raises:
        InvalidField: the prompt or a completion is empty.
    """
    if not prompt:
        raise InvalidField("prompt_ids", prompt, "give at least one prompt token")
    if not completions or not all(completions):
        raise InvalidField("answer_ids", completions, "give at least one token for every answer")
    return Tree(tuple(prompt), tuple(tuple(completion) for completion in completions))


def group_by_prompt(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[list[Tree], list[list[int]]]:
    """Gather (prompt, completion) rows of one prompt into trees; also return each tree's row numbers."""
    groups: dict[Tokens, list[int]] = {}
    for number, (prompt, _) in enumerate(rows):
        groups.setdefault(tuple(prompt), []).append(number)
    size = MOST_COMPLETIONS_A_TREE
    numbers = [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]
    return [make_tree(rows[group[0]][0], [rows[i][1] for i in group]) for group in numbers], numbers


def pays_to_share(trees: Sequence[Tree]) -> bool:
    """Return whether tree rows save enough tokens over padded rows."""
    saved = sum(len(tree.prompt) * (len(tree.completions) - 1) for tree in trees)
    plain = sum(len(tree.prompt) + len(completion) for tree in trees for completion in tree.completions)
    return saved > SHARED_PART_THAT_PAYS * plain


def micro_batches(trees: Sequence[Tree], *, budget_tokens: int, share: bool) -> list[list[int]]:
    """Split tree numbers into batches of similar length, each at most `budget_tokens` with its padding.

    A tree is never split; one that is larger than the budget gets a batch of its own.
    """
    widths = [_width(tree, share) for tree in trees]
    heights = [1 if share else len(tree.completions) for tree in trees]
    batches: list[list[int]] = []
    rows = widest = 0
    for number in sorted(range(len(trees)), key=lambda i: (widths[i], i), reverse=True):
        if not batches or (rows + heights[number]) * widest > budget_tokens:
            batches.append([])
            rows, widest = 0, widths[number]
        batches[-1].append(number)
        rows += heights[number]
    return batches


def _width(tree: Tree, share: bool) -> int:
    lengths = [len(completion) for completion in tree.completions]
    return len(tree.prompt) + (sum(lengths) if share else max(lengths))


def collate(trees: Sequence[Tree], *, share: bool, pad_id: int, device: torch.device) -> Batch:
    """Lay the trees out as one batch, a row a tree (`share`) or a row a completion."""
    rows = (
        list(trees) if share else [Tree(tree.prompt, (each,)) for tree in trees for each in tree.completions]
    )
    width = max(len(row.prompt) + sum(map(len, row.completions)) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(rows), width), dtype=torch.int64)
    segments = torch.full((len(rows), width), -1, dtype=torch.int64)
    predictors: list[int] = []
    lasts: list[int] = []
    for number, row in enumerate(rows):
        flat = [*row.prompt, *(token for completion in row.completions for token in completion)]
        ids[number, : len(flat)] = torch.tensor(flat)
        bounds = _bounds(row)
        positions[number, : bounds[0]] = torch.arange(bounds[0])
        segments[number, : bounds[0]] = 0
        for part, (start, end) in enumerate(pairwise(bounds)):
            positions[number, start:end] = torch.arange(bounds[0], bounds[0] + end - start)
            segments[number, start:end] = part + 1
            offset = number * width
            predictors += [offset + bounds[0] - 1, *range(offset + start, offset + end - 1)]
            lasts.append(offset + end - 1)
    completions = [completion for tree in trees for completion in tree.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    targets = torch.tensor([token for completion in completions for token in completion])
    owners = torch.repeat_interleave(torch.arange(len(completions)), lengths)
    ids, positions, segments, targets, owners, lengths = sent(
        [ids, positions, segments, targets, owners, lengths], device
    )
    return Batch(
        input_ids=ids,
        positions=positions if share else None,
        segments=segments,
        bounds=tuple(tuple(_bounds(row)) for row in rows),
        predictors=torch.tensor(predictors),
        targets=targets,
        owners=owners,
        lasts=torch.tensor(lasts),
        lengths=lengths,
    )


def sent(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return tensors of the CPU, all int64, on the device: in one transfer for which the CPU does not wait."""
    if device.type == "cpu":
        return list(tensors)
    together = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    parts = torch.split(together.to(device, non_blocking=True), [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _bounds(row: Tree) -> list[int]:
    """Return where the prompt ends and where each completion ends."""
    bounds = [len(row.prompt)]
    for completion in row.completions:
        bounds.append(bounds[-1] + len(completion))
    return bounds


def _tree_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, T, T) bool: causal, and only into the prompt or the same completion.

    Padding sees the prompt: a query without any key would be NaN.
    """
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    key, query = segments.unsqueeze(1), segments.unsqueeze(2)
    return (causal & ((key == 0) | (key == query))).unsqueeze(1)
